"""Kernels that prove themselves on this GPU before ``auto`` takes them.

Where benchmarks have measured a class of shapes on an architecture, ``auto`` goes by that. Elsewhere the kernels of the
loss, the label map and the confusion matrix are still what a user wants: stock torch moves many times the bytes. But a
compiler that nobody has tried may get a kernel wrong. So the first call of a class of shapes computes a small example
of it with the kernel, twice, and on the CPU in float64 with stock operators. Where they disagree, or the kernel cannot
run at all, ``auto`` says so once and stays with stock torch.
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
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (backend, operator, device, dtype, shape)
    if key in _verdicts:
        return _verdicts[key]
    # Not the time for it; the next call may ask again.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it was not checked before this CUDA graph"
    with _lock:
        if key not in _verdicts:
            try:
                reason = _run(*key)
            except torch.OutOfMemoryError:  # says nothing of the kernel: the next call asks again
                return "there was no memory left to check it"
            _verdicts[key] = reason
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
        with _on(device):
            return _CHECKS[operator](backend, device, dtype, *_EXAMPLES[shape])

    with ThreadPoolExecutor(1, "depict_kernels self-check") as thread:
        try:
            return thread.submit(check).result()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, a driver's: whatever it is, auto has another way
            return next(iter(f"{type(error).__name__}: {error}".splitlines()))


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Lets the check wait for the device where the caller forbade it (torch.cuda.set_sync_debug_mode)."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    if mode:  # setting it at all makes torch warn
        torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


# The kernels are called below the public functions: nothing goes into the record of bad labels, and autograd's engine,
# whose thread for this GPU may be the one that waits for the check, is not asked. Float64 is computed on the CPU: it
# takes no memory of the GPU's, and use_deterministic_algorithms forbids stock operators only there.


def _example(dtype: torch.dtype, classes: int, factor: int):
    """On the CPU: logits (2, C, 4, 5) in dtype, target (2, H, W) with ignored pixels, ignore_index, the size (H, W)."""
    from depict_kernels.ops import default_ignore_index
    from depict_kernels.testing import logits_and_target

    size = (_GRID[0] * factor, _GRID[1] * factor)
    logits, target = logits_and_target(2, classes, _GRID, size, dtype=dtype, sharpness=2.0)
    return logits, target, default_ignore_index(classes), size


def _loss(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    plain = _loss_with(backend, device, dtype, classes, factor, weighted=False)
    return plain or _loss_with(backend, device, dtype, classes, factor, weighted=True)


def _loss_with(backend, device, dtype, classes, factor, weighted: bool) -> str | None:
    """The mean; or with class weights and label smoothing each pixel's loss, with an upstream gradient of its own."""
    from depict_kernels.ops.reference import upsample as reference
    from depict_kernels.testing import max_error

    logits, target, ignored, _ = _example(dtype, classes, factor)
    library = torch.ops.depict_kernels
    if weighted:
        options = (torch.linspace(0.5, 2.0, classes), ignored, 0.1)
        upstream = torch.linspace(-1.0, 1.0, target.numel()).view(target.shape)
        truth = (
            reference.cross_entropy_forward(logits.double(), target, *options, "none", False)[0],
            reference.cross_entropy_backward(upstream.double(), logits.double(), target, *options),
        )
    else:
        options = (None, ignored, 0.0)
        truth = reference.cross_entropy_forward(logits.double(), target, *options, "mean", True)[:2]
    there = lambda t: None if t is None else t.to(device)
    inputs = (there(logits), there(target), there(options[0]), *options[1:])

    def run() -> list[torch.Tensor]:
        reduction = "none" if weighted else "mean"
        loss, grad, report = library.upsample_cross_entropy(*inputs, reduction, True, False, backend)
        if weighted:
            grad = library.upsample_cross_entropy_backward(there(upstream), *inputs, backend)
        return [result.cpu() for result in (loss, grad, report)]

    (*ours, report), again = run(), run()
    for what, value, exact in zip(("loss", "gradient"), ours, truth):
        error, scale = max_error(value, exact), exact.abs().max().item()
        allowed = (_TOLERANCE + 4 * torch.finfo(value.dtype).eps) * scale
        if not error <= allowed:
            return f"its {what} is {error:.1e} from float64, where {allowed:.1e} is allowed"
    if report[0] != 0:
        return "it took a class for a bad label"
    for what, value, other in zip(("loss", "gradient"), ours, again):
        if not torch.equal(value, other):
            return f"its {what} differed between two runs"
    return None


def _labels(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    from depict_kernels.ops.reference.upsample import upsample

    logits, _, _, size = _example(dtype, classes, factor)
    z, inputs = upsample(logits.double(), size), logits.to(device)
    run = lambda: torch.ops.depict_kernels.upsample_argmax(inputs, size, torch.int64, backend).cpu()
    ours = run()
    if ours.min() < 0 or ours.max() >= classes:
        return f"a label lies outside of 0 to {classes - 1}"
    short = (z.amax(1) - z.gather(1, ours.unsqueeze(1)).squeeze(1)).max().item()
    if not short <= _TOLERANCE * z.abs().max().item():
        return f"a label's logit is {short:.1e} below the largest"
    return None if torch.equal(ours, run()) else "its labels differed between two runs"


def _counts(backend: str, device: torch.device, dtype: torch.dtype, classes: int, factor: int) -> str | None:
    from depict_kernels.ops.reference.upsample import count, upsample

    logits, target, ignored, size = _example(dtype, classes, factor)
    inputs = logits.to(device), target.to(device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros((classes, classes), dtype=torch.int64, device=device)
        report = torch.ops.depict_kernels.upsample_confusion(*inputs, ignored, out, backend)
        return out.cpu(), report.cpu()

    (ours, report), expected = run(), torch.zeros((classes, classes), dtype=torch.int64)
    z = upsample(logits.double(), size)
    count(z.argmax(1), target, ignored, expected)
    if ours.sum() != expected.sum():
        return f"it counted {ours.sum().item()} pixels of {expected.sum().item()}"
    # Both labels of a pixel may be right where two logits are within rounding.
    top = z.topk(2, dim=1).values
    ties = (top[:, 0] - top[:, 1] <= 2 * _TOLERANCE * z.abs().max()).sum()
    wrong = (ours - expected).abs().sum()
    if wrong > 2 * ties:
        return f"{wrong.item()} counts are not those of float64"
    if report[0] != 0:
        return "it took a class for a bad label"
    return None if torch.equal(ours, run()[0]) else "its counts differed between two runs"


_CHECKS = {
    "upsample_cross_entropy": _loss,
    "upsample_argmax": _labels,
    "upsample_confusion": _counts,
}
OPERATORS = frozenset(_CHECKS)
