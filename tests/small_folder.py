"""A data set of a few noise images in ADE20K's layout, for the tests of what reads it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def png(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("wall\nfloor\nchair\n")
    from train.ade20k import load_classes

    return load_classes(path)


@pytest.fixture
def folder(tmp_path):
    """Three images of 20 x 30 in both splits, with labels 0..3."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for split in ("training", "validation"):
        for name in "abc":
            image = root / "images" / split / f"{name}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(image)
            labels = rng.integers(0, 4, (20, 30), dtype=np.uint8)
            png(labels, root / "annotations" / split / f"{name}.png")
    return root
