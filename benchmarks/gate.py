"""Correctness before speed: a case is timed only after outputs and gradients passed the float64 error budget.

The truth is plain eager torch in float64. Our kernels may err as much as the budget of depict_kernels/testing.py
allows against the stock operators in the same dtype (backend "torch"); every other implementation against plain eager
torch, which it replaces. At most two images are compared (of full-resolution logits one on a CPU, where
float64 takes seconds), and fewer pixels where a float64 truth would not fit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import NOT_DIFFERENTIABLE, Case
from benchmarks.implementations import AUTO, COMPILED, OURS, build
from depict_kernels.testing import assert_within_budget, max_error

LARGEST_TRUTH = {"cpu": 6 << 30, "cuda": 32 << 30}  # bytes that the float64 computation may take
# Two float32 summation orders of which neither is the better one differ by more than the usual factor of 2.
FACTOR = {torch.float32: 4.0}


def compared(case: Case) -> Case:
    """The case whose values are compared: same operator, classes and head widths, at most two images."""
    small = case.smaller_batch(1 if case.device == "cpu" and case.family == "upsample" else 2)
    while 2 * small.eager_bytes() > LARGEST_TRUTH[case.device] and small.family == "upsample":
        sizes = (*small.sizes[:2], *(max(1, size // 2) for size in small.sizes[2:]))
        small = dataclasses.replace(small, sizes=sizes)
    return small


def check(case: Case, name: str, function: Callable) -> dict:
    """Raises AssertionError with the figures, or gives the errors that the record keeps."""
    # A compiled function is compiled for each shape: it is compared at the one that is timed.
    small = case if name in COMPILED else compared(case)
    if small.sizes[1:] != case.sizes[1:]:
        function = build(small, name)  # some functions hold the size
    if case.operator in NOT_DIFFERENTIABLE:
        return {"checked": small.shape, **_check_labels(small, name, function)}
    truth = _cached(small, "eager", True)
    # For the upsample operators stock torch is plain eager torch, operator by operator.
    stock = "torch" if name in (*OURS, *AUTO) and case.family != "upsample" else "eager"
    peer = _cached(small, stock, False)
    values = peer if name == stock else _values(small, function, False)
    result = {"checked": small.shape, "error": [], "peer_error": []}
    for i, (value, other, exact) in enumerate(zip(values, peer, truth)):
        what = f"gradient {i - 1}" if i else "output"
        largest = exact.abs().max().item()
        result["error"].append(max_error(value, exact) / (largest or 1.0))
        result["peer_error"].append(max_error(other, exact) / (largest or 1.0))
        if result["peer_error"][-1] == float("inf"):
            raise AssertionError(f"{what}: plain eager torch itself is not finite; the case proves nothing")
        # A gradient sums multiples of the upstream one, whose largest is about 4; a loss's is 1 and divided by pixels.
        scale = 4.0 if i and truth[0].ndim else 0.0
        assert_within_budget(value, other, exact, factor=FACTOR.get(case.dtype, 2.0), scale=scale, what=what)
    return result


@functools.lru_cache(maxsize=3)
def _cached(case: Case, name: str, double: bool) -> list[Tensor]:
    return _values(case, build(case, name), double)


def _values(case: Case, function: Callable, double: bool) -> list[Tensor]:
    """Output and gradients, of a decoder the patches' alone (its parameters' are sums over all of them)."""
    inputs = case.inputs()
    if double:
        inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    if not case.backward:
        with torch.no_grad():
            return [function(*inputs).detach()]
    chosen = case.differentiable[:1] if case.family == "decoder" else case.differentiable
    leaves = [t.detach().clone().requires_grad_(i in case.differentiable) for i, t in enumerate(inputs)]
    out = function(*leaves)
    upstream = torch.ones_like(out) if out.ndim == 0 else _upstream(out)
    grads = torch.autograd.grad(out, [leaves[i] for i in chosen], upstream)
    return [out.detach(), *grads]


def _upstream(out: Tensor) -> Tensor:
    """One random gradient of the output for every precision: its values are exact in bfloat16."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    return values.to(out.device, out.dtype)


def _check_labels(case: Case, name: str, function: Callable) -> dict:
    """Labels may differ where two classes are equal within rounding, and nowhere else."""
    inputs = case.inputs()
    logits = inputs[0]
    with torch.no_grad():
        found = function(*inputs)
        high = F.interpolate(logits.double(), size=(case.H, case.W), mode="bilinear", align_corners=False)
        best = high.topk(2, 1)
        # Interpolated float32 logits carry an error of a few units in the last place of the largest.
        tie = best.values[:, 0] - best.values[:, 1] <= 4e-7 * logits.abs().max()
        if case.operator == "upsample_argmax":
            wrong = found.long() != best.indices[:, 0]
            count, allowed = int(wrong.sum()), bool((tie | ~wrong).all())
        else:
            counts = torch.bincount((inputs[1] * case.C + best.indices[:, 0]).flatten(), minlength=case.C**2)
            count = int((found - counts.view_as(found)).abs().sum())
            allowed = count <= 2 * int(tie.sum())  # a pixel moves from one count to another
    if not allowed:
        raise AssertionError(f"{name}: {count} labels differ that are no ties of two classes within rounding")
    return {"mismatches": count}


def forget() -> None:
    """Gives back the memory of the last truth."""
    _cached.cache_clear()
