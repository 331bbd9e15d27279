"""The checks of a conversion, on the real weights, through the file as written and read back."""

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import load_pretrained
from torch import Tensor

from mimkit.data.loader import load_preview
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.io.weights import State, assemble, materialize, on_meta, read_weights
from mimkit.models.hpvit import PATCH, SIDE, HPViT, set_eps, unfold
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel, resize_matrix

if TYPE_CHECKING:
    from mimkit.conversion.family import Family
    from mimkit.conversion.source import Plain

LIMIT, DOUBT, LIMIT64 = 1e-4, 1e-5, 1e-9  # relative differences: float32 fails; is looked at again; float64 fails
IMAGES, SIMILARITY_IMAGES, TOKENS = 2, 8, 2_000

REFUSALS = (RuntimeError, LookupError, ValueError, TypeError, AssertionError, AttributeError, ImportError, OSError)
PRETRAINING = r"(decoder|(dino|ibot)_head|lm_head|predictor)[._].*|head\.(mlp|last_layer)\..*|.*mask_token"

Check = dict[str, Any]


def run_checks(folder: Path, to: str, plain: "Plain | None", file: Path, family: "Family") -> list[Check]:
    """All that apply to a file and what was made of it; one that fails is an error."""
    if plain is None:
        return [no_reader(family, "it is in no other library")]
    if plain.pyramid:  # our own file: the pyramid in it is what the plain ViT must equal
        checks = [identity(file, plain) | {"name": "the pyramid that was read is the plain ViT"}]
    else:
        checks = [independent(plain, file, family)]
    if to == "timm":
        return [*checks, read_back(folder, plain)]
    return [*checks, *([] if plain.pyramid else [kernel(folder, plain)]), identity(folder, plain)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where either is not a number."""
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny))
    return gap if math.isfinite(gap) else math.inf


def shipped(size: tuple[int, ...], colors: dict[str, Any], count: int = IMAGES) -> Tensor:
    """Images that come with mimkit as a network takes them (b c H W), by its size (c H W), mean and std."""
    in_chans, height, width = size
    mean, std = (list(colors[name]) if len(colors[name]) == in_chans else [0.5] * in_chans for name in ("mean", "std"))
    return Normalize(mean, std)(load_preview(open_source("sample"), (height, width), in_chans, count).images)


def written(folder: Path) -> Any:
    """The network in a folder, as timm reads its config.json, with the weights mapped instead of copied."""
    return assemble(on_meta(timm.create_model, f"local-dir:{folder}"), read_weights(folder)).eval()


@torch.no_grad()
def tokens_after(net: Any, x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Tokens (b k+n d) of a plain ViT after so many blocks, and its final output."""
    caught: list[Tensor] = []
    if blocks:
        hook = net.blocks[blocks - 1].register_forward_hook(lambda module, args, output: caught.append(output))
    else:
        hook = net.blocks[0].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        final = net.forward_features(x)
    finally:
        hook.remove()
    return caught[0].flatten(1, -2), final


@contextmanager
def in_float64(net: Any) -> Iterator[None]:
    """Each part computes in float64 while it runs, and only then: the whole would take twice the memory."""
    children = [child for name, child in net.named_children() if name not in ("blocks", "pools", "patch_embed")]
    parts = [*children, *net.blocks, *getattr(net, "pools", []), *net.patch_embed.children()]
    hooks = [part.register_forward_pre_hook(lambda module, args: module.double() and None) for part in parts]
    hooks += [part.register_forward_hook(lambda module, args, output: module.float() and None) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def inexact(pyramid: HPViT) -> str:
    """Why an HPViT does not start as its source, if it doesn't."""
    pools = [pool for pool in pyramid.pools[:2] if getattr(pool, "share", 0.0) != 1.0]
    if pyramid.attention != "subgrid":
        return "attention is local"
    if pools:
        return "its pools do not start as one tap"
    if pyramid.num_prefix_tokens != getattr(pyramid.source, "num_prefix_tokens", 0):
        return "the prefix tokens are dropped"
    if len(pyramid.global_blocks) < len(pyramid.blocks) and pyramid.window < max(pyramid.grid):
        return "its windows are smaller than the grid"
    return ""


@torch.no_grad()
def identity(folder: Path, plain: "Plain") -> Check:
    """(1) Stage 3, and the end where stage 4 is empty, are the source network's with its kernel at 16."""
    pyramid = written(folder)
    source = plain.build(PATCH, any_grid=True)
    reason = inexact(pyramid)
    count = SIMILARITY_IMAGES if reason else IMAGES
    images = shipped(pyramid.pretrained_cfg["input_size"], pyramid.pretrained_cfg, count)
    if reason:
        found = similarity(pyramid, source, images)
        figures = ", ".join(f"stage {stage} {value:.3f}" for stage, value in found.items())
        text = f"{reason.capitalize()}. Linear CKA with the source's features at the same depth: {figures}."
        return {"name": "the pyramid is the plain ViT", "result": "not applicable", "text": text, "cka": found}

    def compare(x: Tensor) -> list[float]:
        tokens, grid = pyramid.stages(x, 2)[-1]
        theirs, final = tokens_after(source, x, sum(pyramid.depths[:3]))
        both = [difference(tokens, theirs)]
        if not pyramid.depths[3]:
            ours = pyramid.leave(tokens, grid)
            both.append(difference(ours, final))
            if pyramid.num_classes:
                both.append(difference(pyramid.forward_head(ours), source.forward_head(final)))
        return both

    figures32 = [max(values) for values in zip(*(compare(x[None]) for x in images), strict=True)]
    worst = max(figures32)
    names = ("end of stage 3", "final output", "logits")
    text = ", ".join(f"{name} {figure:.1e}" for name, figure in zip(names[: len(figures32)], figures32, strict=True))
    text = f"Relative difference in float32 on {len(images)} images of {images.shape[-2]}x{images.shape[-1]} px: {text}"
    check = {"name": "the pyramid is the plain ViT", "result": "passed", "float32": worst}
    if not worst <= LIMIT:
        raise UserError(f"The pyramid is not the plain ViT ({text}; {LIMIT:.0e} is allowed): nothing was written.")
    if worst > DOUBT:
        with in_float64(pyramid), in_float64(source):
            again = max(compare(images[:1].double()))
        if not again <= LIMIT64:
            raise UserError(f"The pyramid is not the plain ViT ({text}; in float64 {again:.1e}): nothing was written.")
        check["float64"] = again
        text += f"; in float64 {again:.1e}"
    return {**check, "text": f"{text}."}


@torch.no_grad()
def similarity(pyramid: HPViT, source: Any, images: Tensor) -> dict[int, float]:
    """Linear CKA of each stage's map, averaged to the coarser grid of the two, with the source's tokens as deep."""
    features: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for x in images.split(1):
        for stage, (tokens, grid) in enumerate(pyramid.stages(x)):
            ours = unfold(tokens[:, pyramid.num_prefix_tokens :], max(SIDE >> stage, 1), grid, pyramid.attention)
            theirs = tokens_after(source, x, sum(pyramid.depths[: stage + 1]))[0]
            theirs = theirs[:, getattr(source, "num_prefix_tokens", 0) :]
            maps = (
                rearrange(ours, "1 h w d -> d h w"),
                rearrange(theirs, "1 (h w) d -> d h w", h=x.shape[-2] // PATCH),
            )
            coarse = (min(m.shape[1] for m in maps), min(m.shape[2] for m in maps))
            a, b = (rearrange(F.adaptive_avg_pool2d(m, coarse), "d h w -> (h w) d") for m in maps)
            features.setdefault(stage + 1, []).append((a, b))
    found = {}
    for stage, pairs in features.items():
        a, b = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        step = -(-len(a) // TOKENS)
        found[stage] = linear_cka(a[::step], b[::step])
    return found


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Similarity of two sets of features (n d), 1 when one is a turned and scaled copy of the other, 0 on average when
    they have nothing in common (Kornblith et al., ICML 2019, with the unbiased HSIC of Song et al., JMLR 2012)."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        rows = k.sum(0) @ m.sum(0)
        return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))

    grams = [(x @ x.T).fill_diagonal_(0) for x in (a - a.mean(0), b - b.mean(0))]
    return float(hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt())


def kernel(folder: Path, plain: "Plain") -> Check:
    """(2) Resized patch times resized kernel is patch times kernel, and that kernel is the one that was written."""
    name, weight = "the kernel's resize", plain.state[KERNEL].double()
    side = weight.shape[-1]
    if side == PATCH:
        return {"name": name, "result": "not applicable", "text": "The kernel has 16 px already."}
    images = shipped((weight.shape[1], 8 * side, 8 * side), {"mean": [], "std": []})
    patches = rearrange(images.double(), "b c (h p) (w q) -> (b h w) c (p q)", p=side, q=side)
    before = torch.einsum("n c p, d c p -> n d", patches, weight.flatten(2))
    resized = resize_kernel(weight, PATCH)
    after = torch.einsum("n c p, d c p -> n d", patches @ resize_matrix(side, PATCH).T, resized.flatten(2))
    error = difference(after, before)
    text = f"Resized patches times the kernel at 16 px against patches times the kernel at {side} px: {error:.1e}"
    if side > PATCH:
        return {"name": name, "result": "shrunk", "error": error, "text": f"{text}; shrinking loses some of it."}
    if not error <= LIMIT64 or not torch.equal(read_weights(folder)[KERNEL], resized.to(plain.state[KERNEL])):
        raise UserError(f"The kernel's resize is wrong ({text}; {LIMIT64:.0e} is allowed): nothing was written.")
    return {"name": name, "result": "passed", "error": error, "text": f"{text}."}


def no_reader(family: "Family", why: str) -> Check:
    """Say so, and what stands in."""
    text = f"{why[0].upper()}{why[1:]}; tests/test_converters.py::{family.stand_in} stands in."
    return {"name": "an independent reader", "result": "no independent reader", "text": text}


@torch.no_grad()
def independent(plain: "Plain", file: Path, family: "Family") -> Check:
    """(3) The file read without us gives what our plain ViT gives, at its own patch size."""
    if family.reader is None:
        return no_reader(family, f"no installed library reads files of {family.title}")
    reader = {"timm": read_by_timm, "transformers": read_by_transformers}[family.reader]
    ours = plain.build()
    size = (ours.patch_embed.proj.in_channels, *ours.patch_embed.img_size)
    x = shipped(size, {**ours.pretrained_cfg, **plain.data}, count=1)
    try:
        theirs = reader(plain, file, size, x)
    except REFUSALS as refused:
        reason = (str(refused).strip().splitlines() or [type(refused).__name__])[0][:160]
        return no_reader(family, f"{family.reader} cannot read this file ({reason})")
    tokens, final = tokens_after(ours, x, len(ours.blocks))
    own = {"tokens": tokens, "final": final, "pooled": ours.forward_head(final, pre_logits=True), "output": ours(x)}
    gap = max(difference(own[name], output) for name, output in theirs.items())
    kinds = ", ".join(theirs)
    text = f"{kinds} of the plain ViT at {x.shape[-1]} px, as {family.reader} reads it, against ours: {gap:.1e}"
    if not gap <= LIMIT:
        raise UserError(f"{family.reader} reads {file} otherwise ({text}; {LIMIT:.0e} allowed): nothing was written.")
    return {
        "name": "an independent reader",
        "result": "passed",
        "float32": gap,
        "text": f"{text[0].upper()}{text[1:]}.",
    }


def read_by_timm(plain: "Plain", file: Path, size: tuple[int, ...], x: Tensor) -> dict[str, Tensor]:
    """By timm's own loader, strictly: all tensors, or those that are not known to be of pre-training alone."""
    name, eps = plain.name.split(".")[0], plain.arguments.get("norm_eps")
    arguments = {key: value for key, value in plain.arguments.items() if key != "norm_eps"}

    def load(state: State) -> Any:
        net = on_meta(timm.create_model, name, **arguments)
        own_filter = sys.modules[type(net).__module__].checkpoint_filter_fn
        more = {"adapt_layer_scale": True} if name.startswith("deit") else {}  # as timm's deit module has it
        net.load_state_dict = partial(net.load_state_dict, assign=True)
        cfg = {**net.pretrained_cfg, "state_dict": state, "num_classes": net.num_classes, "input_size": size}
        load_pretrained(net, cfg, net.num_classes, size[0], partial(own_filter, **more))
        return materialize(net).eval().float()

    try:
        net = load(dict(plain.raw))
    except RuntimeError:
        net = load({name: tensor for name, tensor in plain.raw.items() if not re.fullmatch(PRETRAINING, name)})
    set_eps(net, eps)
    return {"output": net(x)}


def read_by_transformers(plain: "Plain", file: Path, size: tuple[int, ...], x: Tensor) -> dict[str, Tensor]:
    """By the classes that config.json beside the file names: tokens, final norm or pooler, and logits."""
    import transformers

    folder = file if file.is_dir() else file.parent
    config = transformers.AutoConfig.from_pretrained(folder)
    kind, more = config.model_type, {}
    if kind == "vit_mae":  # all patches, in order
        config.mask_ratio = 0.0
        side = plain.state[KERNEL].shape[-1]
        more = {"noise": torch.arange((size[1] // side) * (size[2] // side))[None].float()}

    def load(name: str) -> Any:
        with quiet(transformers.logging):
            net, found = getattr(transformers, name).from_pretrained(
                folder,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **({"config": config} if kind == "vit_mae" else {}),
            )
        ignored = ("pooler.dense" if "fc_norm.weight" in plain.state else "pooler", "decoder")
        if missing := [name for name in found["missing_keys"] if not any(word in name for word in ignored)]:
            raise KeyError(f"{', '.join(sorted(missing)[:3])} missing")
        return net.eval()

    said = load("CLIPVisionModel" if kind.startswith("clip") else "AutoModel")(
        pixel_values=x, output_hidden_states=True, **more
    )
    outputs = {"tokens": said.hidden_states[-1]}
    if kind in ("beit", "clip", "clip_vision_model"):  # these have their last norm after pooling
        if "fc_norm.weight" in plain.state or ("norm.weight" in plain.state and kind != "beit"):
            outputs["pooled"] = said.pooler_output
    else:
        outputs["final"] = said.last_hidden_state
    if plain.arguments["num_classes"]:
        if kind.startswith("clip"):
            outputs["output"] = load("CLIPVisionModelWithProjection")(pixel_values=x).image_embeds
        else:
            outputs["output"] = load(config.architectures[0])(pixel_values=x).logits
    return outputs


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """transformers without its bar and its table of names."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@torch.no_grad()
def read_back(folder: Path, plain: "Plain") -> Check:
    """What was written for timm, read by timm, is the plain ViT."""
    net, ours = written(folder), plain.build()
    x = shipped((net.patch_embed.proj.in_channels, *net.patch_embed.img_size), net.pretrained_cfg, count=1)
    error = difference(net(x), ours(x))
    eps = plain.arguments.get("norm_eps")
    note = f" (the norms' epsilon of {eps:g} becomes timm's own: its config.json cannot hold one)" if eps else ""
    text = f"Its output, read back by timm, against ours: {error:.1e}{note}"
    if not error <= LIMIT:
        raise UserError(f"What was written is not the plain ViT ({text}; {LIMIT:.0e} is allowed): nothing was kept.")
    return {"name": "the file as written", "result": "passed", "float32": error, "text": f"{text}."}
