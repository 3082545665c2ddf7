"""Loss, label map and confusion matrix of bilinearly upsampled logits: public functions and registration.

All three take low-resolution logits (B, C, h, w) and mean F.interpolate(mode="bilinear",
align_corners=False) to the target's size. Kernel backends never store the upsampled (B, C, H, W) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from depict_kernels import backends
from depict_kernels.ops import _library
from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.ops.stock import upsample as stock
from depict_kernels.ops.targets import (
    check_target_tensor,
    default_ignore_index,
    raise_if_bad,
    record_bad_target,
)

_STEM = "upsample"
_REDUCTIONS = ("mean", "sum", "none")
_LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    check_targets: bool | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of logits upsampled bilinearly (align_corners=False) to the target's size.

    Means F.cross_entropy(F.interpolate(logits.float(), target.shape[-2:], mode="bilinear"), target, ...),
    with one documented difference: where no valid pixel carries weight, "mean" gives 0 with gradient 0
    instead of NaN.

    Args:
        logits: (B, C, h, w) float16, bfloat16, float32 or float64, any strides. To mask a class use a large negative
            number such as -1e4: of infinite logits some backends make NaN, as torch does, where others do not.
        target: (B, H, W) uint8 or a signed integer dtype; classes 0..C-1 and ignore_index.
        ignore_index: label that takes no part; None means 255 up to 255 classes and -100 above.
        weight: (C,) class weights w_c or None; they get no gradient. An infinite one makes the loss infinite where
            its class occurs, with label smoothing at every valid pixel, as in torch's.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        reduction: "mean" (over the summed weight of the valid pixels), "sum" or "none".
        check_targets: what happens to a label that is neither a class nor ignored. It is never used as an
            index. None: on the CPU ValueError names its value and position; on a GPU it counts as ignored, the
            loss is NaN and :func:`depict_kernels.ops.raise_on_bad_target` raises later, without a host sync
            here. True: raises at once everywhere. False: counts as ignored, silently.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        Loss in float32 (float64 for float64 logits): a scalar, or (B, H, W) for "none". Differentiable in
        logits.

    Raises:
        TypeError, ValueError: no tensors, wrong dtypes, shapes or options; a bad label as above.
        BackendUnavailable: a backend named explicitly cannot run here.
    """
    ignore_index = _check_logits(logits, target, ignore_index)
    check_options(reduction, label_smoothing)
    if weight is not None:
        _check_weight(weight, logits)
    raise_now = _raises_at_once(logits) if check_targets is None else check_targets
    inputs = (logits,) if weight is None else (logits, weight)
    requested = backend
    backend = backends.choose(backend, "upsample_cross_entropy", *inputs, **_sizes(logits, target.shape[1:]))
    if backend == "torch" and _stores(requested, logits, inputs, target.shape[1:]):
        clean, report = torch.ops.depict_kernels.scan_target(target, logits.shape[1], ignore_index, raise_now)
        loss = stock.cross_entropy(logits, clean, weight, ignore_index, label_smoothing, reduction)
    else:
        need_grad = torch.is_grad_enabled() and logits.requires_grad
        loss, _, report = torch.ops.depict_kernels.upsample_cross_entropy(
            logits, target, weight, ignore_index, label_smoothing, reduction, need_grad, raise_now, backend
        )
    if check_targets is None and not raise_now:
        record_bad_target(report)
        loss = torch.where(report[0] > 0, torch.nan, loss)
    return loss


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], dtype: torch.dtype = torch.int64, *, backend: str = "auto"
) -> Tensor:
    """Label map of logits upsampled bilinearly (align_corners=False) to ``size``.

    Args:
        logits: (B, C, h, w) floating point, any strides.
        size: (H, W) of the label map.
        dtype: uint8 (at most 256 classes), int32 or int64.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        (B, H, W) labels in ``dtype``; ties go to the lowest class, as in torch.argmax. No gradient. In an exported
        program backend "torch" is F.interpolate and argmax, which store the upsampled logits.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes.
        BackendUnavailable: a backend named explicitly cannot run here.
    """
    _check_map(logits)
    size = _library.pair("size", size)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size must be at least (1, 1), got {size}")
    if dtype not in _LABEL_DTYPES:
        raise TypeError(f"dtype must be uint8, int32 or int64, got {dtype}")
    if dtype == torch.uint8 and logits.shape[1] > 256:
        raise ValueError(f"uint8 cannot hold {logits.shape[1]} classes; use dtype=torch.int32")
    backend = backends.choose(backend, "upsample_argmax", logits, **_sizes(logits, size))
    if backend == "torch" and backends.exporting():
        return stock.upsample(logits.detach(), size).argmax(1).to(dtype)  # what ONNX knows too
    return torch.ops.depict_kernels.upsample_argmax(logits.detach(), size, dtype, backend)


def upsample_confusion(
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    out: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Confusion matrix of the upsampled label map, without the label map.

    Args:
        logits: (B, C, h, w) floating point.
        target: (B, H, W) uint8 or a signed integer dtype.
        ignore_index: label that is not counted; None means 255 up to 255 classes and -100 above.
        out: (C, C) int64 to add the counts to, in place; None starts from zeros.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        (C, C) int64, rows = target, columns = label: ``out`` where it was given.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes; on the CPU a label that is neither a class nor ignored,
        by value and position. On a GPU such a label is not counted and
        :func:`depict_kernels.ops.raise_on_bad_target` raises later.
        BackendUnavailable: a backend named explicitly cannot run here.
    """
    ignore_index = _check_logits(logits, target, ignore_index)
    shape = (logits.shape[1], logits.shape[1])
    if out is None:
        out = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    _library.check_tensor("out", out)
    if out.shape != shape or out.dtype != torch.int64 or out.device != logits.device:
        raise ValueError(
            f"out must be {shape} int64 on {logits.device}, got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    inner, outer = min(out.stride()), max(out.stride())
    if shape[0] > 1 and not 0 < inner * (shape[0] - 1) < outer:  # elements may overlap in memory
        raise ValueError(
            f"out must hold every count once, got an expanded or overlapping tensor of strides {out.stride()}"
        )
    backend = backends.choose(backend, "upsample_confusion", logits, **_sizes(logits, target.shape[1:]))
    report = torch.ops.depict_kernels.upsample_confusion(logits.detach(), target, ignore_index, out, backend)
    if logits.device.type != "cpu":
        record_bad_target(report)
    return out


def _stores(requested: str, logits: Tensor, inputs: tuple[Tensor, ...], size: tuple[int, int]) -> bool:
    """Whether stock torch's loss is the plain composition, which stores the upsampled logits.

    It is where it was asked for, where it is needed, and where they are no more than what is in memory at a time
    anyway; ``auto`` else takes stock operators a few classes at a time.
    """
    if backends.named(requested) == "torch" or backends.followed(*inputs):
        return True
    if torch.are_deterministic_algorithms_enabled() and logits.device.type == "cuda":
        return True  # F.interpolate has a deterministic gradient of its own there, which it alone knows
    if torch.compiler.is_compiling():
        return False  # the graph shall not depend on how large an image is
    return logits.shape[1] * stock.class_bytes(logits, size) <= stock.chunk_bytes(logits)


def check_options(reduction: str, label_smoothing: float) -> None:
    """Raises ValueError for an unknown reduction or a smoothing outside of [0, 1]."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _check_map(logits: Tensor) -> None:
    _library.check_tensor("logits", logits, floating=True)
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits must be (B, C, h, w) with at least one class and one pixel, got {tuple(logits.shape)}"
        )


def _check_weight(weight: Tensor, logits: Tensor) -> None:
    _library.check_tensor("weight", weight)
    if weight.is_complex():
        raise TypeError(f"weight must be real, got {weight.dtype}")
    if weight.shape != (logits.shape[1],) or weight.device != logits.device:
        raise ValueError(
            f"weight must be ({logits.shape[1]},) on {logits.device}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight gets no gradient here, as in torch's cross_entropy; pass weight.detach()")


def _check_logits(logits: Tensor, target: Tensor, ignore_index: int | None) -> int:
    _check_map(logits)
    _library.check_tensor("target", target)
    check_target_tensor(logits, target)
    if ignore_index is None:
        return default_ignore_index(logits.shape[1])
    return _library.integer("ignore_index", ignore_index)


def _sizes(logits: Tensor, size: tuple[int, int]) -> dict:
    """What :func:`depict_kernels.shape_classes.shape_class` asks."""
    return {"classes": logits.shape[1], "grid": logits.shape[2:], "size": size}


# --- registration ---


def _raises_at_once(logits: Tensor) -> bool:
    """Whether a bad label raises where it is met: on a GPU that would cost a host sync."""
    return logits.device.type == "cpu"


def _run_cross_entropy(
    kernels, logits, target, weight, ignore_index, label_smoothing, reduction, need_grad, raise_now
):
    loss, grad, report = kernels.cross_entropy_forward(
        logits, target, weight, ignore_index, label_smoothing, reduction, need_grad
    )
    if raise_now:
        raise_if_bad(report, logits.shape[1], ignore_index)
    return loss, loss.new_empty(0) if grad is None else grad, report


def _fake_cross_entropy(
    logits, target, weight, ignore_index, label_smoothing, reduction, need_grad, raise_now, backend
):
    dtype = accumulation_dtype(logits.dtype)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    stored = need_grad and reduction != "none"
    grad = logits.new_empty(logits.shape if stored else (0,), dtype=dtype)
    return loss, grad, target.new_empty(5, dtype=torch.int64)


_library.define(
    "upsample_cross_entropy",
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, str reduction,"
    " bool need_grad, bool raise_now, str backend) -> (Tensor, Tensor, Tensor)",
    stem=_STEM,
    fake=_fake_cross_entropy,
    run=_run_cross_entropy,
)


_library.define(
    "upsample_cross_entropy_backward",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, int ignore_index,"
    " float label_smoothing, str backend) -> Tensor",
    stem=_STEM,
    fake=lambda grad_loss, logits, target, weight, ignore_index, label_smoothing, backend: logits.new_empty(
        logits.shape, dtype=accumulation_dtype(logits.dtype)
    ),
    run=lambda kernels, *args: kernels.cross_entropy_backward(*args),
)


torch.library.define(
    "depict_kernels::upsample_cross_entropy_scaled",
    "(Tensor grad_loss, Tensor grad, ScalarType dtype) -> Tensor",
)


@torch.library.impl("depict_kernels::upsample_cross_entropy_scaled", "CompositeExplicitAutograd")
def _scale(grad_loss, grad, dtype):
    # Out of place: a second backward with retain_graph must find the gradient as it was. float32 until here: a
    # loss scaler multiplies after the gradient was formed.
    return (grad_loss * grad).to(dtype)


@torch.library.register_fake("depict_kernels::upsample_cross_entropy_scaled")
def _(grad_loss, grad, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)


def _save(ctx, inputs, output):
    logits, target, weight, ignore_index, label_smoothing, reduction, need_grad, _raise, backend = inputs
    ctx.options = (ignore_index, label_smoothing, backend)
    ctx.reduction, ctx.need_grad, ctx.dtype = reduction, need_grad, logits.dtype
    ctx.set_materialize_grads(False)
    # The gradient counts as differentiable, so that what is made of it depends on the logits without their being
    # saved (they may change in place): a second derivative meets a refusal instead of a silent zero.
    ctx.mark_non_differentiable(output[2])
    # A program exported or traced where no gradient was needed may yet be differentiated.
    if reduction == "none" or not need_grad:
        ctx.save_for_backward(logits, target, weight)
    else:
        ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, _grad_grad, _grad_report):
    if grad_loss is None:
        return (None,) * 9
    library = torch.ops.depict_kernels
    if ctx.reduction == "none":
        logits, target, weight = ctx.saved_tensors
        grad = library.upsample_cross_entropy_backward(grad_loss, logits, target, weight, *ctx.options)
        grad = grad.to(logits.dtype)
    else:
        if ctx.need_grad:
            (grad,) = ctx.saved_tensors
        else:
            *options, backend = ctx.options
            again = (*ctx.saved_tensors, *options, ctx.reduction, True, False, backend)
            grad = library.upsample_cross_entropy(*again)[1]
        grad = library.upsample_cross_entropy_scaled(grad_loss, grad, ctx.dtype)
    return (grad, *[None] * 8)


torch.library.register_autograd("depict_kernels::upsample_cross_entropy", _backward, setup_context=_save)
_library.forbid_gradient("upsample_cross_entropy_backward")
_library.forbid_gradient("upsample_cross_entropy_scaled")

_library.define(
    "upsample_argmax",
    "(Tensor logits, SymInt[2] size, ScalarType dtype, str backend) -> Tensor",
    stem=_STEM,
    fake=lambda logits, size, dtype, backend: logits.new_empty((logits.shape[0], *size), dtype=dtype),
    run=lambda kernels, *args: kernels.argmax(*args),
)


def _run_confusion(kernels, logits, target, ignore_index, out):
    report = kernels.confusion(logits, target, ignore_index, out)
    if _raises_at_once(logits):
        raise_if_bad(report, logits.shape[1], ignore_index)
    return report


_library.define(
    "upsample_confusion",
    "(Tensor logits, Tensor target, int ignore_index, Tensor(a!) out, str backend) -> Tensor",
    stem=_STEM,
    fake=lambda logits, target, ignore_index, out, backend: target.new_empty(5, dtype=torch.int64),
    run=_run_confusion,
)


@register_flop_formula(torch.ops.depict_kernels.upsample_cross_entropy)
def _(logits_shape, target_shape, weight, ignore, smoothing, reduction, need_grad, *args, **kwargs) -> int:
    # Per upsampled logit a multiply and an add to form the exponential and to sum it; with the gradient
    # two more multiply-adds (Horner for the two corners).
    per_logit = 6 if need_grad and reduction != "none" else 2
    return per_logit * logits_shape[1] * target_shape[0] * target_shape[1] * target_shape[2]


@register_flop_formula(torch.ops.depict_kernels.upsample_cross_entropy_backward)
def _(grad_shape, logits_shape, *args, **kwargs) -> int:
    return 6 * logits_shape[1] * grad_shape[0] * grad_shape[1] * grad_shape[2]
