"""A data set and a model so small that training takes milliseconds: for the tests of the trainer."""

import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from train.config import Config, load_config

ROOT = Path(__file__).parent.parent
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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


def arguments(keys: dict[str, Any]) -> list[str]:
    """Dotted keys as the command takes them."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()
    ]


def configuration(data: Path, runs: Path, **overrides: Any) -> Config:
    return load_config([], settings(data, runs, **overrides))


def write_config(path: Path, keys: dict[str, Any]) -> Path:
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(nested))
    return path


class Started:
    """``python train/run.py ARGUMENTS`` in a process of its own, as one of ``size`` that talk over ``port``.

    The processes are forked off a server that has imported everything, since importing takes much longer than
    these runs do. What one prints goes to ``output``.
    """

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        rank: int = 0,
        size: int = 1,
        port: int = 0,
        ctrl_c: Any = signal.default_int_handler,
    ) -> None:
        self.output = output
        self.output.write_text("")
        self.process = _context().Process(
            target=_run, args=(arguments, str(output), rank, size, port, ctrl_c)
        )
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """The exit status (negative: killed by that signal)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.output.read_text()


def start_all(arguments: list[str], folder: Path, size: int) -> list[Started]:
    """``size`` processes that train or evaluate together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Started(arguments, folder / f"output_{rank}.txt", rank, size, port) for rank in range(size)]


def run_all(arguments: list[str], folder: Path, size: int = 1) -> str:
    """Runs to the end, which must be a good one; what the main process printed."""
    started = start_all(arguments, folder, size)
    codes = [one.wait() for one in started]
    assert codes == [0] * size, "\n".join(one.text for one in started)
    return started[0].text


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run", "train.engine", "train.run", "train.plots"])
    # The server imports by its own path, which older Pythons do not hand over.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    return context


def _run(arguments: list[str], output: str, rank: int, size: int, port: int, ctrl_c: Any) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if size > 1:
        values = (rank, rank, size, "127.0.0.1", port)
        os.environ.update({name: str(value) for name, value in zip(LAUNCHER, values)})
    signal.signal(signal.SIGINT, ctrl_c)  # a job in the background starts with it ignored
    from train import run

    sys.exit(run.main(arguments))


def torchrun(arguments: list[str], processes: int, timeout: float = 120) -> subprocess.CompletedProcess:
    """The launcher itself with fresh interpreters."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         str(ROOT / "train" / "run.py"), *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
        check=False,
    )  # fmt: skip
