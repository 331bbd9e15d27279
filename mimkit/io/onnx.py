"""Export a network to ONNX or to a torch.export program, which run without mimkit."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkit.errors import UserError

TOLERANCE = 1e-3  # largest difference between the outputs, relative to the largest output
STEP = 32  # sides of images of any size are multiples of this while a network is traced and compared


def export_model(
    network: Any,
    out: Path,
    about: dict[str, Any],
    shape: Sequence[int],
    outputs: Sequence[str] = ("logits",),
    any_size: bool = False,
) -> tuple[float, bool]:
    """Export a network as OUT.onnx or OUT.pt2 for any batch size, read the file back, and compare the outputs.

    Args:
        network: computes a tensor, or a tuple of tensors, of images (b c H W).
        out: file to write; its ending selects the format.
        about: metadata that a user of the file needs (mean, std, label_names, ...), stored in it as JSON under the key
            `mimkit`, with `any_size` added.
        shape: input size (c H W).
        outputs: names of the outputs.
        any_size: export for images of any size, or of `shape` only if that is not possible.

    Returns:
        The largest difference between the outputs of the file and of the network, relative to the largest output, and
        whether the file takes images of any size.

    Raises:
        UserError: the ending is unknown, a package of the `export` extra is missing, the exporter fails, or the
            difference exceeds `TOLERANCE`. No file is left behind.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} has an unknown format: give a name that ends in .onnx or .pt2.")
    network.eval().requires_grad_(False)
    if any_size:
        with suppress(UserError):
            return _export(network, out, about | {"any_size": True}, shape, outputs, True), True
    return _export(network, out, about | {"any_size": False}, shape, outputs, False), False


def _export(
    network: Any, out: Path, about: dict[str, Any], shape: Sequence[int], outputs: Sequence[str], dynamic: bool
) -> float:
    """Export for any size or for one, see `export_model`. Return the difference."""
    write, read = FORMATS[out.suffix]
    channels, height, width = shape
    sizes = [(height, width)]
    if dynamic:  # traced at another size than the network's own, at which it would not resample its positions
        sizes = [(side + STEP, other + 2 * STEP) for side, other in sizes] + sizes
        half = [max(side // 2 // STEP, 4) * STEP for side in (height, width)]  # a map of 1 px counts as another case
        sizes.append((half[0], half[1] + STEP))
    random = torch.Generator().manual_seed(0)
    images = [torch.randn(3, channels, *size, generator=random) for size in sizes]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        file = Path(folder) / out.name  # a large network's weights are a second file, which this one refers to by name
        try:
            with _quiet():
                write(network, images[0][:2], file, json.dumps(about), outputs, dynamic)
                found = read(file, images)
        except ImportError as error:
            raise UserError(f"--out {out} needs {error.name}: pip install mimkit[export].") from error
        except OSError:
            raise
        except Exception as error:  # torch's exporters raise dozens of types
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            name = type(network).__name__
            raise UserError(f"{name} cannot be written as {out.suffix} ({reason}): try another format.") from error
        expected = [_as_list(network(batch)) for batch in images]
        pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            raise UserError(f"{out} computes outputs of other shapes than the model: export to the other format.")
        difference = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
        if not difference < TOLERANCE:
            raise UserError(
                f"{out} computes something else than the model (by {difference:.1e} of the largest output) and was not "
                "kept: export to the other format."
            )
        for written in Path(folder).iterdir():
            written.replace(out.parent / written.name)
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which log an error before they raise it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _dynamic_shapes(dynamic: bool) -> dict[str, Any]:
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if dynamic else {}
    return {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1), **free},)}


def _write_onnx(network: Any, images: Tensor, file: Path, about: str, outputs: Sequence[str], dynamic: bool) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(outputs)}
    shapes = _dynamic_shapes(dynamic)
    program: Any = torch.onnx.export(network, (images,), dynamo=True, verbose=False, **names, **shapes)
    program.model.metadata_props["mimkit"] = about
    large = sum(p.numel() * p.element_size() for p in network.parameters()) > 1.9e9  # protobuf allows 2 GB
    program.save(str(file), external_data=large)


def _read_onnx(file: Path, images: list[Tensor]) -> list[list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a file for any size may fail, and errors are raised as well
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [[torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})] for x in images]


def _write_program(network: Any, images: Tensor, file: Path, about: str, outputs: Sequence[str], dynamic: bool) -> None:
    program = torch.export.export(network, (images,), **_dynamic_shapes(dynamic))
    torch.export.save(program, file, extra_files={"mimkit": about})


def _read_program(file: Path, images: list[Tensor]) -> list[list[Tensor]]:
    module = torch.export.load(file).module()
    return [_as_list(module(x)) for x in images]


FORMATS: dict[str, Any] = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_program, _read_program)}
