"""Find and read the checkpoint to convert."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from timm.models._hub import download_cached_file
from timm.models.beit import Beit
from timm.models.eva import Eva

from mimkit.conversion.family import Remap, families, own_family, own_names, plain_vits
from mimkit.conversion.report import Row, sha256
from mimkit.errors import UserError
from mimkit.files import read_json
from mimkit.io.hub import local_path
from mimkit.io.weights import State, assemble, misfits, on_meta, open_weights, read_weights
from mimkit.models.hpvit import PATCH, plain_vit
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel, restore_kernel

DATA = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what travels with weights


class Origin(NamedTuple):
    """Where a conversion starts."""

    name: str  # in timm, with its tag
    layout: str | None  # the family of an alias' original files
    folder: Path | None  # in timm's hub layout, if that is what was named
    config: dict[str, Any]  # its config.json


def find_source(source: str) -> Origin:
    """An alias, a name of timm, or a folder in timm's hub layout."""
    folder = local_path(source)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        name = config.get("architecture")
        if not isinstance(name, str) or not timm.is_model(name):
            raise UserError(
                f"--from {source} is not a folder of timm, whose config.json names an architecture: name the network "
                "with --from and pass the folder with --checkpoint FOLDER --layout hf."
            )
        tag = (config.get("pretrained_cfg") or {}).get("tag")
        name = f"{name}.{tag}" if tag and timm.get_pretrained_cfg(f"{name}.{tag}") else name
        return Origin(name, own_family(name) or "timm", folder, config)
    for layout, family in families().items():
        if source in family.aliases:
            return Origin(family.aliases[source], layout, None, {})
    name = source.split(".")[0]
    if name in plain_vits() or name in own_names():
        known = timm.list_models(f"{name}.*", pretrained=True)
        if "." in source and source not in known:
            raise UserError(f"--from {source}: timm has no such tag of {name}; it has {', '.join(known) or 'none'}.")
        return Origin(source, own_family(name), None, {})
    aliases = [alias for family in families().values() for alias in family.aliases]
    near = difflib.get_close_matches(source, [*aliases, *own_names(), *plain_vits()], 3, 0.3)
    raise UserError(f"--from {source} is no alias, plain ViT of timm or folder: try {', '.join(near)}, or --list.")


def published(name: str) -> Path:
    """Fetch the weights, in timm's layout, that a name of timm stands for -> the cached file."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise UserError(f"No weights are published for {name}: pass --checkpoint FILE --layout FAMILY, or name a tag.")
    huggingface_hub.utils.logging.set_verbosity_error()  # it says every retry
    where = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else cfg.url
    try:
        if cfg.hf_hub_id:
            return Path(huggingface_hub.hf_hub_download(cfg.hf_hub_id, "model.safetensors"))
        return Path(download_cached_file(str(cfg.url), progress=True))
    except Exception as error:  # requests, urllib and huggingface_hub raise dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"The weights of {name} cannot be fetched ({type(error).__name__}: {reason}): download {where} elsewhere "
            "and pass it with --checkpoint FILE --layout timm."
        ) from error


@dataclass
class Plain:
    """A plain ViT's state under timm's names, and what it takes to build it."""

    name: str
    arguments: dict[str, Any]  # of plain_vit
    state: State
    rows: list[Row]
    data: dict[str, Any] = field(default_factory=dict)  # mean, std, interpolation, where the file says
    raw: State = field(default_factory=dict)  # the same tensors under the file's names, for its reader
    taken: str = ""  # which of the states in the file
    pyramid: bool = False  # whether it was taken out of an HPViT

    def build(self, kernel: int | None = None, any_grid: bool = False) -> Any:
        """The network with these weights, by timm's own code; its kernel at another size if one is given."""
        net = on_meta(plain_vit, self.name, kernel, any_grid, **self.arguments)
        resized = resize_kernel(self.state[KERNEL], net.patch_embed.patch_size[0])
        return assemble(net, self.state | {KERNEL: resized}).eval()


def fit_source_args(name: str, found: State, given: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Arguments with which timm's network of this name has the shape of the state found."""
    net = on_meta(plain_vit, name, **given)
    own = net.state_dict()
    if KERNEL not in found or found[KERNEL].ndim != 4:
        raise UserError(f"{origin} has no patch embedding, so it is no plain ViT: check --checkpoint and --layout.")
    width, in_chans, side = found[KERNEL].shape[:3]
    blocks = 1 + max((int(n.split(".")[1]) for n in found if re.match(r"blocks\.\d+\.", n)), default=-1)
    patch = net.patch_embed.patch_size[0]
    if (width, blocks, side) != (net.embed_dim, len(net.blocks), patch):
        raise UserError(
            f"{origin} holds a ViT {width} wide with {blocks} blocks and patches of {side} px, but {name} is "
            f"{net.embed_dim} wide with {len(net.blocks)} and {patch} px: give --from another name."
        )
    arguments = dict(given)
    if in_chans != net.patch_embed.proj.in_channels:
        arguments["in_chans"] = in_chans
    head = "head.fc.weight" if "head.fc.weight" in own else "head.weight"
    arguments["num_classes"] = len(found[head]) if head in found else 0
    pooled = "fc_norm.weight" in found
    if pooled != ("fc_norm.weight" in own) and (pooled or "norm.weight" in found):
        arguments["use_fc_norm" if isinstance(net, Beit | Eva) else "fc_norm"] = pooled
        if pooled:
            arguments["global_pool"] = "avg"
    if isinstance(net, Beit) and "use_rel_pos_bias" not in given:
        arguments["use_shared_rel_pos_bias"] = "rel_pos_bias.relative_position_bias_table" in found
        arguments["use_rel_pos_bias"] = any("attn.relative_position_bias_table" in name for name in found)
    cells = _cells(net, found)
    if cells and cells != math.prod(net.patch_embed.grid_size):
        if math.isqrt(cells) ** 2 != cells:
            raise UserError(f"{origin} has {cells} positions, which is no square grid: check --from.")
        arguments["img_size"] = math.isqrt(cells) * patch
    return arguments


def _cells(net: Any, found: State) -> int:
    """Tokens of the grid that the position tables are for; 0 if there are none."""
    for name, tensor in found.items():
        if name == "pos_embed":
            if tensor.ndim != 3:
                return tensor.shape[1] * tensor.shape[2] if tensor.ndim == 4 else 0
            return tensor.shape[1] - (0 if getattr(net, "no_embed_class", False) else net.num_prefix_tokens)
        if name.endswith("relative_position_bias_table"):  # (2 side - 1)^2 + 3 rows
            return ((math.isqrt(len(tensor) - 3) + 1) // 2) ** 2
    return 0


class Content(NamedTuple):
    """A file of a family, taken apart."""

    remap: Remap
    raw: State  # under the file's names
    taken: str  # which of the states in it


def read_family(file: Path, layout: str, which: str | None, wanted: Callable[[State], set[str]]) -> Content:
    """Verify a file's family and put its tensors under timm's names, every one accounted for."""
    family = families()[layout]
    raw, taken = open_weights(file, which)
    if not family.fits(raw):
        others = [other for other, candidate in families().items() if candidate.fits(raw)]
        hint = f"it looks like {' or '.join(others)}: pass --layout" if others else "no family knows it"
        raise UserError(f"{file} is not in the layout {layout} ({family.title}); {hint}.")
    remap = Remap(raw, wanted(raw))
    family.remap(remap)
    if remap.left:
        names = ", ".join(sorted(remap.left))
        raise UserError(f"{file} has {len(remap.left)} tensors that {layout} does not explain: {names}.")
    for key, tensor in remap.found.items():
        if key.endswith(".num_batches_tracked"):
            continue
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"{file}: {key} is {tensor.layout}, {tensor.dtype}, not plain numbers: check the file.")
        remap.found[key] = tensor.float().contiguous()
    broken = [key for key, tensor in remap.found.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{file} has NaN or infinite values in {', '.join(broken[:5])}: get another copy of it.")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in raw.values()} - {"float32", "int64"}
    notes = [taken, *(f"{kind} made float32" for kind in sorted(kinds))]
    return Content(remap, raw, ", ".join(note for note in notes if note))


def read_plain(
    name: str, file: Path, layout: str, which: str | None = None, given: dict[str, Any] | None = None
) -> Plain:
    """A file of a family -> the plain ViT in it."""
    family, (config, data) = families()[layout], _beside(file)
    given = dict(given or {})

    def wanted(state: State) -> set[str]:
        given.update({key: value for key, value in family.options(state, config).items() if key not in given})
        return set(on_meta(plain_vit, name, **given).state_dict())

    remap, raw, taken = read_family(file, layout, which, wanted)
    arguments = fit_source_args(name, remap.found, given, file)
    own = on_meta(plain_vit, name, **arguments).state_dict()
    missing, unexpected, misshapen = misfits(own, remap.found)
    problems = [f"{key} is missing" for key in missing] + [f"{key} is not of {name}" for key in unexpected]
    shapes = {key: (tuple(remap.found[key].shape), tuple(own[key].shape)) for key in misshapen}
    problems += [f"{key} is {theirs} instead of {ours}" for key, (theirs, ours) in shapes.items()]
    if problems:
        raise UserError(f"{file} does not fit {name}: {'; '.join(problems)}; check --from and --layout.")
    raw = raw if family.reader == "timm" else {}
    return Plain(name, arguments, remap.found, remap.rows, {**family.data, **data}, raw, taken)


def _beside(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of transformers beside a file, and what its preprocessor says of images."""
    folder = file if file.is_dir() else file.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    data: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        said = read_json(folder / "preprocessor_config.json")
        kinds = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
        data = {"mean": said.get("image_mean"), "std": said.get("image_std")}
        data = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == 3}
        data["interpolation"] = kinds.get(said.get("resample", 3), "bicubic")
    return config if "model_type" in config else {}, data


def from_pyramid(origin: Origin, folder: Path) -> Plain:
    """An HPViT that is as it was converted -> the plain ViT it came from."""
    note, arguments = origin.config.get("mimkit") or {}, origin.config.get("model_args") or {}
    if note.get("written") != sha256(folder):
        raise UserError(
            f"{folder} was trained or changed after its conversion, or never converted: only what a conversion wrote "
            "goes back to the plain ViT."
        )
    state = read_weights(folder)
    pools = [key for key in state if key.startswith("pools.")]
    rows = [Row("dropped", (key,), None, "a pool, as it started") for key in pools]
    rows += [Row("copied", (key,), key) for key in state if key not in (*pools, KERNEL)]
    name, given = arguments["source"], arguments.get("source_args") or {}
    side = on_meta(plain_vit, name, **given).patch_embed.patch_size[0]
    why = f"kernel {PATCH} -> {side} px, by the transpose of the resize" if side != PATCH else ""
    rows.append(Row("resized" if why else "copied", (KERNEL,), KERNEL, why))
    state[KERNEL] = restore_kernel(state[KERNEL], side)
    return Plain(name, given, {key: state[key] for key in state if key not in pools}, rows, pyramid=True)
