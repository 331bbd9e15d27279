"""Write the encoder and the decoder of a pre-training run."""

from mimkit.data.transforms import Normalize, Size
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import Method, write_decoder
from mimkit.models.factory import timm_model
from mimkit.training.run import Run


def export_pretrained(run: Run, mae: Method, size: Size, normalize: Normalize) -> None:
    """Write encoder/ (timm's layout) and decoder/ into the run's directory."""
    mae = run.whole(mae)
    if run.accelerator.is_main_process:
        model = timm_model(mae.encoder)
        mean, std = normalize.values
        data = {"input_size": (model.in_chans, *size), "interpolation": "bicubic", "crop_pct": 1.0}
        write_model(model, run.folder / "encoder", mean=mean, std=std, **data)
        write_decoder(mae.decoder, run.folder / "decoder", mask_ratio=mae.mask_ratio, norm_targets=mae.norm_targets)
    run.accelerator.wait_for_everyone()
