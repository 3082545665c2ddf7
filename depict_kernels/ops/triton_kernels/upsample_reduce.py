"""What follows the tiles of upsample_loss.py and upsample_labels.py: sums, the report of bad labels, the gradient."""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.upsample_cells import NO_BAD, place_of


@triton.jit(do_not_specialize=["tiles", "height", "width"])
def finish_loss(
    partial_ptr,  # (tiles, 2) float64, or None where only the report is wanted
    bad_ptr,  # (tiles,) int64
    target_ptr,  # (B, H, W)
    loss_ptr,  # () or None
    scale_ptr,  # (): what the gradient is multiplied by
    report_ptr,  # (5,) int64: any bad label, its value, b, y, x
    tiles,
    height,
    width,
    target_b,
    target_y,
    target_x,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the tiles' losses in a fixed order, the divisor of "mean", the first bad label."""
    index = tl.arange(0, BLOCK)
    first = tl.full([BLOCK], NO_BAD, tl.int64)
    loss = tl.full([BLOCK], 0, tl.float64)
    weight = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = (start + index).to(tl.int64)
        exists = tile < tiles
        first = tl.minimum(first, tl.load(bad_ptr + tile, mask=exists, other=NO_BAD))
        if partial_ptr is not None:
            loss += tl.load(partial_ptr + 2 * tile, mask=exists, other=0.0)
            weight += tl.load(partial_ptr + 2 * tile + 1, mask=exists, other=0.0)
    if partial_ptr is not None:
        total = tl.sum(loss, 0)
        scale = tl.full([], 1.0, tl.float64)
        if MEAN:
            divisor = tl.sum(weight, 0)
            scale = tl.where(divisor == 0, 0.0, 1.0 / tl.where(divisor == 0, 1.0, divisor))
            total = tl.where(divisor == 0, 0.0, total / tl.where(divisor == 0, 1.0, divisor))
        tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))
        tl.store(scale_ptr, scale.to(scale_ptr.dtype.element_ty))
    at = tl.min(first, 0)
    found = at != NO_BAD
    at = tl.where(found, at, 0)
    b, y, x = at // width // height, at // width % height, at % width
    value = tl.load(target_ptr + b * target_b + y * target_y + x * target_x, mask=found, other=0)
    tl.store(report_ptr, found.to(tl.int64))
    tl.store(report_ptr + 1, value.to(tl.int64))
    tl.store(report_ptr + 2, b)
    tl.store(report_ptr + 3, y)
    tl.store(report_ptr + 4, x)


@triton.jit(do_not_specialize=["h", "w", "parts_y", "parts_x", "first", "held"])
def gather_gradient(
    samples_ptr,  # (held * tiles of a row of cells, 4, LANES)
    scale_ptr,  # () or None
    grad_ptr,  # (B, C, h, w) contiguous
    h,
    w,
    parts_y,
    parts_x,
    first,  # of the rows of samples to do, h per image
    held,  # rows of cells, of which there are h + 1 per image: row r lies at r % held
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds what the tiles of the (at most) four cells around each sample wrote for it."""
    blocks = tl.cdiv(w, BLOCK_X)
    pid = tl.program_id(0)
    x = ((pid % blocks) * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    row = first + pid // blocks
    b, y = (row // h).to(tl.int64), (row % h).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (x < w)[:, None] & (c < LANES)[None, :]
    across = (w + 1) * parts_x
    total = tl.full([BLOCK_X, BLOCK_C], 0, samples_ptr.dtype.element_ty)
    for part in range(4 * parts_y * parts_x):
        # Sample (y, x) is the first of cell (y, x) and the second of cell (y - 1, x - 1), whose rows and columns
        # are stored at y + 1, x + 1 and y, x. The border cell -1 put everything into its first sample.
        second_y, second_x = part % 2, part // 2 % 2
        part_y, part_x = part // 4 % parts_y, part // 4 // parts_y
        tile_row = place_of(b * (h + 1) + y + 1 - second_y, held) * parts_y + part_y
        tile = tile_row * across + (x + 1 - second_x) * parts_x + part_x
        slot = 2 * tl.where(y > 0, second_y, 0) + tl.where(x > 0, second_x, 0)
        total += tl.load(
            samples_ptr + (tile * 4 + slot)[:, None] * LANES + c[None, :], mask=exists, other=0.0
        )
    if scale_ptr is not None:
        total *= tl.load(scale_ptr)
    at = ((b * CLASSES + c[None, :]) * h + y) * w + x[:, None]
    tl.store(grad_ptr + at, total, mask=(x < w)[:, None] & (c < CLASSES)[None, :])
