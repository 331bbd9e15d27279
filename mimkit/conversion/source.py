"""Find the checkpoint to convert, and read the plain ViT in it."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models._hub import download_cached_file
from timm.models.beit import Beit
from timm.models.eva import Eva

from mimkit.conversion.family import Remap, families, own_family, own_names, plain_vits
from mimkit.conversion.report import Row, sha256
from mimkit.errors import UserError, did_you_mean, reason_of, some
from mimkit.files import read_json
from mimkit.io.hub import local_path
from mimkit.io.weights import State, assemble, check_dims, check_values, misfits, on_meta, open_weights, read_weights
from mimkit.models.hpvit import PATCH, plain_vit
from mimkit.models.layers.patch_embed import KERNEL, resize_kernel, restore_kernel

# Which network and which file ----------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What `--from` names."""

    name: str  # in timm, with its tag
    layout: str | None  # the family that an alias implies
    folder: Path | None  # the folder in timm's hub layout, if one was named
    config: dict[str, Any]  # that folder's config.json


def find_source(source: str) -> Origin:
    """Find what an alias, a name in timm, or a folder in timm's hub layout stands for.

    Raises:
        UserError: it is none of these.
    """
    folder = local_path(source)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        name = config.get("architecture")
        if not isinstance(name, str) or not timm.is_model(name):
            raise UserError(
                f"--from {source} is not a folder written by timm, whose config.json names an architecture. Name the "
                "network with --from, and pass the folder with --checkpoint FOLDER --layout hf."
            )
        tag = (config.get("pretrained_cfg") or {}).get("tag")
        name = f"{name}.{tag}" if tag and timm.get_pretrained_cfg(f"{name}.{tag}") else name
        return Origin(name, own_family(name) or "timm", folder, config)
    for layout, family in families().items():
        if source in family.aliases:
            return Origin(family.aliases[source], layout, None, {})
    name = source.split(".")[0]
    if name in plain_vits() or name in own_names():
        tagged = timm.list_models(f"{name}.*", pretrained=True)
        if "." in source and source not in tagged:
            near = did_you_mean(source, tagged) or f" Choose among {', '.join(tagged[:4]) or name}."
            raise UserError(f"--from {source}: timm has no such tag.{near}")
        return Origin(source, own_family(name), None, {})
    aliases = [alias for family in families().values() for alias in family.aliases]
    near = did_you_mean(source, [*aliases, *own_names(), *plain_vits()]) or " `mimkit convert --list` names all."
    raise UserError(f"--from {source} is not an alias, a plain ViT in timm, or a folder.{near}")


def fetch_published(name: str) -> Path:
    """Download the weights that a name in timm stands for, in timm's layout, and return the cached file.

    Raises:
        UserError: there are none, or they cannot be fetched.
    """
    import huggingface_hub

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise UserError(f"timm publishes no weights for {name}. Pass --checkpoint FILE --layout FAMILY, or name a tag.")
    huggingface_hub.utils.logging.set_verbosity_error()  # it logs every retry
    url = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else cfg.url
    try:
        if cfg.hf_hub_id:
            return Path(huggingface_hub.hf_hub_download(cfg.hf_hub_id, "model.safetensors"))
        return Path(download_cached_file(str(cfg.url), progress=True))
    except Exception as error:  # requests, urllib and huggingface_hub raise dozens of types
        raise UserError(
            f"{name} cannot be fetched ({type(error).__name__}). On another machine, download {url} and pass it with "
            "--checkpoint FILE --layout timm."
        ) from error


# What is in the file -------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """A plain ViT: its state dict under timm's names, and how to build the network."""

    name: str  # in timm
    arguments: dict[str, Any]  # of plain_vit
    state: State
    rows: list[Row]  # what happened to the file's tensors
    data: dict[str, Any] = field(default_factory=dict)  # mean, std and interpolation, if known
    raw: State = field(default_factory=dict)  # the tensors under the file's names, for timm's own loader
    taken: str = ""  # which state dict of the file was used
    pyramid: bool = False  # whether the file is an HPViT

    def build(self, kernel: int | None = None, any_grid: bool = False) -> Any:
        """Build the network with these weights from timm's code.

        Args:
            kernel: side in pixels that the patch embedding's kernel is resized to; its own by default.
            any_grid: whether the network takes any input size.
        """
        net = on_meta(plain_vit, self.name, kernel, any_grid, **self.arguments)
        resized = resize_kernel(self.state[KERNEL], net.patch_embed.patch_size[0])
        return assemble(net, self.state | {KERNEL: resized}).eval()


@contextmanager
def known_shapes(file: Path, layout: str) -> Iterator[None]:
    """Report a tensor whose shape no function of a family can handle as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{file} has a tensor of a shape that no network of the family {layout} has ({reason_of(error)[:90]}). "
            "Get another copy of it."
        ) from error


class FamilyFile(NamedTuple):
    """The content of a file that belongs to a family."""

    remap: Remap
    raw: State  # the tensors under the file's names
    taken: str  # which state dict of the file was used, and which data types became float32


def read_family(file: Path, layout: str, which: str | None, wanted: Callable[[State], set[str]]) -> FamilyFile:
    """Read a file, verify its family, and move its tensors to timm's names.

    Args:
        file: file or folder of weights.
        layout: name of the family.
        which: state dict to use if the file holds several, as in `read_weights`.
        wanted: returns the names of the target network's tensors, given the file's state.

    Raises:
        UserError: the file is of another family, has tensors that the family does not explain, or has values that are
            not finite.
    """
    family = families()[layout]
    raw, taken = open_weights(file, which)
    if not family.fits(raw):
        others = [other for other, candidate in families().items() if candidate.fits(raw)]
        hint = f"it looks like {' or '.join(others)}: pass --layout" if others else "no family matches: check the file"
        raise UserError(f"{file} does not have the layout {layout} ({family.title}); {hint}.")
    remap = Remap(raw, wanted(raw))
    with known_shapes(file, layout):
        family.remap(remap)
    if remap.remaining:
        names = some(sorted(remap.remaining))
        raise UserError(f"{file} has {len(remap.remaining)} tensors that {layout} does not explain: {names}.")
    values = {key: tensor for key, tensor in remap.found.items() if not key.endswith(".num_batches_tracked")}
    check_values(values, file)
    remap.found |= {key: tensor.float().contiguous() for key, tensor in values.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in raw.values()} - {"float32", "int64"}
    notes = [taken, *(f"{dtype} converted to float32" for dtype in sorted(dtypes))]
    return FamilyFile(remap, raw, ", ".join(note for note in notes if note))


def read_plain(
    name: str, file: Path, layout: str, which: str | None = None, given: dict[str, Any] | None = None
) -> Plain:
    """Read the plain ViT in a file.

    Args:
        name: the network's name in timm.
        file: file or folder of weights.
        layout: name of the file's family.
        which: state dict to use if the file holds several, as in `read_weights`.
        given: arguments of the network that its name does not imply.

    Raises:
        UserError: the file does not hold this network.
    """
    family, (config, data) = families()[layout], _read_transformers_config(file)
    given = dict(given or {})

    def wanted(state: State) -> set[str]:
        given.update({key: value for key, value in family.options(state, config).items() if key not in given})
        return set(on_meta(plain_vit, name, **given).state_dict())

    remap, raw, taken = read_family(file, layout, which, wanted)
    with known_shapes(file, layout):
        arguments = fit_source_args(name, remap.found, given, file)
        own = on_meta(plain_vit, name, **arguments).state_dict()
    missing, unexpected, misshapen = misfits(own, remap.found)
    problems = [f"{key} is missing" for key in missing] + [f"{key} is not in {name}" for key in unexpected]
    shapes = {key: (tuple(remap.found[key].shape), tuple(own[key].shape)) for key in misshapen}
    problems += [f"{key} is {theirs} instead of {ours}" for key, (theirs, ours) in shapes.items()]
    if problems:
        raise UserError(f"{file} does not fit {name}: {some(problems, 2)}. Check --from and --layout.")
    raw = raw if family.reader == "timm" else {}
    return Plain(name, arguments, remap.found, remap.rows, {**family.data, **data}, raw, taken)


def fit_source_args(name: str, found: State, given: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Find the arguments with which timm's network of this name has the shapes of a state dict.

    Args:
        name: the network's name in timm.
        found: state dict under timm's names.
        given: arguments that are already known.
        origin: the file, named in errors.

    Raises:
        UserError: the network has another width, depth or patch size.
    """
    net = on_meta(plain_vit, name, **given)
    own = net.state_dict()
    check_dims(own, found, origin)
    if KERNEL not in found or found[KERNEL].ndim != 4:
        raise UserError(f"{origin} has no patch embedding, so it is not a plain ViT. Check --checkpoint and --layout.")
    width, in_chans, side = found[KERNEL].shape[:3]
    blocks = 1 + max((int(n.split(".")[1]) for n in found if re.match(r"blocks\.\d+\.", n)), default=-1)
    patch = net.patch_embed.patch_size[0]
    if (width, blocks, side) != (net.embed_dim, len(net.blocks), patch):
        raise UserError(
            f"{origin} holds a ViT of width {width} with {blocks} blocks and patches of {side} px, but {name} has "
            f"width {net.embed_dim}, {len(net.blocks)} blocks and patches of {patch} px. Give --from another name."
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
    tokens = _grid_tokens(net, found)
    if tokens and tokens != math.prod(net.patch_embed.grid_size):
        if math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"{origin} has {tokens} positions, which do not form a square grid. Check --from.")
        arguments["img_size"] = math.isqrt(tokens) * patch
    return arguments


def _grid_tokens(net: Any, found: State) -> int:
    """Return the number of grid tokens that the position embeddings are for, or 0 if there are none."""
    for name, tensor in found.items():
        if name == "pos_embed":
            if tensor.ndim != 3:
                return tensor.shape[1] * tensor.shape[2] if tensor.ndim == 4 else 0
            return max(tensor.shape[1] - (0 if getattr(net, "no_embed_class", False) else net.num_prefix_tokens), 0)
        if name.endswith("relative_position_bias_table") and tensor.ndim == 2 and len(tensor) > 3:
            # (2 side - 1)^2 + 3 rows
            return ((math.isqrt(len(tensor) - 3) + 1) // 2) ** 2
    return 0


def _read_transformers_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the configuration files of transformers in a file's folder: the network's, and its data configuration."""
    folder = file if file.is_dir() else file.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    data: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        preprocessor = read_json(folder / "preprocessor_config.json")
        filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
        data = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
        data = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == 3}
        data["interpolation"] = filters.get(preprocessor.get("resample", 3), "bicubic")
    return config if "model_type" in config else {}, data


def from_pyramid(origin: Origin, folder: Path) -> Plain:
    """Return the plain ViT that an HPViT was converted from.

    Raises:
        UserError: the HPViT is not as it was converted.
    """
    note, arguments = origin.config.get("mimkit") or {}, origin.config.get("model_args") or {}
    if note.get("written") != sha256(folder):
        raise UserError(
            f"{folder} was trained or changed after its conversion, or never converted. Only an unchanged conversion "
            "can be converted back to the plain ViT."
        )
    state = read_weights(folder)
    pools = [key for key in state if key.startswith("pools.")]
    rows = [Row("dropped", (key,), None, "pool weight, unchanged since its initialization") for key in pools]
    rows += [Row("copied", (key,), key) for key in state if key not in (*pools, KERNEL)]
    name, given = arguments["source"], arguments.get("source_args") or {}
    side = on_meta(plain_vit, name, **given).patch_embed.patch_size[0]
    why = f"kernel {PATCH} -> {side} px, by the transpose of the resize matrix" if side != PATCH else ""
    rows.append(Row("resized" if why else "copied", (KERNEL,), KERNEL, why))
    state[KERNEL] = restore_kernel(state[KERNEL], side)
    return Plain(name, given, {key: state[key] for key in state if key not in pools}, rows, pyramid=True)
