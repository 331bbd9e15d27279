"""Encoders in the form that pre-training leaves them in, without training."""

from conftest import fill

from mimkit.io.weights import write_model
from mimkit.models.factory import timm_model, unit_encoder

SMALL_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
INPUT = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def write_encoders(folder):
    """Write hivit/encoder and vit/encoder, as runs of recipes/mae.py do, with all weights at order 1.

    Weights at their initial values would hide what is lost when they are loaded.
    """
    for run, name, options in (("hivit", "hivit_nano", {"patch_size": 1}), ("vit", "vit_tiny_patch16_224", SMALL_VIT)):
        net = fill(timm_model(unit_encoder(name, img_size=(32, 32), **{"patch_size": 4} | options)))
        write_model(net, folder / run / "encoder", **INPUT)
    return folder
