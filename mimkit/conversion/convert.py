"""Convert a released checkpoint: a plain ViT to HPViT or to timm's layout, and HiViT and SViT to ours.

file or name -> source family (named, then verified) -> state dict under timm's names -> target network -> strict load
-> checks on the written file (verify.py) -> report and safetensors
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.layers import to_2tuple

from mimkit.conversion.family import OWN, families, own_family, own_names
from mimkit.conversion.report import Report, Row, measure, sha256
from mimkit.conversion.source import (
    Origin,
    Plain,
    fetch_published,
    find_source,
    from_pyramid,
    known_shapes,
    read_family,
    read_plain,
)
from mimkit.conversion.verify import own_outputs, run_checks
from mimkit.errors import UserError, did_you_mean
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import State, assemble, check_dims, disown, load_strictly, on_meta, read_weights, save_model
from mimkit.models.factory import create_network
from mimkit.models.hpvit import NAMED, PATCH, Pool, plain_vit
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel

DATA = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # data configuration that is kept with the weights


class Target(NamedTuple):
    """What a conversion writes."""

    net: Any  # on the meta device
    state: State  # its weights
    rows: list[Row]  # where they come from
    data: dict[str, Any]  # data configuration of the source file


def as_pyramid(plain: Plain, to: str, options: dict[str, Any]) -> Target:
    """Put a plain ViT's weights into an HPViT.

    Args:
        plain: the plain ViT.
        to: name of the HPViT.
        options: arguments of the HPViT.
    """
    net = on_meta(timm.create_model, to, source=plain.name, source_args=plain.arguments, **options)
    rows = list(plain.rows)
    side = plain.state[KERNEL].shape[-1]
    if side != PATCH:
        at = next(i for i, row in enumerate(rows) if row.target == KERNEL)
        rows[at] = Row("resized", rows[at].origins, KERNEL, f"kernel {side} -> {PATCH} px by the pseudo-inverse")
    pools = {f"pools.{i}.weight": pool.start() for i, pool in enumerate(net.pools) if isinstance(pool, Pool)}
    rows += [Row("fresh", (), name, "initial weight of a pool") for name in pools]
    state = plain.state | {KERNEL: resize_kernel(plain.state[KERNEL], PATCH)} | pools
    return Target(net, state, rows, plain.data)


def as_timm(plain: Plain) -> Target:
    """Put a plain ViT's weights into timm's own network.

    timm's config.json cannot hold a norm epsilon, so timm's default replaces the source's.
    """
    arguments = {key: value for key, value in plain.arguments.items() if key != "norm_eps"}
    net = on_meta(timm.create_model, plain.name, **arguments)
    if "." not in plain.name:  # without a tag, timm describes its default weights
        disown(net)
    net.pretrained_cfg["input_size"] = (net.patch_embed.proj.in_channels, *net.patch_embed.img_size)
    return Target(net, plain.state, plain.rows, plain.data)


def as_own(to: str, file: Path, which: str | None = None, img_size: Any = None, **given: Any) -> tuple[Target, str]:
    """Put a released HiViT or SViT file into our network.

    Args:
        to: name of the network.
        file: file or folder of weights.
        which: state dict to use if the file holds several, as in `read_weights`.
        img_size: input size of the training, if no tensor shows it: for an SViT, and for a HiViT that is not square.
        given: arguments of the network.

    Returns:
        The target, and the state dict that was used.
    """
    layout = own_family(to)
    assert layout is not None
    remap, _, taken = read_family(file, layout, which, lambda state: set())
    default = on_meta(timm.create_model, to)
    check_dims(default.state_dict(), remap.found, file)
    if (kernel := f"{default.pretrained_cfg['first_conv']}.weight") not in remap.found:
        raise UserError(f"{file} has no {kernel}, so it is not a whole {layout}. Get a complete copy of it.")
    with known_shapes(file, layout):
        options = {"img_size": img_size or 224, **families()[layout].options(remap.found, {}), **given}
    net = on_meta(create_network, to, False, **options)
    load_strictly(net, remap.found, file, assign=True)
    net.pretrained_cfg["input_size"] = (net.in_chans, *to_2tuple(options["img_size"]))
    return Target(net, remap.found, remap.rows, {}), taken


def read_released(name: str, file: Path, **options: Any) -> tuple[dict[str, Any], State] | None:
    """Read a released file of one of our own networks.

    Args:
        name: name of the network in timm.
        file: file of weights.
        options: arguments of the network that replace those that the file implies.

    Returns:
        The network's arguments, including `num_classes`, and the state dict under our names. None if `name` is not a
        HiViT or SViT, or if the file does not have a released layout.
    """
    layout = None if local_path(name).exists() else own_family(name)
    if layout is None or not families()[layout].fits(read_weights(file)):
        return None
    target, _ = as_own(name, file, **options)
    return {**target.net._model_args, "num_classes": target.net.num_classes}, target.state


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
    """Convert a checkpoint, and write it in timm's hub layout with a report.

    Args:
        source: alias, name in timm, or folder of a timm model (a run's encoder/, or a converted HPViT).
        to: hpvit, hpvit_s, hpvit_b, hpvit_l, hpvit_h, a hivit_* or svit_*, or timm (the plain ViT).
        out: directory to write.
        checkpoint: file or folder of weights; the published weights by default.
        layout: family of the checkpoint.
        weights: state dict to use if the checkpoint holds several: ema, teacher, student or model.
        source_args: arguments of the source network that its name does not imply.
        checks: run the checks. Without them, the report and config.json say NOT CHECKED.
        dry_run: convert and check, but leave no files.
        options: arguments of the HPViT.

    Raises:
        UserError: an option or a file does not fit, or a check failed. Nothing is written then.
    """
    origin, given = find_source(source), source_args or {}
    targets = ["timm", "hpvit", *NAMED, *own_names()]
    if to not in targets:
        near = did_you_mean(to, targets) or f" Choose among {', '.join(targets)}."
        raise UserError(f"--to {to} is unknown.{near}")
    if not dry_run:
        check_output(out)
    pyramid = origin.name.startswith("hpvit")
    if pyramid and (checkpoint or layout or weights or source_args):
        raise UserError(f"--from {source} is a converted HPViT. Pass --to and --out, but no options of the source.")
    if reserved := {"kernel", "any_grid", "source"} & given.keys():
        raise UserError(
            f"--source-args {', '.join(sorted(reserved))} cannot be set. Choose another network with --from instead."
        )
    file, layout = locate_weights(origin, checkpoint, layout)
    check_target(origin, layout, to, options)
    plain: Plain | None = None
    if own_family(to):
        if unknown := ", ".join(given.keys() - {"img_size"}):
            raise UserError(f"--source-args has {unknown}, which the file of {layout} determines. Pass img_size only.")
        target, taken = as_own(to, file, weights, **given)
    else:
        if pyramid:
            plain = from_pyramid(origin, file)
        else:
            given = {**(origin.config.get("model_args") or {}), **given}
            plain = read_plain(origin.name, file, layout, weights, given)
        target, taken = as_timm(plain) if to == "timm" else as_pyramid(plain, to, options), plain.taken

    name = plain.name.split(".")[0] if plain and to == "timm" else to
    size = target.net.pretrained_cfg["input_size"]
    sizes = measure_source(origin, file, plain, to) | {name: measure(target.net, size)}
    report = Report(source, str(file), sha256(file), layout, taken, name, target.rows, sizes, None)
    known = {**target.net.pretrained_cfg, **target.data, **(origin.config.get("pretrained_cfg") or {})}
    data_config = {key: known[key] for key in DATA if key in known}
    with tempfile.TemporaryDirectory() if dry_run else replacing(str(out)) as temporary:
        folder = Path(temporary)
        net = assemble(target.net, target.state)
        save_model(net, folder, input_size=size, **data_config)
        before = own_outputs(net) if checks and own_family(to) else []
        del target, net  # the checks read the written weights, which would be in memory twice
        if checks:
            report.checks = run_checks(folder, to, plain, file, families()[layout], before)
        config = read_json(folder / "config.json")
        note = {"source": source, "file": str(file), "sha256": report.sha256, "written": sha256(folder)}
        config["mimkit"] = {**note, "checks": report.checks or "NOT CHECKED"}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        report.save(folder)
    return report


def check_output(out: str | Path | None) -> None:
    """Refuse an output directory that is not a conversion, an empty directory, or a new one."""
    if out is None:
        raise UserError("There is no output directory. Pass --out DIR, or --dry-run.")
    folder = Path(out)
    occupied = folder.is_symlink() or folder.exists()
    if occupied and not ((folder / "report.json").exists() or (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"--out {out} exists and is not a conversion. Choose another directory.")
    if folder.resolve() == Path.cwd() or folder.is_symlink():
        raise UserError(f"--out {out} is a link or the current directory, so it cannot be replaced. Choose another.")


def locate_weights(origin: Origin, checkpoint: str | Path | None, layout: str | None) -> tuple[Path, str]:
    """Return the file or folder to read, and its family. Published weights are downloaded."""
    layout = layout or origin.layout or "timm"
    if checkpoint or origin.folder:
        file = local_path(checkpoint or str(origin.folder))
    else:
        file, layout = fetch_published(origin.name), "timm"
    if layout not in families():
        near = did_you_mean(layout, families()) or f" Choose among {', '.join(families())}."
        raise UserError(f"--layout {layout} is unknown.{near}")
    return file, layout


def check_target(origin: Origin, layout: str, to: str, options: dict[str, Any]) -> None:
    """Refuse a target that the source cannot become, or that does not take the options."""
    if own_family(to) != (layout if layout in OWN else None):
        raise UserError(
            f"A checkpoint of the family {layout} cannot become {to}. {' and '.join(OWN)} networks are converted from "
            "their own families only."
        )
    if own_family(to) and origin.name != to:
        raise UserError(f"--from {origin.name} cannot become {to}. Pass the same name to --from and --to.")
    if options and not to.startswith("hpvit"):
        raise UserError(f"--to {to} does not take {', '.join(options)}. Only an HPViT has these options.")


def measure_source(origin: Origin, file: Path, plain: Plain | None, to: str) -> dict[str, tuple[float, float]]:
    """Return the parameters (M) and GMACs of the source network by its name, if it differs from the target."""
    if origin.name.startswith("hpvit"):
        net = on_meta(timm.create_model, f"local-dir:{file}")
        return {origin.name: measure(net, net.pretrained_cfg["input_size"])}
    if plain and to != "timm":
        net = on_meta(plain_vit, plain.name, **plain.arguments)
        return {plain.name: measure(net, (net.patch_embed.proj.in_channels, *net.patch_embed.img_size))}
    return {}
