"""Checkpoints: written so that a kill or a full disk never costs the last good one, read without pickle.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, which is all that
``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depict_kernels.models.checkpoints import FORMAT, misfits, read_checkpoint
from train.config import flatten, to_dict
from train.errors import UserError
from train.schema import Config


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` to ``path``: to a temporary name, flushed to the disk, then renamed.

    Whatever happens, ``path`` holds either the previous checkpoint or the whole new one. Raises ``UserError``
    where the file cannot be written (disk full, no permission); the temporary file is gone then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer turns the OSError of a failed write into its own RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            kept = "; the previous checkpoint is kept" if path.exists() else ""
            over = state.get("config", {}).get("run", {}).get("overwrite")
            raise UserError(
                f"{path}: cannot be saved: {cause.strerror or cause}{kept}. Make room (or fix the permissions) and run "
                f"the same command again{' without run.overwrite' if over else ''}: it continues"
            ) from None
        raise


def remove_leftovers(folder: Path) -> None:
    """Deletes what a save that was killed left behind."""
    for path in folder.glob("*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """:func:`read_checkpoint`; raises ``UserError`` with its words."""
    try:
        return read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], path: Path, saved: dict, config: Config
) -> None:
    """Loads ``weights`` (of checkpoint ``path``, whose configuration is ``saved``) into ``model``, strictly.

    Raises ``UserError`` naming the differing configuration keys, or else the first tensor that does not fit.
    """
    if wrong := misfits(weights, model.state_dict()):
        keys = differences(saved, to_dict(config), ("model.", "data.classes"))
        named = f" ({'; '.join(keys)})" if keys else ""
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{path}: checkpoint of another model{named}: {wrong[0]}{more}")
    model.load_state_dict(weights)


def differences(saved: dict, own: dict, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """``key: A in the checkpoint, B now`` for every key below ``prefixes`` that differs."""
    before, now = flatten(saved), flatten(own)
    return [
        f"{key}: {before.get(key)} in the checkpoint, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if key.startswith(prefixes) and before.get(key) != now.get(key)
    ]


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, in types that weights-only loading accepts."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (libraries may draw from it)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undoes ``rng_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power failure."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
