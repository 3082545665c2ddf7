"""Cross-entropy of upsampled logits where geometric series do not hold: one exponential per pixel and class.

For tiles that upsample_loss.py left because their logits spread too far for float32, and for float64 logits.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.tiles import sum_of_products
from depict_kernels.ops.triton_kernels.upsample_cells import (
    corners_of,
    first_bad,
    place_of,
    second_weight,
    tile_of,
)
from depict_kernels.ops.triton_kernels.upsample_loss import SIZES, bilinear, losses, pixels


@triton.jit
def _logits(packed_ptr, corners, c, tx, ty, CLASSES: tl.constexpr, LANES: tl.constexpr):
    """Shifted logits of pixels (rows) and a block of classes (columns); -inf past the last class."""
    z = bilinear(
        tl.load(packed_ptr + corners[0] * LANES + c)[None, :],
        tl.load(packed_ptr + corners[1] * LANES + c)[None, :],
        tl.load(packed_ptr + corners[2] * LANES + c)[None, :],
        tl.load(packed_ptr + corners[3] * LANES + c)[None, :],
        tx[:, None],
        ty[:, None],
    )
    return tl.where((c < CLASSES)[None, :], z, float("-inf"))


@triton.jit
def _careful_tile(
    pid,
    packed_ptr,
    smooth_ptr,
    weights,  # these three as in pixels
    target,
    upstream,
    pixel_loss_ptr,
    partial_ptr,
    bad_ptr,
    samples_ptr,
    h,
    w,
    height,
    width,
    parts_y,
    parts_x,
    ignore_index,
    held,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x, WIDE)
    DTYPE: tl.constexpr = packed_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, ROWS * WIDTH)
    row, column = pixel // WIDTH, pixel % WIDTH
    inside = (row < rows) & (column < columns)
    y = y0 + tl.maximum(tl.minimum(row, rows - 1), 0)  # pixels past the last repeat it and do not count
    x = x0 + tl.maximum(tl.minimum(column, columns - 1), 0)
    ty = second_weight(cell_y, y, h, height, DTYPE)
    tx = second_weight(cell_x, x, w, width, DTYPE)
    corners = corners_of(batch, cell_y, cell_x, h, w)
    label, bad, weight, hit, scale, smooth = pixels(
        target, upstream, weights, batch, y, x, inside, ignore_index, SMOOTHING, CLASSES, DTYPE
    )

    best = tl.full([ROWS * WIDTH, BLOCK_C], float("-inf"), DTYPE)
    for c0 in range(0, LANES, BLOCK_C):
        z = _logits(packed_ptr, corners, c0 + lane, tx, ty, CLASSES, LANES)
        best = tl.where(z > best, z, best)
    peak = tl.max(best, 1)
    sums = tl.full([ROWS * WIDTH, BLOCK_C], 0.0, DTYPE)
    for c0 in range(0, LANES, BLOCK_C):
        z = _logits(packed_ptr, corners, c0 + lane, tx, ty, CLASSES, LANES)
        sums += tl.exp(z - peak[:, None])
    sums = tl.sum(sums, 1)

    if (partial_ptr is not None) or (pixel_loss_ptr is not None):
        loss = losses(
            packed_ptr, smooth_ptr, corners, tx, ty, label, hit, smooth, weights[1], tl.log(sums), peak, SMOOTHING,
            CLASSES, LANES,
        )  # fmt: skip
        if pixel_loss_ptr is not None:
            tl.store(pixel_loss_ptr + (batch * height + y) * width + x, loss, mask=inside)
        if partial_ptr is not None:
            tl.store(partial_ptr + 2 * pid, tl.sum(loss.to(tl.float64), 0))
            tl.store(partial_ptr + 2 * pid + 1, tl.sum(weight.to(tl.float64), 0))
    if bad_ptr is not None:
        tl.store(bad_ptr + pid, first_bad(bad, pixel, batch, y0, x0, height, width, WIDTH))

    if samples_ptr is not None:
        samples_ptr += place_of(pid, held) * 4 * LANES
        u = tl.where(scale != 0, scale / sums, 0.0)
        for c0 in range(0, LANES, BLOCK_C):
            c = c0 + lane
            z = _logits(packed_ptr, corners, c, tx, ty, CLASSES, LANES)
            grad = tl.where((scale != 0)[:, None], tl.exp(z - peak[:, None]) * u[:, None], 0.0)
            grad -= tl.where(label[:, None] == c[None, :], hit[:, None], 0.0)
            if SMOOTHING > 0:
                if weights[0] is None:
                    grad -= smooth[:, None]
                else:
                    grad -= smooth[:, None] * tl.load(weights[0] + c, mask=c < CLASSES, other=0.0)[None, :]
            tl.store(samples_ptr + c, sum_of_products(grad, ((1 - ty) * (1 - tx))[:, None], 0))
            tl.store(samples_ptr + LANES + c, sum_of_products(grad, ((1 - ty) * tx)[:, None], 0))
            tl.store(samples_ptr + 2 * LANES + c, sum_of_products(grad, (ty * (1 - tx))[:, None], 0))
            tl.store(samples_ptr + 3 * LANES + c, sum_of_products(grad, (ty * tx)[:, None], 0))


@triton.jit(do_not_specialize=SIZES)
def loss_careful(
    packed_ptr,  # (B * h * w, LANES) float32 or float64; the other arguments as in loss_series
    smooth_ptr,
    weight_ptr,
    weight_sum_ptr,
    target_ptr,
    upstream_ptr,
    pixel_loss_ptr,
    partial_ptr,
    bad_ptr,
    careful_ptr,  # (count,) int8, or None to do every tile
    samples_ptr,
    h,
    w,
    height,
    width,
    parts_y,
    parts_x,
    target_b,
    target_y,
    target_x,
    upstream_b,
    upstream_y,
    upstream_x,
    ignore_index,
    first,  # of the ``count`` tiles to do
    count,
    held,  # as in gradient_series
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a tile, a power of two here
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,  # tiles per program
):
    """The tiles that loss_series left: one exponential per pixel and class, relative to the pixel's maximum."""
    start = tl.program_id(0).to(tl.int64) * GROUP
    if careful_ptr is not None:
        tile = start + tl.arange(0, GROUP)
        flags = tl.load(careful_ptr + tile, mask=tile < count, other=0)
        if tl.max(flags, 0) == 0:
            return
    weights = (weight_ptr, weight_sum_ptr)
    target = (target_ptr, target_b, target_y, target_x)
    upstream = (upstream_ptr, upstream_b, upstream_y, upstream_x)
    for i in range(GROUP):
        local = start + i
        if careful_ptr is None:
            wanted = local < count
        else:
            wanted = tl.load(careful_ptr + local, mask=local < count, other=0) != 0
        if wanted:
            _careful_tile(
                first + local, packed_ptr, smooth_ptr, weights, target, upstream, pixel_loss_ptr, partial_ptr,
                bad_ptr, samples_ptr, h, w, height, width, parts_y, parts_x, ignore_index, held, SMOOTHING, CLASSES,
                LANES, WIDE, ROWS, WIDTH, BLOCK_C,
            )  # fmt: skip
