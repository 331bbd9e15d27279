"""Describe a pre-training run: its network at the start, its pictures and its health at the end."""

from shlex import quote

from mimkit.data.loader import load_preview
from mimkit.data.sources import Source
from mimkit.data.transforms import Normalize
from mimkit.doctor.loss_bands import health
from mimkit.files import read_options, reading_flags
from mimkit.methods.protocols import Method
from mimkit.methods.reconstruction import reconstructions
from mimkit.models.factory import timm_model
from mimkit.training.plots import curves
from mimkit.training.run import Run


def summarize(run: Run, method: Method, source: Source, size: tuple[int, int], normalize: Normalize) -> None:
    """Draw the curves and reconstructions of a finished run, and print its health and what to do next.

    All processes must call this.

    Args:
        source: the images of pre-training.
        size: height and width of the encoder's input, in pixels.
        normalize: normalization of the encoder's input.
    """
    method = run.engine.full_state(method)
    if not run.engine.is_main:
        return
    curves(run.dir.metrics(), run.folder / "curves.png")
    images = load_preview(source, size, timm_model(method.encoder).in_chans, 8).images.to(run.engine.device)
    if len(images):
        reconstructions(method, normalize(images), normalize, run.folder / "reconstructions.png")
    run.print("\n".join(health(run.folder)[0]))
    options, data, folder = read_options(run.folder), quote(source.name), quote(str(run.folder))
    reading = reading_flags(options, "image_column", "label_column")
    probe = f"mimkit probe --model {quote(f'{run.folder}/encoder')} --data {data}{reading}\n      "
    labeled = any("knn_10" in line for line in run.dir.metrics())
    run.print(
        f"\nwrote {run.folder}/: curves.png, reconstructions.png, metrics.jsonl, config.yaml, checkpoints/, decoder/\n"
        f"and encoder/, which timm loads after `import mimkit` (without pretrained=True its weights would be random):\n"
        f'    timm.create_model("local-dir:{run.folder}/encoder", pretrained=True)\n'
        f"next: {probe if labeled else ''}mimkit reconstruct --run {folder} --images {data}"
        f"{reading_flags(options, 'image_column')}"
    )


def describe_method(method: Method, images: int, lr: float) -> str:
    """Return one line with the network, its number of parameters, the learning rate, and the number of images."""
    model = timm_model(method.encoder)
    encoder, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, method.decoder))
    name = model.pretrained_cfg["architecture"]
    return f"{name}: encoder {encoder:.2f} M + decoder {decoder:.2f} M parameters; lr {lr:.3g}; {images:,} images"
