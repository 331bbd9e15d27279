"""Export a trained classifier to ONNX or to a torch.export program, which run without mimkit."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkit.errors import UserError

TOLERANCE = 1e-3  # largest difference between the outputs, relative to the largest output


def export_model(network: Any, out: Path, about: dict[str, Any]) -> float:
    """Export a network as OUT.onnx or OUT.pt2 for any batch size, read the file back, and compare the outputs.

    Args:
        network: a timm model with a `pretrained_cfg`.
        out: file to write; its ending selects the format.
        about: metadata that a user of the file needs (mean, std, label_names, ...), stored in it as JSON under the key
            `mimkit`.

    Returns:
        The largest difference between the outputs of the file and of the network, relative to the largest output.

    Raises:
        UserError: the ending is unknown, a package of the `export` extra is missing, the exporter fails, or the
            difference exceeds `TOLERANCE`. No file is left behind.
    """
    writers = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_program, _read_program)}
    if out.suffix not in writers:
        raise UserError(f"--out {out} has an unknown format: give a name that ends in .onnx or .pt2.")
    write, read = writers[out.suffix]
    shape = tuple(network.pretrained_cfg["input_size"])
    network.eval().requires_grad_(False)
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        file = Path(folder) / out.name  # a large network's weights are a second file, which this one refers to by name
        try:
            write(network, inputs[:2], file, json.dumps(about))
            outputs = read(file, inputs)
        except ImportError as error:
            raise UserError(f"--out {out} needs {error.name}: pip install mimkit[export].") from error
        except OSError:
            raise
        except Exception as error:  # torch's exporters raise dozens of types
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{type(network).__name__} cannot be written as {out.suffix} ({reason}): try another model or format."
            ) from error
        expected = network(inputs)
        difference = float((outputs - expected).abs().max() / expected.abs().max())
        if not difference < TOLERANCE:
            raise UserError(
                f"{out} computes something else than the model (by {difference:.1e} of the largest output) and was not "
                "kept: export to the other format."
            )
        for written in Path(folder).iterdir():
            written.replace(out.parent / written.name)
    return difference


def _dynamic_batch() -> dict[str, Any]:
    return {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}


def _write_onnx(network: Any, inputs: Tensor, file: Path, about: str) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program: Any = torch.onnx.export(network, (inputs,), dynamo=True, verbose=False, **names, **_dynamic_batch())
    program.model.metadata_props["mimkit"] = about
    large = sum(p.numel() * p.element_size() for p in network.parameters()) > 1.9e9  # protobuf allows 2 GB
    program.save(str(file), external_data=large)


def _read_onnx(file: Path, inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])


def _write_program(network: Any, inputs: Tensor, file: Path, about: str) -> None:
    torch.export.save(torch.export.export(network, (inputs,), **_dynamic_batch()), file, extra_files={"mimkit": about})


def _read_program(file: Path, inputs: Tensor) -> Tensor:
    return torch.export.load(file).module()(inputs)
