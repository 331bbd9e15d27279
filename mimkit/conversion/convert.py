"""From any released plain ViT to HPViT, and back: the engine, and its report.

file or name -> source family (named, then verified) -> the plain ViT's state under timm's names, and what travels with
it -> the target's layout -> strict load -> checks on the file as written (checks.py) -> report + safetensors.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.layers import to_2tuple

from mimkit.conversion.family import OWN, families, own_family, own_names
from mimkit.conversion.report import Report, Row, measure, sha256
from mimkit.conversion.source import DATA, Plain, find_source, from_pyramid, published, read_family, read_plain
from mimkit.conversion.verify import run_checks
from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import State, assemble, disown, load_strictly, on_meta, save_model
from mimkit.models.hpvit import NAMED, PATCH, Pool, plain_vit
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel


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
    origin = find_source(source)
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
        file = local_path(checkpoint or str(origin.folder))
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
