"""What tests and benchmarks share: input makers and the float64 error budget.

The budget (numbers policy): err(kernel, float64) <= 2 * err(same maths in torch, same dtype, float64) + a few
ulp, on outputs and every gradient, so that no tolerance is picked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from a float64 truth; NaN or a missing infinity counts as infinite error."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.shape != truth.shape:
        raise AssertionError(f"shape {tuple(value.shape)} where {tuple(truth.shape)} is right")
    if truth.numel() == 0:
        return 0.0
    both_nan = value.isnan() & truth.isnan()
    same = (value == truth) | both_nan
    return (
        torch.where(same, 0.0, (value - truth).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
    )


def assert_within_budget(
    value: Tensor,
    peer: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    scale: float = 0.0,
    what: str = "value",
) -> None:
    """Asserts err(value) <= factor * err(peer) + ulps * eps * max(|truth|, scale), errors against float64.

    ``value`` and ``peer`` have the same dtype, whose eps counts. ``scale`` is the size of the terms where the
    truth is a difference that cancels. Raises AssertionError with all figures.
    """
    if value.dtype != peer.dtype:
        raise AssertionError(f"{what}: dtype {value.dtype}, the peer has {peer.dtype}")
    error, allowed = max_error(value, truth), factor * max_error(peer, truth)
    finite = truth[truth.isfinite()].abs()
    scale = max(scale, finite.max().item() if finite.numel() else 0.0)
    allowed += ulps * torch.finfo(value.dtype).eps * scale
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} against float64 is above the budget {allowed:.3e} "
            f"(peer {max_error(peer, truth):.3e}, scale {scale:.3e})"
        )


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs ``function`` on fresh leaves of ``inputs`` and differentiates every floating one.

    ``upstream`` is the gradient of the output (cast to its dtype); None means ones.
    """
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.is_floating_point())
        for t in inputs
    ]
    out = function(*leaves)
    grad = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    grads = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad)
    return out.detach(), grads


def check_against_float64(
    kernel: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    scale: float = 0.0,
    gradient_scale: float = 1.0,
) -> None:
    """Asserts that output and every gradient of ``kernel`` are within the budget.

    The truth is ``peer`` on float64 copies of the inputs; the peer's own error is measured at the inputs'
    dtype. Both are differentiated with one random upstream gradient. ``scale`` is the size of the terms that
    the output is a difference of, where it can cancel to 0; ``gradient_scale`` is the same of the gradients, in
    multiples of the upstream gradient.
    """
    truth_inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    shape = peer(*truth_inputs).shape
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs[0].device)
    upstream = upstream.to(inputs[0].dtype).double()  # the same gradient for every precision
    truth, truth_grads = value_and_gradients(peer, truth_inputs, upstream)
    peer_out, peer_grads = value_and_gradients(peer, inputs, upstream)
    out, grads = value_and_gradients(kernel, inputs, upstream)
    assert_within_budget(out, peer_out, truth, factor=factor, ulps=ulps, scale=scale, what="output")
    largest = upstream.abs().max().item() if upstream.numel() else 0.0  # a gradient sums multiples of it
    largest *= gradient_scale
    for i, (g, p, t) in enumerate(zip(grads, peer_grads, truth_grads)):
        assert_within_budget(g, p, t, factor=factor, ulps=ulps, scale=largest, what=f"gradient {i}")


def logits_and_target(
    batch: int,
    classes: int,
    low: tuple[int, int],
    high: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.int64,
    sharpness: float = 1.0,
    smooth: bool = False,
    ignored: float = 0.1,
    ignore_index: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Logits (B, C, h, w) and a target (B, H, W) with a share of ignored pixels.

    ``smooth`` gives the large regions of a trained model (target and logits agree); otherwise both are
    independent noise. ``sharpness`` multiplies the logits.
    """
    from depict_kernels.ops import default_ignore_index

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, *low, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch, *high), generator=generator)
    if smooth and batch:
        coarse = torch.randn(batch, classes, 3, 3, generator=generator, dtype=torch.float64)
        logits = 4 * torch.nn.functional.interpolate(coarse, low, mode="bicubic", align_corners=True)
        target = torch.nn.functional.interpolate(logits, high, mode="bilinear").argmax(1)
    ignore_index = default_ignore_index(classes) if ignore_index is None else ignore_index
    mask = torch.rand(target.shape, generator=generator) < ignored
    target = torch.where(mask, ignore_index, target)
    return (sharpness * logits).to(dtype).to(device), target.to(target_dtype).to(device)
