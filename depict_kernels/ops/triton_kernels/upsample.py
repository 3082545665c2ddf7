"""Backend ``triton`` of the three upsample operators: allocates, chooses tiles, launches. Not yet run on a GPU.

    pack_logits, loss_series, gradient_series, loss_careful, finish_loss, gather_gradient   loss and gradient
    pack_logits, label_tiles, finish_loss (for the report of bad labels)                    label map, confusion

float32 inside (float64 for float64 logits); float64 for sums over pixels. Nothing synchronises with the host. The
number of classes and the label smoothing are compiled in. Tiles are cells of the low-resolution grid in parts of at
most 16 x 16 pixels; the gradient takes four samples of all classes per tile (21 MB for 8 x 150 x 32 x 32 logits
upsampled 16 times), one number per pixel and a packed copy of the logits besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depict_kernels.ops.triton_kernels import upsample_tuning as tuning
from depict_kernels.ops.triton_kernels.launch import architecture, launch
from depict_kernels.ops.triton_kernels.upsample_careful import loss_careful
from depict_kernels.ops.triton_kernels.upsample_cells import pack_logits
from depict_kernels.ops.triton_kernels.upsample_labels import label_tiles
from depict_kernels.ops.triton_kernels.upsample_loss import gradient_series, loss_series
from depict_kernels.ops.triton_kernels.upsample_reduce import finish_loss, gather_gradient

REPORTS_BAD_TARGET = True  # the forward functions return the report of ops/targets.py as they read the labels
LONGEST = 16  # pixels of a tile along an axis: e r^k stays accurate that far


@dataclass(frozen=True)
class Tiles:
    """How the pixels of a (h, w) grid upsampled to (H, W) are cut into tiles."""

    h: int
    w: int
    height: int
    width: int
    rows: int  # largest extent of a tile, rows a power of two
    columns: int
    parts_y: int  # tiles per cell
    parts_x: int

    @property
    def per_image(self) -> int:
        return (self.h + 1) * self.parts_y * (self.w + 1) * self.parts_x

    @property
    def arguments(self) -> dict[str, int | bool]:
        names = ("h", "w", "height", "width", "parts_y", "parts_x")
        longest = max((2 * self.h + 3) * self.height, (2 * self.w + 3) * self.width)
        return {name: getattr(self, name) for name in names} | {"WIDE": longest >= 2**31, "ROWS": self.rows}


def tiles_of(grid: tuple[int, int], size: tuple[int, int]) -> Tiles:
    """grid (h, w), size (H, W); a cell holds at most ceil(H / h) x ceil(W / w) pixels."""
    (rows, parts_y), (columns, parts_x) = (_cut(-(-n // m)) for n, m in zip(size, grid))
    return Tiles(*grid, *size, tuning.power_of_two(rows), columns, parts_y, parts_x)


def _cut(pixels: int) -> tuple[int, int]:
    parts = -(-pixels // LONGEST)
    return -(-pixels // parts), parts


@dataclass(frozen=True)
class Packed:
    """Low-resolution logits, classes innermost and padded to a multiple of every block of classes."""

    logits: Tensor  # (B * h * w, lanes)
    smooth: Tensor | None  # (B * h * w,) sum over classes of weight times shifted logit
    magnitude: Tensor  # (B * h * w,) largest |logit|, where not shifted
    lanes: int


def _pack(logits: Tensor, weight: Tensor | None, block_c: int, *, shift: bool, smooth: bool) -> Packed:
    batch, classes, h, w = logits.shape
    config = tuning.pack(architecture(logits.device))
    lanes = -(-classes // block_c) * block_c
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    samples = batch * h * w
    new = lambda *shape: torch.empty(shape, dtype=dtype, device=logits.device)
    packed = Packed(
        new(samples, lanes), new(samples) if smooth else None, new(0 if shift else samples), lanes
    )
    launch(
        pack_logits,
        (batch * h * -(-w // config.rows),),
        logits.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        logits_ptr=logits,
        packed_ptr=packed.logits,
        weight_ptr=weight if smooth else None,
        smooth_ptr=packed.smooth,
        magnitude_ptr=packed.magnitude,
        h=h,
        w=w,
        **dict(zip(("stride_b", "stride_c", "stride_y", "stride_x"), logits.stride())),
        CLASSES=classes,
        LANES=lanes,
        SHIFT=shift,
        SMOOTH=smooth,
        BLOCK_X=config.rows,
        BLOCK_C=config.columns,
    )
    return packed


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip("byx", strides)}


def _run_tiles(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    upstream: Tensor | None = None,
    pixel_loss: Tensor | None = None,
    partial: Tensor | None = None,
    bad: Tensor | None = None,
    samples: bool = False,
) -> Tensor | None:
    """Fills pixel_loss, partial and bad as far as given; returns the tiles' gradients if asked."""
    classes = logits.shape[1]
    tiles = tiles_of(logits.shape[2:], target.shape[1:])
    count = logits.shape[0] * tiles.per_image
    exact = logits.dtype == torch.float64
    arch = architecture(logits.device)
    series = tuning.series(arch, tiles.rows, classes)
    careful = tuning.careful(arch, tiles.rows * tuning.power_of_two(tiles.columns), classes)
    block_c = series.columns
    smooth = label_smoothing > 0
    dtype = torch.float64 if exact else torch.float32
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    packed = _pack(logits, weight, max(block_c, careful.columns), shift=True, smooth=smooth)
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=logits.device)
    gradients = new(count, 4, packed.lanes) if samples else None
    flags = None if exact else new(count, dtype=torch.int8)
    common = {
        "packed_ptr": packed.logits,
        "weight_ptr": weight,
        "weight_sum_ptr": weight.sum().view(1) if smooth and weight is not None else None,
        "target_ptr": target,
        "upstream_ptr": upstream,
        "careful_ptr": flags,
        **tiles.arguments,
        **_strides("target", target),
        **_strides("upstream", upstream),
        "ignore_index": ignore_index,
        "SMOOTHING": label_smoothing,
        "CLASSES": classes,
        "LANES": packed.lanes,
    }
    wanted = {
        "smooth_ptr": packed.smooth,
        "pixel_loss_ptr": pixel_loss,
        "partial_ptr": partial,
        "bad_ptr": bad,
    }
    width = tuning.power_of_two(tiles.columns)
    run = lambda kernel, programs, config, **arguments: launch(
        kernel,
        (programs,),
        logits.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **common,
        **arguments,
        WIDTH=width,
        BLOCK_C=config.columns,
    )
    if not exact:
        u = new(count, tiles.columns, tiles.rows)
        run(loss_series, count, series, **wanted, u_ptr=u, COLUMNS=tiles.columns)
        if samples:
            run(gradient_series, count, series, u_ptr=u, samples_ptr=gradients, COLUMNS=tiles.columns)
    # Where few tiles are careful, few programs look for them; where all are, there are enough to fill a GPU.
    group = 1 if exact else min(32, tuning.power_of_two(max(1, count // 256)))
    run(loss_careful, -(-count // group), careful, **wanted, samples_ptr=gradients, tiles=count, GROUP=group)
    return gradients


def _gather(samples: Tensor, scale: Tensor | None, logits: Tensor, size: tuple[int, int]) -> Tensor:
    batch, classes, h, w = logits.shape
    tiles, config = tiles_of((h, w), size), tuning.gather(architecture(logits.device))
    lanes = samples.shape[2]
    grad = torch.empty(logits.shape, dtype=samples.dtype, device=logits.device)
    launch(
        gather_gradient,
        (batch * h * -(-w // config.rows), -(-classes // config.columns)),
        logits.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        samples_ptr=samples,
        scale_ptr=scale,
        grad_ptr=grad,
        h=h,
        w=w,
        parts_y=tiles.parts_y,
        parts_x=tiles.parts_x,
        CLASSES=classes,
        LANES=lanes,
        BLOCK_X=config.rows,
        BLOCK_C=config.columns,
    )
    return grad


def _finish(
    target: Tensor, bad: Tensor, partial: Tensor | None, loss: Tensor | None, scale: Tensor | None, mean: bool
) -> Tensor:
    """Writes loss and scale if given; returns the report of bad labels, int64 (5,)."""
    report = torch.empty(5, dtype=torch.int64, device=target.device)
    config = tuning.finish(architecture(target.device))
    launch(
        finish_loss,
        (1,),
        target.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partial_ptr=partial,
        bad_ptr=bad,
        target_ptr=target,
        loss_ptr=loss,
        scale_ptr=scale,
        report_ptr=report,
        tiles=bad.shape[0],
        height=target.shape[1],
        width=target.shape[2],
        **_strides("target", target),
        MEAN=mean,
        BLOCK=config.columns,
    )
    return report


def cross_entropy_forward(
    logits: Tensor,  # (B, C, h, w)
    target: Tensor,  # (B, H, W)
    weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss (scalar, or (B, H, W) for "none"), for scalar reductions its gradient (B, C, h, w), and the report.

    Both are float32, or float64 for float64 logits. A label that is neither a class nor ``ignore_index`` counts as
    ignored; the report, int64 (5,), is [1 if there is any, first such label, its b, y, x].
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    device = logits.device
    count = logits.shape[0] * tiles_of(logits.shape[2:], target.shape[1:]).per_image
    bad = torch.empty(count, dtype=torch.int64, device=device)
    if reduction == "none":
        loss = torch.empty(target.shape, dtype=dtype, device=device)
        _run_tiles(logits, target, weight, ignore_index, label_smoothing, pixel_loss=loss, bad=bad)
        return loss, None, _finish(target, bad, None, None, None, False)
    partial = torch.empty((count, 2), dtype=torch.float64, device=device)
    samples = _run_tiles(
        logits, target, weight, ignore_index, label_smoothing, partial=partial, bad=bad, samples=need_grad
    )
    loss, scale = torch.empty((), dtype=dtype, device=device), torch.empty(1, dtype=dtype, device=device)
    report = _finish(target, bad, partial, loss, scale, reduction == "mean")
    grad = None if samples is None else _gather(samples, scale, logits, target.shape[1:])
    return loss, grad, report


def cross_entropy_backward(
    grad_loss: Tensor,  # (B, H, W)
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of the unreduced loss, float32 or float64, for the upstream gradient."""
    samples = _run_tiles(
        logits, target, weight, ignore_index, label_smoothing, upstream=grad_loss, samples=True
    )
    return _gather(samples, None, logits, target.shape[1:])


def _run_labels(
    logits: Tensor,
    size: tuple[int, int],
    labels: Tensor | None = None,
    target: Tensor | None = None,
    bad: Tensor | None = None,
    counts: Tensor | None = None,
    ignore_index: int = 0,
) -> None:
    batch, classes, h, w = logits.shape
    tiles = tiles_of((h, w), size)
    columns = tuning.power_of_two(tiles.columns)
    config = tuning.labels(architecture(logits.device), tiles.rows * columns, classes)
    packed = _pack(logits, None, config.columns, shift=False, smooth=False)
    launch(
        label_tiles,
        (batch * tiles.per_image,),
        logits.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        packed_ptr=packed.logits,
        magnitude_ptr=packed.magnitude,
        labels_ptr=labels,
        target_ptr=target,
        bad_ptr=bad,
        counts_ptr=counts,
        **tiles.arguments,
        **_strides("target", target),
        counts_y=0 if counts is None else counts.stride(0),
        counts_x=0 if counts is None else counts.stride(1),
        ignore_index=ignore_index,
        CLASSES=classes,
        LANES=packed.lanes,
        COLUMNS=columns,
        BLOCK_C=config.columns,
        EPSILON=8 * torch.finfo(packed.logits.dtype).eps,
    )


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, C, h, w) -> label map (B, H, W); ties go to the lowest class index, as in torch.argmax."""
    labels = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
    _run_labels(logits, size, labels=labels)
    return labels


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the counts of (target, label) over the valid pixels into out (C, C) int64; returns the report."""
    size = tuple(target.shape[1:])
    bad = torch.empty(
        logits.shape[0] * tiles_of(logits.shape[2:], size).per_image, dtype=torch.int64, device=logits.device
    )
    _run_labels(logits, size, target=target, bad=bad, counts=out, ignore_index=ignore_index)
    return _finish(target, bad, None, None, None, False)
