"""Make the sample set from Debian's package: python make.py PACKAGE.deb (apt-get download dataset-fashion-mnist)

The first 10,000 training and 2,000 test images of Fashion-MNIST (Zalando, MIT), as PNG in parquet, with class names.
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
PARTS = {"train": ("train", 10_000), "test": ("t10k", 2_000)}
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})


def png(pixels: np.ndarray) -> dict[str, bytes | None]:
    """(H W) uint8 -> a cell of an image column"""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main(package: str) -> None:
    """Write train.parquet and test.parquet beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        for part, (prefix, count) in PARTS.items():
            read = [
                gzip.decompress(
                    (Path(folder) / "usr/share/datasets/fashion-mnist" / f"{prefix}-{kind}-ubyte.gz").read_bytes()
                )
                for kind in ("images-idx3", "labels-idx1")
            ]
            images = np.frombuffer(read[0], np.uint8, offset=16).reshape(-1, 28, 28)[:count]
            labels = np.frombuffer(read[1], np.uint8, offset=8)[:count].tolist()
            rows = datasets.Dataset.from_dict({"image": [png(i) for i in images], "label": labels}, features=FEATURES)
            rows.to_parquet(Path(__file__).parent / f"{part}.parquet")


if __name__ == "__main__":
    main(sys.argv[1])
