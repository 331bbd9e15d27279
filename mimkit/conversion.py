"""From any released plain ViT to HPViT, and back: the engine, and its report.

file or name -> source family (named, then verified) -> the plain ViT's state under timm's names, and what travels with
it -> the target's layout -> strict load -> checks on the file as written (checks.py) -> report + safetensors.
"""

import difflib
import importlib
import json
import math
import pkgutil
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from timm.layers import to_2tuple
from timm.models._hub import download_cached_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor

from mimkit.checkpoint import (
    State,
    assemble,
    disown,
    load_strictly,
    misfits,
    on_meta,
    open_weights,
    read_json,
    read_weights,
    replacing,
    save_model,
)
from mimkit.checks import run_checks
from mimkit.errors import UserError
from mimkit.hub import place_of
from mimkit.kernels import KERNEL, resize_kernel, restore_kernel
from mimkit.models.hpvit import NAMED, PATCH, Pool, plain_vit
from mimkit.report import Report, Row, measure, sha256

DATA = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what travels with weights
OWN = ("hivit", "svit")  # families, and what the names of our networks begin with that they are read into
MODULES = ("vision_transformer", "deit", "beit", "eva", "vision_transformer_sam")  # of timm, with plain ViTs


# Families ------------------------------------------------------------------------------------------------------------


class Remap:
    """A file's tensors on their way to timm's names. A family calls its methods; what it leaves is an error.

    Args:
        state: the file's tensors.
        wanted: names that the plain ViT of timm has.
    """

    def __init__(self, state: State, wanted: set[str]):
        self.left, self.wanted = dict(state), wanted
        self.found: State = {}
        self.rows: list[Row] = []

    def take(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        """Tensors whose whole name matches, taken out of what is left."""
        matches = [match for name in self.left if (match := re.fullmatch(pattern, name))]
        return [(match, self.left.pop(match[0])) for match in matches]

    def put(self, action: str, origins: tuple[str, ...], target: str, tensor: Tensor, why: str = "") -> None:
        """A tensor under its name in timm."""
        if target in self.found:
            raise UserError(f"{', '.join(origins)}: {target} is there already, so this file holds two networks.")
        self.found[target] = tensor
        self.rows.append(Row(action, origins, target, why))

    def rename(self, pattern: str, to: str, change: Callable[[Tensor], Tensor] | None = None, why: str = "") -> None:
        """One to one, e.g. r"layer\\.(\\d+)\\.(.*)" to r"blocks.\\1.\\2"."""
        for match, tensor in self.take(pattern):
            target = match.expand(to)
            action = "copied" if target == match[0] and change is None else "renamed"
            self.put(action, (match[0],), target, change(tensor) if change else tensor, why)

    def rename_all(self, table: Mapping[str, str]) -> None:
        """Several of them, in order."""
        for pattern, to in table.items():
            self.rename(pattern, to)

    def fuse(self, pattern: str, to: str, parts: tuple[str, ...]) -> None:
        """Several to one, along the first axis; the pattern's group `part` names which of the parts a tensor is."""
        groups: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for match, tensor in self.take(pattern):
            groups.setdefault(match.expand(to), {})[match["part"]] = (match[0], tensor)
        for target, group in groups.items():
            if missing := set(parts) - group.keys():
                raise UserError(f"{target} has no {', '.join(sorted(missing))} in this file: it is not complete.")
            names, tensors = zip(*(group[part] for part in parts), strict=True)
            self.put("renamed", names, target, torch.cat(tensors), f"{', '.join(parts)} fused")

    def drop(self, pattern: str, why: str) -> None:
        """Not of the plain ViT."""
        self.rows.extend(Row("dropped", (match[0],), None, why) for match, _ in self.take(pattern))

    def skip(self, name: str, why: str) -> None:
        """The same for one that was taken."""
        self.rows.append(Row("dropped", (name,), None, why))

    def split(self, name: str, parts: Mapping[str, Tensor], why: str) -> None:
        """One that was taken, to several."""
        self.found |= parts
        self.rows.append(Row("renamed", (name,), ", ".join(parts), why))

    def make(self, target: str, tensor: Tensor, why: str) -> None:
        """Not of the file."""
        self.put("fresh", (), target, tensor, why)


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints. Each module of mimkit.converters holds one as FAMILY; its name is the module's.

    Args:
        title: where such files come from.
        marks: patterns, each of which is the whole name of some tensor in every file of the family.
        remap: puts a file's tensors under timm's names.
        options: what no tensor tells, from the state and a config.json beside it -> arguments of `plain_vit`. For a
            family in OWN, from the state under our names -> arguments of our network.
        data: mean, std and the like, where all of the family share them.
        reader: of the file without us: 'timm', 'transformers', or None.
        stand_in: the parity test in tests/test_converters.py that takes the reader's place where there is none.
        aliases: short names of released networks -> names in timm.
    """

    title: str
    marks: tuple[str, ...]
    remap: Callable[[Remap], None]
    options: Callable[[State, dict[str, Any]], dict[str, Any]] = lambda state, config: {}
    data: Mapping[str, Any] = field(default_factory=dict)
    reader: str | None = "timm"
    stand_in: str = "test_own_layouts"
    aliases: Mapping[str, str] = field(default_factory=dict)

    def fits(self, state: State) -> bool:
        """Whether a file looks like one of the family's."""
        return all(any(re.fullmatch(mark, name) for name in state) for mark in self.marks)


@cache
def families() -> dict[str, Family]:
    """All of them, by name."""
    import mimkit.converters as package

    modules = {info.name: f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)}
    return {name: importlib.import_module(module).FAMILY for name, module in modules.items()}


def own_family(name: str) -> str | None:
    """The family whose files become a network of ours of this name; None for a plain ViT or a pyramid."""
    return next((layout for layout in OWN if name.startswith(f"{layout}_")), None)


def own_names() -> list[str]:
    """Our networks that files of their own are read into."""
    return timm.list_models([f"{layout}_*" for layout in OWN])


@cache
def plain_vits() -> list[str]:
    """Names in timm."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


class Origin(NamedTuple):
    """Where a conversion starts."""

    name: str  # in timm, with its tag
    layout: str | None  # the family of an alias' original files
    folder: Path | None  # in timm's hub layout, if that is what was named
    config: dict[str, Any]  # its config.json


def find(source: str) -> Origin:
    """An alias, a name of timm, or a folder in timm's hub layout."""
    folder = place_of(source)
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


# The plain ViT of a file ---------------------------------------------------------------------------------------------


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


def fit(name: str, found: State, given: dict[str, Any], origin: Path) -> dict[str, Any]:
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
    arguments = fit(name, remap.found, given, file)
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


# Conversion ----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is to be written: a network on the meta device, and its weights."""

    net: Any
    state: State
    rows: list[Row]
    data: dict[str, Any]


def as_pyramid(plain: Plain, to: str, options: dict[str, Any]) -> Target:
    """The plain ViT's weights in an HPViT."""
    net = on_meta(timm.create_model, to, source=plain.name, source_args=plain.arguments, **options)
    rows = list(plain.rows)
    side = plain.state[KERNEL].shape[-1]
    if side != PATCH:
        at = next(i for i, row in enumerate(rows) if row.target == KERNEL)
        rows[at] = Row("resized", rows[at].origins, KERNEL, f"kernel {side} -> {PATCH} px by the pseudo-inverse")
    starts = {f"pools.{i}.weight": pool.start() for i, pool in enumerate(net.pools) if isinstance(pool, Pool)}
    rows += [Row("fresh", (), name, "a pool, at its start") for name in starts]
    state = plain.state | {KERNEL: resize_kernel(plain.state[KERNEL], PATCH)} | starts
    return Target(net, state, rows, plain.data)


def as_timm(plain: Plain) -> Target:
    """The plain ViT itself. timm's config.json cannot hold an epsilon: its own then stands for the file's."""
    arguments = {key: value for key, value in plain.arguments.items() if key != "norm_eps"}
    net = on_meta(timm.create_model, plain.name, **arguments)
    if "." not in plain.name:  # timm then means its default weights
        disown(net)
    net.pretrained_cfg["input_size"] = (net.patch_embed.proj.in_channels, *net.patch_embed.img_size)
    return Target(net, plain.state, plain.rows, plain.data)


def as_own(to: str, file: Path, which: str | None = None, img_size: Any = None, **given: Any) -> tuple[Target, str]:
    """A file of HiViT or SViT in ours, and which of the states in it was taken.

    Args:
        img_size: what it was trained at, where its tensors do not tell: an SViT, or a HiViT that is not square.
        given: arguments of the network.
    """
    layout = own_family(to)
    assert layout is not None
    remap, _, taken = read_family(file, layout, which, lambda state: set())
    found = remap.found
    options = {"img_size": img_size or 224, **families()[layout].options(found, {}), **given}
    net = on_meta(timm.create_model, to, **options)
    load_strictly(net, found, file, assign=True)
    net.pretrained_cfg["input_size"] = (net.in_chans, *to_2tuple(options["img_size"]))
    return Target(net, found, remap.rows, {}), taken


def convert(
    source: str,
    to: str = "hpvit",
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    layout: str | None = None,
    weights: str | None = None,
    source_args: dict[str, Any] | None = None,
    checks: bool = True,
    dry_run: bool = False,
    **options: Any,
) -> Report:
    """Convert a checkpoint and write it in timm's hub layout, with its report.

    Args:
        source: alias, name in timm, or folder of a timm model (a run's encoder/, or a converted HPViT).
        to: hpvit, hpvit_s, hpvit_b, hpvit_l, hpvit_h, a hivit_* or svit_*, or timm (the plain ViT).
        out: directory to write.
        checkpoint: file or folder of weights; the published ones by default.
        layout: the family of the checkpoint.
        weights: which of the states in it.
        source_args: of the source's network, where the name does not say.
        checks: run them; without them report and config.json say NOT CHECKED.
        dry_run: do all of it but leave no files.
        options: HPViT's.
    """
    origin = find(source)
    targets = ["timm", "hpvit", *NAMED, *own_names()]
    if to not in targets:
        raise UserError(f"--to {to} is unknown: choose among {', '.join(targets)}.")
    if not dry_run:
        check_place(out)
    pyramid = origin.name.startswith("hpvit")
    if pyramid and (checkpoint or layout or weights or source_args):
        raise UserError(f"--from {source} is an HPViT and says all of itself: leave all options but --to and --out.")
    if reserved := {"kernel", "any_grid", "source"} & (source_args or {}).keys():
        raise UserError(f"--source-args: {', '.join(sorted(reserved))} follow from --from: name another network there.")
    layout = layout or origin.layout or "timm"
    if checkpoint or origin.folder:
        file = place_of(checkpoint or str(origin.folder))
    else:
        file, layout = published(origin.name), "timm"
    if layout not in families():
        raise UserError(f"--layout {layout} is unknown: choose among {', '.join(families())}.")
    own = own_family(to)
    if own != (layout if layout in OWN else None):
        raise UserError(f"A checkpoint of {layout} does not become {to}: {' and '.join(OWN)} are read from their own.")
    if own and origin.name != to:
        raise UserError(f"--from {origin.name} does not become {to}: give both the same name.")
    if options and not to.startswith("hpvit"):
        raise UserError(f"--to {to} takes no {', '.join(options)}: these are options of an HPViT.")

    plain: Plain | None = None
    if own:
        if strange := ", ".join((source_args or {}).keys() - {"img_size"}):
            raise UserError(f"--source-args has {strange}: a file of {own} says that itself; only img_size is taken.")
        target, taken = as_own(to, file, weights, **(source_args or {}))
    else:
        if pyramid:
            plain = from_pyramid(origin, file)
        else:
            given = {**(origin.config.get("model_args") or {}), **(source_args or {})}
            plain = read_plain(origin.name, file, layout, weights, given)
        target, taken = as_timm(plain) if to == "timm" else as_pyramid(plain, to, options), plain.taken
    name = plain.name.split(".")[0] if plain and to == "timm" else to
    sizes = {}
    if pyramid:
        net = on_meta(timm.create_model, f"local-dir:{file}")
        sizes[origin.name] = measure(net, net.pretrained_cfg["input_size"])
    elif plain and to != "timm":
        net = on_meta(plain_vit, plain.name, **plain.arguments)
        sizes[plain.name] = measure(net, (net.patch_embed.proj.in_channels, *net.patch_embed.img_size))
    sizes[name] = measure(target.net, target.net.pretrained_cfg["input_size"])
    report = Report(source, str(file), sha256(file), layout, taken, name, target.rows, sizes, None)
    size = target.net.pretrained_cfg["input_size"]
    known = {**target.net.pretrained_cfg, **target.data, **(origin.config.get("pretrained_cfg") or {})}
    kept = {key: known[key] for key in DATA if key in known}
    with tempfile.TemporaryDirectory() if dry_run else replacing(str(out)) as temporary:
        folder = Path(temporary)
        save_model(assemble(target.net, target.state), folder, input_size=size, **kept)
        del target
        if checks:
            report.checks = run_checks(folder, to, plain, file, families()[layout])
        config = read_json(folder / "config.json")
        note = {"source": source, "file": str(file), "sha256": report.sha256, "written": sha256(folder)}
        config["mimkit"] = {**note, "checks": report.checks or "NOT CHECKED"}
        if to == "timm":  # it stands in pretrained_cfg too, and transformers' wrapper of timm does not take it twice
            config["model_args"].pop("num_classes", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        report.save(folder)
    return report


def check_place(out: str | Path | None) -> None:
    """Refuse to replace what is not a converted one."""
    if out is None:
        raise UserError("Nowhere to write: pass --out DIR, or --dry-run.")
    folder = Path(out)
    there = folder.is_symlink() or folder.exists()
    if there and not ((folder / "report.json").exists() or (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"--out {out} is there and is no conversion: choose another directory.")
    if folder.resolve() == Path.cwd() or folder.is_symlink():
        raise UserError(f"--out {out} cannot be replaced as a whole: choose a directory of its own.")
