"""The checks of a conversion. They use the real weights and the written file, read back from disk."""

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from timm.models import load_pretrained
from torch import Tensor

from mimkit.errors import UserError
from mimkit.io.weights import State, assemble, materialize, on_meta, read_weights
from mimkit.models.hpvit import PATCH, SIDE, HPViT, unfold
from mimkit.models.layers.norm import set_eps
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel, resize_matrix
from mimkit.sample import load_images
from mimkit.units import serialize, unit_grid

if TYPE_CHECKING:
    from mimkit.conversion.family import Family
    from mimkit.conversion.source import Plain

# Relative differences: the largest one allowed in float32, the one above which float32 is checked again in float64, and
# the largest one allowed in float64
LIMIT, DOUBT, LIMIT64 = 1e-4, 1e-5, 1e-9
IMAGES, SIMILARITY_IMAGES = 2, 8  # sample images for checks of equality and of similarity
TOKENS = 2_000  # tokens that CKA compares at most

# What timm and transformers raise for a file that they cannot read
READER_ERRORS = (RuntimeError, LookupError, ValueError, TypeError, AssertionError, AttributeError, ImportError, OSError)
PRETRAINING = r"(decoder|(dino|ibot)_head|lm_head|predictor)[._].*|head\.(mlp|last_layer)\..*|.*mask_token"

Check = dict[str, Any]  # name, result and text, and the figures by name


def run_checks(
    folder: Path, to: str, plain: "Plain | None", file: Path, family: "Family", before: list[Tensor]
) -> list[Check]:
    """Run all checks that apply to a conversion.

    Args:
        folder: what the conversion wrote.
        to: name of the target.
        plain: the plain ViT that was read; None for a network of our own.
        file: the source checkpoint.
        family: the source checkpoint's family.
        before: `own_outputs` of a network of our own before it was written.

    Raises:
        UserError: a check failed.
    """
    if plain is None:
        return [no_reader(family, "no other library has this network"), check_own(folder, before)]
    if plain.pyramid:  # the source file is an HPViT, which must equal the plain ViT too
        checks = [check_pyramid(file, plain) | {"name": "the pyramid that was read is the plain ViT"}]
    else:
        checks = [check_reader(plain, file, family)]
    if to == "timm":
        return [*checks, check_plain(folder, plain)]
    return [*checks, *([] if plain.pyramid else [check_kernel(folder, plain)]), check_pyramid(folder, plain)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Compute the largest absolute difference, relative to the largest value of `theirs`.

    It is infinite if either tensor has values that are not finite.
    """
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny))
    return gap if math.isfinite(gap) else math.inf


def sample_input(size: tuple[int, ...], data_config: dict[str, Any], count: int = IMAGES) -> Tensor:
    """Return images of the packaged sample dataset as a network's input (b c H W).

    Images are resized to cover the input (bicubic), center-cropped and normalized.

    Args:
        size: input size (c H W).
        data_config: `mean` and `std`. Where they do not fit the channels, 0.5 is used.
        count: number of images.
    """
    in_chans, height, width = size
    side = max(height, width)  # the sample images are square
    left, top = round((side - width) / 2), round((side - height) / 2)
    images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in load_images(count)]
    pixels = np.stack([np.asarray(image.crop((left, top, left + width, top + height))) for image in images])
    mean, std = (
        torch.tensor(data_config[name] if len(data_config[name]) == in_chans else [0.5] * in_chans)[:, None, None]
        for name in ("mean", "std")
    )
    return repeat(torch.from_numpy(pixels), "b h w -> b c h w", c=in_chans).float().div_(255).sub_(mean).div_(std)


def load_written(folder: Path) -> Any:
    """Build the network in a folder as timm does, with its weights mapped from disk instead of copied."""
    return assemble(on_meta(timm.create_model, f"local-dir:{folder}"), read_weights(folder)).eval()


@torch.no_grad()
def tokens_after(net: Any, x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the tokens (b k+n d) of a plain ViT after its first `blocks` blocks, and its final output."""
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
    """Let a network compute in float64, one part at a time: all parts at once would take twice the memory."""
    children = [child for name, child in net.named_children() if name not in ("blocks", "pools", "patch_embed")]
    parts = [*children, *net.blocks, *getattr(net, "pools", []), *net.patch_embed.children()]
    hooks = [part.register_forward_pre_hook(lambda module, args: module.double() and None) for part in parts]
    hooks += [part.register_forward_hook(lambda module, args, output: module.float() and None) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The pyramid equals the plain ViT ------------------------------------------------------------------------------------


def why_inexact(pyramid: HPViT) -> str:
    """Return the reason why an HPViT with these options does not equal its source, or "" if it does."""
    pools = [pool for pool in pyramid.pools[:2] if getattr(pool, "share", 0.0) != 1.0]
    if pyramid.attention != "subgrid":
        return "attention is local"
    if pools:
        return "the pools do not start as one tap"
    if pyramid.num_prefix_tokens != getattr(pyramid.source, "num_prefix_tokens", 0):
        return "the prefix tokens are dropped"
    if len(pyramid.global_blocks) < len(pyramid.blocks) and pyramid.window < max(pyramid.grid):
        return "the attention windows are smaller than the grid"
    return ""


@torch.no_grad()
def check_pyramid(folder: Path, plain: "Plain") -> Check:
    """Check that a pyramid equals the plain ViT whose kernel has 16 px.

    Compares the tokens at the end of stage 3 and, if stage 4 has no blocks, the final output and the logits. If the
    options do not let the pyramid start as its source, measures the similarity of their features instead.
    """
    pyramid = load_written(folder)
    source = plain.build(PATCH, any_grid=True)
    reason = why_inexact(pyramid)
    count = SIMILARITY_IMAGES if reason else IMAGES
    images = sample_input(pyramid.pretrained_cfg["input_size"], pyramid.pretrained_cfg, count)
    if reason:
        cka = stage_similarity(pyramid, source, images)
        figures = ", ".join(f"stage {stage} {value:.3f}" for stage, value in cka.items())
        text = (
            f"Not an exact copy, because {reason}. Linear CKA of each stage's features with the source's features at "
            f"the same depth: {figures}."
        )
        return {"name": "the pyramid is the plain ViT", "result": "not applicable", "text": text, "cka": cka}

    def compare(x: Tensor) -> list[float]:
        tokens, grid = pyramid.stages(x, 2)[-1]
        theirs, final = tokens_after(source, x, sum(pyramid.depths[:3]))
        gaps = [difference(tokens, theirs)]
        if not pyramid.depths[3]:
            ours = pyramid.leave(tokens, grid)
            gaps.append(difference(ours, final))
            if pyramid.num_classes:
                gaps.append(difference(pyramid.forward_head(ours), source.forward_head(final)))
        return gaps

    gaps = [max(values) for values in zip(*(compare(x[None]) for x in images), strict=True)]
    worst = max(gaps)
    names = ("end of stage 3", "final output", "logits")
    text = ", ".join(f"{name} {gap:.1e}" for name, gap in zip(names[: len(gaps)], gaps, strict=True))
    text = f"Relative difference in float32 on {len(images)} images of {images.shape[-2]}x{images.shape[-1]} px: {text}"
    check = {"name": "the pyramid is the plain ViT", "result": "passed", "float32": worst}
    if not worst <= LIMIT:
        raise UserError(f"The pyramid differs from the plain ViT ({text}; limit {LIMIT:.0e}). Nothing was written.")
    if worst > DOUBT:
        with in_float64(pyramid), in_float64(source):
            again = max(compare(images[:1].double()))
        if not again <= LIMIT64:
            raise UserError(
                f"The pyramid differs from the plain ViT ({text}; in float64 {again:.1e}, limit {LIMIT64:.0e}). "
                "Nothing was written."
            )
        check["float64"] = again
        text += f"; in float64 {again:.1e}"
    return {**check, "text": f"{text}."}


@torch.no_grad()
def stage_similarity(pyramid: HPViT, source: Any, images: Tensor) -> dict[int, float]:
    """Compute the linear CKA of each stage's map with the source's tokens at the same depth.

    Both maps are averaged to the coarser of the two grids.
    """
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
    similarity = {}
    for stage, pairs in features.items():
        a, b = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        step = -(-len(a) // TOKENS)
        similarity[stage] = linear_cka(a[::step], b[::step])
    return similarity


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Compute the linear CKA, a similarity of two sets of features (n d).

    It is 1 if one set is a rotated and scaled copy of the other, and 0 on average for independent sets (Kornblith et
    al., ICML 2019, with the unbiased HSIC of Song et al., JMLR 2012).
    """

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        rows = k.sum(0) @ m.sum(0)
        return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))

    grams = [(x @ x.T).fill_diagonal_(0) for x in (a - a.mean(0), b - b.mean(0))]
    return float(hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt())


# The resized kernel --------------------------------------------------------------------------------------------------


def check_kernel(folder: Path, plain: "Plain") -> Check:
    """Check the resized patch embedding kernel.

    A resized patch times the resized kernel must equal the patch times the kernel, and the written kernel must be the
    resized one.
    """
    name, weight = "the kernel's resize", plain.state[KERNEL].double()
    side = weight.shape[-1]
    if side == PATCH:
        return {"name": name, "result": "not applicable", "text": f"The kernel already has {PATCH} px."}
    images = sample_input((weight.shape[1], 8 * side, 8 * side), {"mean": [], "std": []})
    patches = rearrange(images.double(), "b c (h p) (w q) -> (b h w) c (p q)", p=side, q=side)
    before = torch.einsum("n c p, d c p -> n d", patches, weight.flatten(2))
    resized = resize_kernel(weight, PATCH)
    after = torch.einsum("n c p, d c p -> n d", patches @ resize_matrix(side, PATCH).T, resized.flatten(2))
    error = difference(after, before)
    text = (
        f"Relative difference between resized patches times the kernel at {PATCH} px and patches times the kernel at "
        f"{side} px: {error:.1e}"
    )
    if side > PATCH:
        return {"name": name, "result": "shrunk", "error": error, "text": f"{text}. Shrinking a kernel is not exact."}
    if not error <= LIMIT64 or not torch.equal(read_weights(folder)[KERNEL], resized.to(plain.state[KERNEL])):
        raise UserError(f"The resized kernel is wrong ({text}; limit {LIMIT64:.0e}). Nothing was written.")
    return {"name": name, "result": "passed", "error": error, "text": f"{text}."}


# An independent reader -----------------------------------------------------------------------------------------------


def no_reader(family: "Family", reason: str) -> Check:
    """Report that no other library reads the file, and which parity test covers the family instead."""
    test = f"tests/conversion/test_converters.py::{family.parity_test}"
    text = f"{reason[0].upper()}{reason[1:]}. {test} covers this family instead."
    return {"name": "an independent reader", "result": "no independent reader", "text": text}


@torch.no_grad()
def check_reader(plain: "Plain", file: Path, family: "Family") -> Check:
    """Check that another library, which reads the file without our tables, computes the same as our plain ViT.

    Both networks use the file's own patch size.
    """
    if family.reader is None:
        return no_reader(family, f"no installed library reads files of {family.title}")
    reader = {"timm": read_by_timm, "transformers": read_by_transformers}[family.reader]
    ours = plain.build()
    size = (ours.patch_embed.proj.in_channels, *ours.patch_embed.img_size)
    x = sample_input(size, {**ours.pretrained_cfg, **plain.data}, count=1)
    try:
        theirs = reader(plain, file, size, x)
    except READER_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return no_reader(family, f"{family.reader} cannot read this file ({reason})")
    tokens, final = tokens_after(ours, x, len(ours.blocks))
    outputs = {"tokens": tokens, "final": final, "pooled": ours.forward_head(final, pre_logits=True), "output": ours(x)}
    gap = max(difference(outputs[name], output) for name, output in theirs.items())
    text = (
        f"Relative difference between our plain ViT and the one that {family.reader} reads from the file, at "
        f"{x.shape[-1]} px ({', '.join(theirs)}): {gap:.1e}"
    )
    if not gap <= LIMIT:
        raise UserError(f"{family.reader} reads {file} differently ({text}; limit {LIMIT:.0e}). Nothing was written.")
    return {"name": "an independent reader", "result": "passed", "float32": gap, "text": f"{text}."}


def read_by_timm(plain: "Plain", file: Path, size: tuple[int, ...], x: Tensor) -> dict[str, Tensor]:
    """Compute the output of a file's network, loaded strictly by timm's own loader.

    If timm does not take all tensors, those that are known to belong to pre-training only are left out.
    """
    name, eps = plain.name.split(".")[0], plain.arguments.get("norm_eps")
    arguments = {key: value for key, value in plain.arguments.items() if key != "norm_eps"}

    def load(state: State) -> Any:
        net = on_meta(timm.create_model, name, **arguments)
        own_filter = sys.modules[type(net).__module__].checkpoint_filter_fn
        options = {"adapt_layer_scale": True} if name.startswith("deit") else {}  # as in timm's deit module
        net.load_state_dict = partial(net.load_state_dict, assign=True)
        cfg = {**net.pretrained_cfg, "state_dict": state, "num_classes": net.num_classes, "input_size": size}
        load_pretrained(net, cfg, net.num_classes, size[0], partial(own_filter, **options))
        return materialize(net).eval().float()

    try:
        net = load(dict(plain.raw))
    except RuntimeError:
        net = load({name: tensor for name, tensor in plain.raw.items() if not re.fullmatch(PRETRAINING, name)})
    set_eps(net, eps)
    return {"output": net(x)}


def read_by_transformers(plain: "Plain", file: Path, size: tuple[int, ...], x: Tensor) -> dict[str, Tensor]:
    """Compute the outputs of a folder's network, loaded by the classes that its config.json names.

    These are the tokens, the output of the final norm or of the pooler, and the logits.
    """
    import transformers

    folder = file if file.is_dir() else file.parent
    config = transformers.AutoConfig.from_pretrained(folder)
    kind, noise = config.model_type, {}
    if kind == "vit_mae":  # keep all patches, in order
        config.mask_ratio = 0.0
        side = plain.state[KERNEL].shape[-1]
        noise = {"noise": torch.arange((size[1] // side) * (size[2] // side))[None].float()}

    def load(name: str) -> Any:
        with quiet(transformers.logging):
            net, info = getattr(transformers, name).from_pretrained(
                folder,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **({"config": config} if kind == "vit_mae" else {}),
            )
        ignored = ("pooler.dense" if "fc_norm.weight" in plain.state else "pooler", "decoder")
        if missing := [name for name in info["missing_keys"] if not any(word in name for word in ignored)]:
            raise KeyError(f"{', '.join(sorted(missing)[:3])} missing")
        return net.eval()

    net = load("CLIPVisionModel" if kind.startswith("clip") else "AutoModel")
    output = net(pixel_values=x, output_hidden_states=True, **noise)
    outputs = {"tokens": output.hidden_states[-1]}
    if kind in ("beit", "clip", "clip_vision_model"):  # these pool before their last norm
        if "fc_norm.weight" in plain.state or ("norm.weight" in plain.state and kind != "beit"):
            outputs["pooled"] = output.pooler_output
    else:
        outputs["final"] = output.last_hidden_state
    if plain.arguments["num_classes"]:
        if kind.startswith("clip"):
            outputs["output"] = load("CLIPVisionModelWithProjection")(pixel_values=x).image_embeds
        else:
            outputs["output"] = load(config.architectures[0])(pixel_values=x).logits
    return outputs


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Silence transformers' progress bar and its table of loaded names."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@torch.no_grad()
def check_plain(folder: Path, plain: "Plain") -> Check:
    """Check that a plain ViT written for timm, read back by timm, computes the same as the one that was read."""
    net, ours = load_written(folder), plain.build()
    x = sample_input((net.patch_embed.proj.in_channels, *net.patch_embed.img_size), net.pretrained_cfg, count=1)
    error = difference(net(x), ours(x))
    eps = plain.arguments.get("norm_eps")
    note = f" (timm's config.json cannot hold the norm epsilon {eps:g}, so timm's default is used)" if eps else ""
    text = f"Relative difference between the written network's output, read back by timm, and ours: {error:.1e}{note}"
    if not error <= LIMIT:
        raise UserError(
            f"The written network differs from the plain ViT ({text}; limit {LIMIT:.0e}). Nothing was written."
        )
    return {"name": "the file as written", "result": "passed", "float32": error, "text": f"{text}."}


# Networks of our own -------------------------------------------------------------------------------------------------


@torch.no_grad()
def own_outputs(net: Any) -> list[Tensor]:
    """Compute the outputs of a HiViT or SViT at its input size, and at a wider one, which resamples its tables.

    The network is changed to float64, because another norm epsilon would look like rounding in float32.
    """
    net.double().eval()
    in_chans, height, width = net.pretrained_cfg["input_size"]
    outputs = []
    for columns in (width, width + net.unit_size):
        x = sample_input((in_chans, height, columns), net.pretrained_cfg, count=1).double()
        outputs.append(net(x))
        if getattr(net, "unit_form", False):  # its last norm is on the output of `encode_units` alone
            grid = unit_grid(height, columns, net.unit_size)
            index = torch.arange(math.prod(grid))[None]
            outputs.append(net.encode_units(serialize(x, net.unit_size), index, grid))
    return outputs


def check_own(folder: Path, before: list[Tensor]) -> Check:
    """Check that a HiViT or SViT, read back by timm, computes what it computed before it was written."""
    after = own_outputs(load_written(folder))
    error = max(difference(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    text = (
        "Relative difference between the written network's outputs at two input sizes, read back by timm, and those "
        f"before writing, in float64: {error:.1e}"
    )
    if not error <= LIMIT64:
        raise UserError(f"The written network differs ({text}; limit {LIMIT64:.0e}). Nothing was written.")
    return {"name": "the file as written", "result": "passed", "float64": error, "text": f"{text}."}
