"""Around a masked pre-training run: where its weights come from, how it is watched, what it leaves."""

from mimkit.data.loader import load_preview
from mimkit.data.sources import Source
from mimkit.data.transforms import Normalize, Size
from mimkit.doctor.loss_bands import health
from mimkit.methods.checkpoint import Method
from mimkit.methods.reconstruction import reconstructions
from mimkit.models.factory import timm_model
from mimkit.training.plots import curves
from mimkit.training.run import Run


def summarize(run: Run, mae: Method, source: Source, size: Size, normalize: Normalize) -> None:
    """The pictures, whether it went well, and what to do next."""
    mae = run.whole(mae)
    if not run.accelerator.is_main_process:
        return
    curves(run.metrics(), run.folder / "curves.png")
    images = load_preview(source, size, timm_model(mae.encoder).in_chans, 8).images.to(run.accelerator.device)
    if len(images):
        reconstructions(mae, normalize(images), normalize, run.folder / "reconstructions.png")
    run.print("\n".join(health(run.folder)[0]))
    run.print(
        f"\nwrote {run.folder}/: curves.png, reconstructions.png, metrics.jsonl, config.yaml, checkpoints/, decoder/\n"
        f"and encoder/, which timm loads after `import mimkit` (without pretrained=True its weights would be random):\n"
        f'    timm.create_model("local-dir:{run.folder}/encoder", pretrained=True)\n'
        f"next: mimkit probe --model {run.folder}/encoder --data {run.options.data}\n"
        f"      mimkit reconstruct --run {run.folder} --images FOLDER --out picture.png"
    )


def describe_method(mae: Method, images: int, lr: float) -> str:
    """One line on a network and its learning rate."""
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (timm_model(mae.encoder), mae.decoder)]
    name = timm_model(mae.encoder).pretrained_cfg["architecture"]
    return f"{name}: encoder {sizes[0]:.2f} M + decoder {sizes[1]:.2f} M parameters; lr {lr:.3g}; {images:,} images"
