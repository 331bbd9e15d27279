"""Save and load pre-training methods: an encoder, its decoder, and the method's options."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import NAMES, load_strictly, read_weights, split
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import adapt_to_input_size, as_map_encoder, as_unit_encoder, create_network, timm_model

Method = MAE | SimMIM


def load_initial_weights(mae: Method, source: str) -> str:
    """Go on from released weights: a run of mimkit, or a file or folder of an encoder, with or without its decoder.

    Returns:
        What was taken, in words.
    """
    run = local_path(source)
    folder = encoder_of(run)
    if folder != run or (run / "decoder").is_dir():
        encoder, decoder = read_weights(folder), read_weights(run / "decoder")
    else:
        encoder, decoder = split(read_weights(folder))
    model = timm_model(mae.encoder)
    try:
        if (folder / "config.json").is_file():  # the size that its tables are for
            config = read_json(folder / "config.json")
            model.pretrained_cfg["input_size"] = config["pretrained_cfg"]["input_size"]
        encoder = adapt_to_input_size(encoder, model)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--init {source} does not hold a {type(model).__name__} ({error}): check --model.") from error
    load_strictly(model, encoder, source)
    if not decoder:
        return f"encoder from {source}; it has no decoder, which starts at random"
    load_strictly(mae.decoder, decoder, source)
    return f"encoder and decoder from {source}"


def encoder_of(run: Path) -> Path:
    """Where a run has its encoder: in encoder/, or at its root where it was pushed to the hub."""
    return run / "encoder" if (run / "encoder").is_dir() else run


def load_run(name: str | Path) -> tuple[Method, dict[str, Any]]:
    """-> the MAE or SimMIM of a run's encoder/ and decoder/; its encoder's pretrained_cfg (input_size, mean, std)"""
    folder = local_path(name)
    if not (encoder_of(folder) / "config.json").is_file():
        raise UserError(f"--run {name} holds no encoder/: pass the directory of a run that has saved a checkpoint.")
    decoder, method = read_decoder(folder / "decoder")
    model = create_network(str(encoder_of(folder)))
    try:
        if isinstance(decoder, PixelHead):
            return SimMIM(as_map_encoder(model), decoder, method["mask_ratio"]).eval(), model.pretrained_cfg
        return MAE(as_unit_encoder(model), decoder, **method).eval(), model.pretrained_cfg
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/decoder/config.json fits no method ({error!r}): get another copy of it.") from error


def write_decoder(decoder: Decoder | PixelHead, folder: str | Path, **method: Any) -> None:
    """Write a decoder beside its encoder, with what it was trained for (mask_ratio, norm_targets)."""
    with replacing(folder) as temporary:
        save_file(decoder.state_dict(), temporary / NAMES[0])
        (temporary / "config.json").write_text(json.dumps({"decoder": decoder.config, **method}, indent=2))


def read_decoder(folder: str | Path) -> tuple[Decoder | PixelHead, dict[str, Any]]:
    """-> the decoder, and what it was trained for"""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no decoder (config.json and {NAMES[0]}): pass a run of mimkit.")
    config = read_json(file)
    try:
        about = config.pop("decoder")
        decoder = (PixelHead if "token_dim" in about else Decoder)(**about)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{file} describes no decoder ({error!r}): get another copy of it.") from error
    load_strictly(decoder, read_weights(folder), folder)
    return decoder, config
