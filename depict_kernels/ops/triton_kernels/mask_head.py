"""The mask head in Triton: one product with an epilogue (see the formulas in ops/reference/mask_head.py).

Forward: a program owns a block of patches and all classes. The product x q^T and both row norms come from one pass
over the width; cosines, LayerNorm over the classes and the (B, C, h, w) layout follow in registers. More than
:data:`REGISTER_CLASSES` classes go block by block, twice: statistics first, then the logits.

Backward: one kernel recomputes the cosines per block of patches and leaves t, the gradient of the products x q^T, in
the inputs' dtype with per-block sums for the class side; two products then give the gradients of patches and
classes, and the second also adds up weight's and bias's. No atomics. In float16 a kernel before bounds t, which then
goes with a power of two per image (mask_head_scale.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from depict_kernels.ops.triton_kernels import launch as _launch
from depict_kernels.ops.triton_kernels import tuning
from depict_kernels.ops.triton_kernels.launch import rows_contiguous, strides, unit_of
from depict_kernels.ops.triton_kernels.mask_head_kernels import mask_backward, mask_forward
from depict_kernels.ops.triton_kernels.mask_head_products import mask_product
from depict_kernels.ops.triton_kernels.mask_head_scale import mask_peak

DTYPES = _launch.DTYPES
PEAK = tuning.Config(
    64, 32, 4, 1
)  # patches of a program, classes at once: it reads the upstream gradient, no more
REGISTER_CLASSES = 256  # up to here all classes of a patch stay in registers


def _class_chunks(classes: int) -> dict:
    """Chunks of one width: of 64, 64 and 32 the last one's layout differs, which spills in the backward kernel."""
    width = 16 if classes <= 16 else 32 if classes <= 32 else 64
    loop = classes > REGISTER_CLASSES
    count = 1 if loop else max(1, triton.cdiv(classes, width))
    return {"STARTS": tuple(range(0, count * width, width)), "WIDTHS": (width,) * count, "LOOP": loop}


def _launch_rows(kernel, x: Tensor, q: Tensor, config: tuning.Config, **arguments) -> None:
    unit = unit_of(x, q)
    _launch.launch(
        kernel,
        (triton.cdiv(x.shape[1], config.rows) * x.shape[0],),
        x.device,
        config,
        x_ptr=x,
        q_ptr=q,
        patch_count=x.shape[1],
        class_count=q.shape[1],
        width=x.shape[2],
        **strides("x", x, unit),
        **strides("q", q, unit),
        UNIT=unit,
        **_class_chunks(q.shape[1]),
        WIDE=x.shape[1] * q.shape[1] >= 2**31,
        PRECISION=_launch.dot_precision(x.dtype, x.device),
        BLOCK_N=config.rows,
        BLOCK_D=config.columns,
        **arguments,
    )


def mask_logits_forward(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """patches (B, N, D), classes (B, C, D), weight and bias (C,) -> logits (B, C, h, w) in weight's dtype.

    Also what backward needs: 1/|patch| (B, N), 1/|class| (B, C), LayerNorm's mean and 1/std (B, N).
    """
    x, q = rows_contiguous(patches, classes)
    batch, n, _ = x.shape
    c = q.shape[1]
    logits = torch.empty((batch, c, *grid), dtype=weight.dtype, device=x.device)
    inv_x, mean, rstd = (torch.empty((batch, n), dtype=torch.float32, device=x.device) for _ in range(3))
    inv_q = torch.empty((batch, c), dtype=torch.float32, device=x.device)
    config = tuning.mask_head("forward", _launch.architecture(x.device), c, x.element_size())
    _launch_rows(
        mask_forward,
        x,
        q,
        config,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        logits_ptr=logits,
        inv_x_ptr=inv_x,
        inv_q_ptr=inv_q,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
    )
    return logits, inv_x, inv_q, mean, rstd


def mask_logits_backward(
    grad: Tensor,
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    inv_x: Tensor,
    inv_q: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias for the gradient (B, C, h, w) of the logits."""
    x, q = rows_contiguous(patches, classes)
    batch, n, dim = x.shape
    c = q.shape[1]
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)
    grad_x, grad_q = new((batch, n, dim), x.dtype), new((batch, c, dim), x.dtype)
    grad_weight, grad_bias = new((c,), weight.dtype), new((c,), weight.dtype)
    if batch == 0 or n == 0 or c == 0:
        return grad_x.zero_(), grad_q.zero_(), grad_weight.zero_(), grad_bias.zero_()
    architecture = _launch.architecture(x.device)
    config = tuning.mask_head("backward", architecture, c, x.element_size())
    programs = triton.cdiv(n, config.rows) * batch
    t_row = triton.cdiv(c, 16) * 16  # whole vectors in rows that are aligned
    t = new((batch, n, t_row), x.dtype)
    along, sums = new((batch, n), torch.float32), new((3, programs, c), torch.float32)
    grad, weight = grad.contiguous(), weight.contiguous()
    peak, unscale, peaks = None, None, 0
    if x.dtype == torch.float16:
        peaks = triton.cdiv(n, PEAK.rows)
        peak, unscale = new((batch, peaks), torch.float32), new((batch,), torch.float32)
        _launch.launch(
            mask_peak,
            (batch * peaks,),
            x.device,
            PEAK,
            grad_ptr=grad,
            weight_ptr=weight,
            inv_x_ptr=inv_x,
            inv_q_ptr=inv_q,
            rstd_ptr=rstd,
            peak_ptr=peak,
            patch_count=n,
            class_count=c,
            BLOCK_N=PEAK.rows,
            BLOCK_C=PEAK.columns,
        )
    _launch_rows(
        mask_backward,
        x,
        q,
        config,
        grad_ptr=grad,
        weight_ptr=weight,
        inv_x_ptr=inv_x,
        inv_q_ptr=inv_q,
        mean_ptr=mean,
        rstd_ptr=rstd,
        peak_ptr=peak,
        t_ptr=t,
        along_ptr=along,
        sums_ptr=sums,
        unscale_ptr=unscale,
        peaks=peaks,
        t_row=t_row,
    )
    unit = unit_of(x, q)
    config = tuning.mask_head("product", architecture, c, x.element_size())
    # (Patches and classes may be one tensor: which side it is cannot be seen from the tensor.)
    for patch_side, own, y, out in ((True, x, q, grad_x), (False, q, x, grad_q)):
        _launch.launch(
            mask_product,
            (triton.cdiv(own.shape[1], config.rows) * triton.cdiv(dim, config.columns) * batch,),
            x.device,
            config,
            t_ptr=t,
            y_ptr=y,
            own_ptr=own,
            out_ptr=out,
            along_ptr=along,
            unscale_ptr=unscale,
            inv_q_ptr=inv_q,
            sums_ptr=sums,
            grad_weight_ptr=grad_weight,
            grad_bias_ptr=grad_bias,
            programs=programs,
            row_count=own.shape[1],
            sum_count=y.shape[1],
            width=dim,
            patch_count=n,
            t_row=t_row,
            **strides("y", y, unit),
            **strides("own", own, unit),
            UNIT=unit,
            PATCHES=patch_side,
            PRECISION=_launch.dot_precision(x.dtype, x.device),
            BLOCK_R=config.rows,
            BLOCK_D=config.columns,
            BLOCK_K=32,
        )
    return grad_x, grad_q, grad_weight, grad_bias
