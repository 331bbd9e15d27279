"""Export any network of mimkit: a classifier, an encoder, a segmenter, or the maps of a detector."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.io.onnx import export_model
from mimkit.models.factory import create_network, has_weights, input_of
from mimkit.models.pretrained import network_folder
from mimkit.tasks.dense_checkpoint import find_dense, read_dense
from mimkit.tasks.detection import Detector
from mimkit.tasks.segmentation import Segmenter


class Exportable(NamedTuple):
    """A network, and what a file of it needs."""

    network: nn.Module  # from normalized images to a tensor, or to a tuple of tensors
    outputs: list[str]  # names of the outputs
    shape: tuple[int, int, int]  # input size
    about: dict[str, Any]  # metadata for a user of the file
    any_size: bool = True  # whether images of any size make sense


class Encoder(nn.Module):
    """A timm network whose outputs are its pooled features and the last map at each stride.

    Raises:
        UserError: the network returns no maps.
    """

    def __init__(self, network: Any, name: str):
        super().__init__()
        if not hasattr(network, "forward_intermediates"):
            raise UserError(f"--model {name} has neither a classifier nor maps. Choose another network.")
        infos = network.feature_info
        infos = infos if isinstance(infos, list) else infos.info
        maps = {info["reduction"]: i for i, info in enumerate(infos)}
        self.network, self.indices = network, list(maps.values())
        self.outputs = ["features", *(f"map_{stride}" for stride in maps)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b c H W) -> features (b d) and maps (b d h w), from fine to coarse"""
        tokens, maps = self.network.forward_intermediates(x, indices=self.indices)
        return self.network.forward_head(tokens), *maps


class DetectorMaps(nn.Module):
    """The feature pyramid of a detector, without the heads: the number of regions differs between images."""

    outputs = ("map_4", "map_8", "map_16", "map_32", "map_64")

    def __init__(self, detector: Detector):
        super().__init__()
        self.backbone = detector.rcnn.backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b c H W) -> maps (b d h w) of the image padded to a multiple of 32, from fine to coarse"""
        return tuple(self.backbone(x).values())


def find_exportable(model: str) -> Exportable:
    """Load the network to export from a run, a folder, or a timm name with a tag.

    Raises:
        UserError: the network has no weights.
    """
    if folder := find_dense(model, "segmenter"):
        segmenter, about = read_dense(folder, "segmenter", Segmenter)
        size = about["crop"] or [about["short"]] * 2
        return _dense(segmenter, ["logits"], size, about)
    if folder := find_dense(model, "detector"):
        detector, about = read_dense(folder, "detector", Detector)
        about |= {key: detector._model_args[key] for key in ("short", "long")}
        return _dense(DetectorMaps(detector), list(DetectorMaps.outputs), [about["short"]] * 2, about)
    place = network_folder(model)
    if not has_weights(place):
        raise UserError(f"--model {model} has no weights. Pass a run, a converted folder, or a timm name with a tag.")
    network = create_network(place)
    spec = input_of(network)
    shape = (spec.in_chans, *spec.size)
    about = spec._asdict() | {"size": None, "in_chans": None, "input_size": shape}
    about |= {"label_names": network.pretrained_cfg.get("label_names")}
    about = {key: value for key, value in about.items() if value is not None}
    if network.num_classes:
        return Exportable(network, ["logits"], shape, about, any_size=False)
    encoder = Encoder(network, model)
    return Exportable(encoder, encoder.outputs, shape, about)


def _dense(network: nn.Module, outputs: list[str], size: list[int], description: dict[str, Any]) -> Exportable:
    keys = ("mean", "std", "class_names", "class_values", "short", "long", "crop", "flip")
    about = {key: description[key] for key in keys if key in description} | {"interpolation": "bilinear"}
    shape = (description["in_chans"], size[0], size[1])
    return Exportable(network, outputs, shape, about | {"input_size": shape})


def export(model: str, out: str) -> str:
    """Export a network to ONNX or a torch.export program, and return a line about the file.

    Args:
        model: see `find_exportable`.
        out: file to write: .onnx or .pt2.
    """
    found = find_exportable(model)
    difference, any_size = export_model(
        found.network, Path(out), found.about, found.shape, found.outputs, found.any_size
    )
    size = "any size" if any_size else "{}x{}".format(*found.shape[1:])
    what = f"{', '.join(found.outputs)} of images of {size}"
    return f"wrote {out}: {what}, equal to the model up to {difference:.1e} of its largest output"
