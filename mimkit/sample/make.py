"""Make the sample dataset from Debian's package of Fashion-MNIST.

apt-get download dataset-fashion-mnist && python make.py PACKAGE.deb

Writes the first 10,000 training images and the first 2,000 test images of Fashion-MNIST (Zalando, MIT license) to
train.parquet and test.parquet, as PNG with class labels.
"""

import gzip
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SPLITS = {"train": ("train", 10_000), "test": ("t10k", 2_000)}  # prefix of Debian's files, number of images to keep
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})


def encode_png(pixels: np.ndarray) -> dict[str, bytes | None]:
    """Encode an image (H W) uint8 as a cell of a `datasets.Image` column."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main(package: str) -> None:
    """Write train.parquet and test.parquet next to this script."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        source = Path(folder) / "usr/share/datasets/fashion-mnist"
        for split, (prefix, count) in SPLITS.items():
            images, labels = (
                gzip.decompress((source / f"{prefix}-{kind}-ubyte.gz").read_bytes())
                for kind in ("images-idx3", "labels-idx1")
            )
            pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
            columns = {
                "image": [encode_png(image) for image in pixels],
                "label": np.frombuffer(labels, np.uint8, offset=8)[:count].tolist(),
            }
            rows = datasets.Dataset.from_dict(columns, features=FEATURES)
            rows.to_parquet(Path(__file__).parent / f"{split}.parquet")


if __name__ == "__main__":
    main(sys.argv[1])
