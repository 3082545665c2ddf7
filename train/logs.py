"""What a run reports: metrics.jsonl, TensorBoard, and the progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from train.errors import UserError

KINDS = ("train", "eval")


class RunLog:
    """Lines of metrics.jsonl with their echo in TensorBoard and on the terminal.

    Only the main process's log writes; the others' do nothing, so that callers need not ask.
    """

    def __init__(
        self, folder: Path, total_steps: int, *, main: bool = True, tensorboard: bool = True
    ) -> None:
        self.main = main
        self.total_steps = total_steps
        self.path = folder / "metrics.jsonl"
        self._folder = folder
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._progress: Progress | None = None
        self._said = time.monotonic()
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def start(self, step: int, evaluated_step: int) -> None:
        """Drops what an interrupted run wrote after its checkpoint, and starts the progress display."""
        if not self.main:
            return
        trim_metrics(self.path, step, evaluated_step)
        if self._tensorboard:
            self._writer = self._open_tensorboard(step)
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._progress.add_task("training", total=self.total_steps, completed=step, text="")
            self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def say(self, text: str) -> None:
        """A line of text on the terminal."""
        if self.main:
            self._said = time.monotonic()
            self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """A step is done: the bar moves, or, without a terminal, a line says so after a minute without any."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        elif self._minute_of_silence():
            self.say(f"step {step}/{self.total_steps}")

    def train(self, step: int, values: dict[str, float]) -> None:
        """A log step of the training: at least loss, lr, epoch and images_per_s."""
        self._write("train", step, values)
        left = f"{values['images_per_s']:.1f} images/s"
        text = f"step {step}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  {left}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            remaining = timedelta(seconds=round((self.total_steps - step) * values["seconds_per_step"]))
            self.say(f"{text}  {remaining} left")

    def evaluating(self, done: int, total: int, images_per_s: float) -> None:
        """Progress of an evaluation: on a terminal beside the bar, elsewhere a line a minute and one at the end."""
        if not self.main:
            return
        if done == 1:  # the minute begins here
            self._said = time.monotonic()
        text = f"evaluating {done}/{total}  {images_per_s:.1f} images/s"
        if self._progress is not None:
            self._progress.update(self._task, text=text)
        elif done == total or self._minute_of_silence():
            self.say(text)

    def _minute_of_silence(self) -> bool:
        return time.monotonic() - self._said > 60

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """An evaluation: miou, pixel_accuracy, mean_accuracy."""
        self._write("eval", step, values)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        self.say(f"step {step}/{self.total_steps}  evaluation  {shown}")

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.main:
            return
        # JSON has no NaN: such a value becomes null.
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **line}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(f"{kind}/{key}", value, step)

    def _open_tensorboard(self, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("note: no TensorBoard files: `pip install tensorboard`, or --train.tensorboard false")
            return None
        # purge_step hides what an interrupted run wrote after the checkpoint.
        return SummaryWriter(self._folder / "tensorboard", purge_step=step + 1 if step else None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those that a kill or a full disk cut short, or that somebody else wrote."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and line.get("kind") in KINDS and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def trim_metrics(path: Path, step: int, evaluated_step: int) -> None:
    """Keeps training lines up to ``step`` and evaluations up to ``evaluated_step``: the rest comes again."""
    last = {"train": step, "eval": evaluated_step}
    lines = [line for line in read_metrics(path) if line["step"] <= last[line["kind"]]]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)
