"""A data set and a model so small that training takes milliseconds: for the tests of the trainer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from train.config import Config, load_config

ROOT = Path(__file__).parent.parent
SIDE = 32
CLASSES = ("sky", "grass", "wall", "door", "roof")


def make_data(root: Path, train_images: int = 12, val_images: int = 4) -> Path:
    """ADE20K's layout; class k has its own colour. Every other image is unlabelled but for one corner."""
    rng = np.random.default_rng(0)
    for split, count in (("training", train_images), ("validation", val_images)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            blocks = rng.integers(0, len(CLASSES), (4, 4))
            labels = blocks.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
            colours = np.array([[250, 30, 30], [30, 250, 30], [30, 30, 250], [240, 240, 30], [30, 240, 240]])
            image = colours[labels] + rng.normal(0, 12, (SIDE, SIDE, 3))
            annotation = labels + 1
            if i % 2:
                annotation[6:] = 0
                annotation[:, 6:] = 0
            stem = f"image_{i:03d}"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{stem}.jpg")
            Image.fromarray(annotation.astype(np.uint8)).save(root / "annotations" / split / f"{stem}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def settings(data: Path, runs: Path, **overrides: Any) -> dict[str, Any]:
    """Dotted keys of a run that ends in seconds; ``overrides`` have __ for the dot."""
    keys = {
        "run.name": "tiny",
        "run.root": str(runs),
        "data.root": str(data),
        "data.classes": str(data / "classes.txt"),
        "data.crop_size": [SIDE, SIDE],
        "data.base_size": SIDE,
        "data.batch_size": 4,
        "data.workers": 0,
        "model.name": "depict_sa_vit_tiny",
        "model.pretrained": False,
        "model.drop_path_rate": 0.0,
        "model.backbone_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8},
        "model.decoder_kwargs": {"depth": 1, "num_heads": 2, "head_dim": 16},
        "optim.name": "adamw",
        "train.epochs": None,
        "train.steps": 6,
        "train.log_every": 1,
        "train.save_every": 100,
        "train.eval_every": 100,
        "train.threads": 1,
        "train.device": "cpu",
        "train.tensorboard": False,
        "eval.mode": "whole",
        "eval.resize": SIDE,
    }
    return keys | {key.replace("__", "."): value for key, value in overrides.items()}


def configuration(data: Path, runs: Path, **overrides: Any) -> Config:
    return load_config([], settings(data, runs, **overrides))


def write_config(path: Path, keys: dict[str, Any]) -> Path:
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(nested))
    return path


def environment() -> dict[str, str]:
    """One thread per process and none of a surrounding launcher's variables."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}


def run_py(*arguments: str, processes: int = 1, timeout: float = 120) -> subprocess.CompletedProcess:
    """``python train/run.py``, or torchrun with several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, str(ROOT / "train" / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=ROOT,
        check=False,
    )
