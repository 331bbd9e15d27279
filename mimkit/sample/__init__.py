"""The packaged sample dataset: 12,000 images of Fashion-MNIST. make.py describes how it was made."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def load_images(count: int) -> list[Image.Image]:
    """Return `count` evenly spaced training images, 28x28 px in grayscale."""
    import pyarrow.parquet as pq

    column = pq.read_table(Path(__file__).with_name("train.parquet"), columns=["image"])["image"]
    rows = np.linspace(0, len(column) - 1, count).astype(int)
    return [Image.open(io.BytesIO(column[int(row)].as_py()["bytes"])) for row in rows]
