"""Kernels that prove themselves on this GPU before ``auto`` takes them.

Where benchmarks have a record of an architecture, ``auto`` goes by it. Elsewhere the kernels of the loss, the label map
and the confusion matrix are still what a user wants: stock torch moves many times the bytes. But a compiler that nobody
has tried may get a kernel wrong. So the first call of a class of shapes computes a small example of it with the kernel,
twice, and in float64 with stock operators. Where they disagree, or the kernel cannot run at all, ``auto`` says so once
and stays with stock torch.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from depict_kernels.shape_classes import shape_class

_GRID = (4, 5)
# class of shapes -> classes and factor of its example
_EXAMPLES = {
    shape_class("upsample_argmax", classes=c, grid=_GRID, size=(_GRID[0] * f, _GRID[1] * f)): (c, f)
    for c in (19, 150, 300)
    for f in (16, 4)
}
SHAPES = tuple(_EXAMPLES)

# Far above rounding, far below what a wrong address or a lost barrier makes.
_TOLERANCE = 1e-4

_verdicts: dict[tuple, str | None] = {}
_lock = threading.RLock()


def why_not(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype, shape: str | None
) -> str | None:
    """None where the kernel agreed with float64 on this device (checked once per process), else what went wrong."""
    if shape not in _EXAMPLES:
        return f"there is no example of {shape or 'its shape'}"
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # not the time for it; the next call may ask again
            return "it was not checked before this CUDA graph"
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    key = (backend, operator, device, dtype, shape)
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = reason = _run(*key)
            if reason is not None:
                warnings.warn(
                    f"the {backend} kernel of {operator} failed its check on this device ({shape}, {dtype}): {reason}. "
                    "auto takes stock torch instead, which is right but slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _verdicts[key]


def _run(backend: str, operator: str, device: torch.device, dtype: torch.dtype, shape: str) -> str | None:
    """In a thread of its own: the call that asks may be traced, under vmap or autocast, or in inference mode."""

    def check() -> str | None:
        # Backward stays in this thread: the one worker that autograd has for a GPU may be what waits for this check.
        with _on(device), torch.autograd.set_multithreading_enabled(False):
            return _CHECKS[operator](backend, device, dtype, *_EXAMPLES[shape])

    with ThreadPoolExecutor(1, "depict_kernels self-check") as thread:
        try:
            return thread.submit(check).result()
        except Exception as error:  # a compiler's, a driver's: whatever it is, auto has another way
            return next(iter(f"{type(error).__name__}: {error}".splitlines()))


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Lets the check wait for the device where the caller forbade it (torch.cuda.set_sync_debug_mode)."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _example(device: torch.device, dtype: torch.dtype, classes: int, factor: int):
    """Logits (2, C, 4, 5) in dtype, target (2, H, W) uint8 or int64 with ignored pixels, the size (H, W)."""
    from depict_kernels.testing import logits_and_target

    size = (_GRID[0] * factor, _GRID[1] * factor)
    logits, target = logits_and_target(2, classes, _GRID, size, dtype=dtype, sharpness=2.0, device=device)
    return logits, target, size


def _loss(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    from depict_kernels.ops import upsample_cross_entropy
    from depict_kernels.testing import max_error, value_and_gradients

    logits, target, _ = _example(device, dtype, classes, factor)

    def loss(x: torch.Tensor, name: str):
        value, (grad,) = value_and_gradients(
            lambda x: upsample_cross_entropy(x, target.to(x.device), backend=name), [x]
        )
        return {"loss": value, "gradient": grad}

    # On the CPU: stock operators on a GPU refuse to run under torch.use_deterministic_algorithms.
    truth = loss(logits.cpu().double(), "torch")
    truth = {what: value.to(device) for what, value in truth.items()}
    ours, again = loss(logits, backend), loss(logits, backend)
    for what, value in ours.items():
        error, scale = max_error(value, truth[what]), truth[what].abs().max().item()
        allowed = (_TOLERANCE + 4 * torch.finfo(value.dtype).eps) * scale
        if not error <= allowed:
            return f"its {what} is {error:.1e} from float64, where {allowed:.1e} is allowed"
        if not torch.equal(value, again[what]):
            return f"its {what} differed between two runs"
    return None


def _labels(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    from depict_kernels.ops import upsample_argmax

    logits, _, size = _example(device, dtype, classes, factor)
    ours = upsample_argmax(logits, size, backend=backend)
    if ours.min() < 0 or ours.max() >= classes:
        return f"a label lies outside of 0 to {classes - 1}"
    z = torch.nn.functional.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
    short = (z.amax(1) - z.gather(1, ours.unsqueeze(1)).squeeze(1)).max().item()
    if not short <= _TOLERANCE * z.abs().max().item():
        return f"a label's logit is {short:.1e} below the largest"
    if not torch.equal(ours, upsample_argmax(logits, size, backend=backend)):
        return "its labels differed between two runs"
    return None


def _counts(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    from depict_kernels.ops import upsample_confusion

    logits, target, size = _example(device, dtype, classes, factor)
    ours = upsample_confusion(logits, target, backend=backend)
    expected = upsample_confusion(logits.double(), target, backend="torch")
    if ours.sum() != expected.sum():
        return f"it counted {ours.sum().item()} pixels of {expected.sum().item()}"
    # Both labels of a pixel may be right where two logits are within rounding.
    z = torch.nn.functional.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
    top = z.topk(2, dim=1).values
    ties = (top[:, 0] - top[:, 1] <= 2 * _TOLERANCE * z.abs().max()).sum()
    wrong = (ours - expected).abs().sum()
    if wrong > 2 * ties:
        return f"{wrong.item()} counts are not those of float64"
    again = upsample_confusion(logits, target, backend=backend)
    return None if torch.equal(ours, again) else "its counts differed between two runs"


_CHECKS = {
    "upsample_cross_entropy": _loss,
    "upsample_argmax": _labels,
    "upsample_confusion": _counts,
}
OPERATORS = frozenset(_CHECKS)
