"""Save and load pre-training methods: an encoder, its decoder, and the options of the method."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import NAMES, check_dims, load_strictly, read_weights, split, write_model
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.methods.protocols import Method
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import adapt_to_input_size, as_map_encoder, as_unit_encoder, create_network, timm_model
from mimkit.models.hivit import HiViT
from mimkit.models.layers.pos_embed import is_sincos


class Entry(NamedTuple):
    """The parts that a method is rebuilt from."""

    method: Callable[..., Any]  # class, called with (encoder, decoder, **method.config)
    decoder: Callable[..., Any]  # class, called with (**decoder.config)
    encoder: Callable[[Any], Any]  # makes an encoder of the method out of a timm model


# Every pre-training method, by its name in decoder/config.json
METHODS = {
    "mae": Entry(MAE, Decoder, as_unit_encoder),
    "simmim": Entry(SimMIM, PixelHead, as_map_encoder),
}


def load_initial_weights(method: Method, source: str) -> str:
    """Load existing weights into a method, to continue from them.

    Args:
        method: the method, which is changed.
        source: a run of mimkit, or a file or folder of an encoder, with or without its decoder. Position tables of
            another input size are resized.

    Returns:
        A description of what was loaded.

    Raises:
        UserError: if the weights do not fit the method's networks.
    """
    run = local_path(source)
    folder = encoder_folder(run)
    if folder != run or (run / "decoder").is_dir():
        encoder, decoder = read_weights(folder), read_weights(run / "decoder")
    else:
        state = read_weights(folder)
        encoder, decoder = split(state)
        table = state.get("decoder_pos_embed")
        if decoder and table is not None and not is_sincos(table):
            raise UserError(
                f"--init {source} has a decoder_pos_embed that is not the sine-cosine table, which our decoder has. "
                "Get another copy of it, or remove its decoder."
            )
    model = timm_model(method.encoder)
    check_dims(model.state_dict(), encoder, source)
    try:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config:  # it has the input size that the position tables are for
            model.pretrained_cfg["input_size"] = config["pretrained_cfg"]["input_size"]
        if isinstance(model, HiViT):  # the authors' files have no config.json
            model.set_pos_antialias(bool(config) and config.get("model_args", {}).get("pos_antialias", True))
        encoder = adapt_to_input_size(encoder, model)
    except (LookupError, TypeError, RuntimeError, AssertionError):
        pass  # load_strictly names the tensors that are missing or misshapen
    load_strictly(model, encoder, source)
    if not decoder:
        return f"encoder from {source}, which has no decoder: the decoder starts at random"
    load_strictly(method.decoder, decoder, source)
    return f"encoder and decoder from {source}"


def encoder_folder(run: Path) -> Path:
    """Return the folder of a run's encoder: encoder/, or the root of a run that was pushed to the hub."""
    return run / "encoder" if (run / "encoder").is_dir() else run


def save_method(method: Method, folder: Path, size: tuple[int, int], mean: list[float], std: list[float]) -> None:
    """Write encoder/ (in timm's layout) and decoder/ into a run's directory.

    Args:
        method: a method in `METHODS`.
        folder: directory of the run.
        size: height and width of the encoder's input, in pixels.
        mean, std: per channel, what the input is normalized by.
    """
    name = next(name for name, entry in METHODS.items() if entry.method is type(method))
    model = timm_model(method.encoder)
    data = {"input_size": (model.in_chans, *size), "interpolation": "bicubic", "crop_pct": 1.0}
    write_model(model, folder / "encoder", mean=mean, std=std, **data)
    write_decoder(method.decoder, folder / "decoder", method=name, **method.config)


def load_run(name: str | Path) -> tuple[Method, dict[str, Any]]:
    """Load the method of a run from its encoder/ and decoder/.

    Args:
        name: directory of a run, or hf-hub:OWNER/NAME.

    Returns:
        The method in evaluation mode, and its encoder's pretrained_cfg (input_size, mean, std).

    Raises:
        UserError: if the run holds no encoder or decoder, or they are damaged.
    """
    folder = local_path(name)
    if not (encoder_folder(folder) / "config.json").is_file():
        raise UserError(f"--run {name} holds no encoder/. Pass the directory of a run that has saved a checkpoint.")
    decoder, config = read_decoder(folder / "decoder")
    model = create_network(str(encoder_folder(folder)))
    try:
        entry = METHODS[_method_name(config, decoder.config)]
        options = {key: value for key, value in config.items() if key != "method"}
        return entry.method(entry.encoder(model), decoder, **options).eval(), model.pretrained_cfg
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/decoder/config.json describes no method ({error!r}). Get another copy of it."
        ) from error


def write_decoder(decoder: Any, folder: str | Path, **config: Any) -> None:
    """Write a decoder into a folder.

    Args:
        config: the method that trained it (such as method="mae"), and the options of the method (such as mask_ratio).
    """
    with replacing(folder) as temporary:
        save_file(decoder.state_dict(), temporary / NAMES[0])
        (temporary / "config.json").write_text(json.dumps({"decoder": decoder.config, **config}, indent=2))


def read_decoder(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read what `write_decoder` wrote.

    Returns:
        The decoder, and `config` of `write_decoder`.

    Raises:
        UserError: if the folder holds no decoder, or a damaged one.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no decoder (config.json and {NAMES[0]}). Pass a run of mimkit.")
    config = read_json(file)
    try:
        arguments = config.pop("decoder")
        name = _method_name(config, arguments)
        if name == "simmim":
            config.pop("norm_targets", None)  # mimkit 0.1 wrote it for every method
        decoder = METHODS[name].decoder(**arguments)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{file} describes no decoder ({error!r}). Get another copy of it.") from error
    load_strictly(decoder, read_weights(folder), folder)
    return decoder, config


def _method_name(config: dict[str, Any], decoder: dict[str, Any]) -> str:
    """Return the method that a decoder/config.json names.

    Files of mimkit 0.1 do not name it. Only SimMIM's head has a mask token of its own width there.
    """
    return config.get("method") or ("simmim" if "token_dim" in decoder else "mae")
