"""What the upsample kernels share: cells of the low-resolution grid and their pixels, packed logits, targets.

A cell lies between four low-resolution samples; inside it every class logit is bilinear. The arithmetic is that of
csrc/bilinear.h: cells -1 and n - 1 of an axis are the borders, where both samples are the nearest one and the
weight of the second is 0. A program works on one tile, at most ROWS x COLUMNS pixels of one cell. All index
arithmetic is in 64 bits, all weights are ratios of integers rounded once.
"""

import triton
import triton.language as tl

PAD = tl.constexpr(-1e30)  # logit of the lanes past the last class: finite, so that 0 times it is 0
NONE = tl.constexpr(2**31 - 1)  # no pixel, no class
NO_BAD = tl.constexpr(2**63 - 1)  # position of a tile's first bad label where there is none


@triton.jit
def _begin(cell, samples, pixels):
    """First pixel of ``cell``: the smallest x with (x + 0.5) * samples / pixels - 0.5 >= cell."""
    numerator = (2 * cell + 1) * pixels - samples
    x = tl.minimum((tl.maximum(numerator, 0) + 2 * samples - 1) // (2 * samples), pixels)
    return tl.where(cell >= samples, pixels, x)


@triton.jit
def _span(cell, part, parts, samples, pixels):
    """First pixel and number of pixels of one of the ``parts`` that a cell is cut into, along one axis."""
    first = _begin(cell, samples, pixels)
    count = _begin(cell + 1, samples, pixels) - first
    start = count * part // parts
    return (first + start).to(tl.int64), (count * (part + 1) // parts - start).to(tl.int64)


@triton.jit
def tile_of(pid, h, w, height, width, parts_y, parts_x, WIDE: tl.constexpr):
    """Program -> (batch, cell row, cell column, first row, rows, first column, columns) of its tile, in int64.

    WIDE: twice the number of samples times that of pixels along an axis may pass 2^31.
    """
    pid = pid.to(tl.int32)  # 32-bit divisions cost a tenth of 64-bit ones
    across = (w + 1) * parts_x
    column, rest = pid % across, pid // across
    row, batch = rest % ((h + 1) * parts_y), rest // ((h + 1) * parts_y)
    cell_y, cell_x = row // parts_y - 1, column // parts_x - 1
    if WIDE:
        cell_y, cell_x = cell_y.to(tl.int64), cell_x.to(tl.int64)
    y, rows = _span(cell_y, row % parts_y, parts_y, h, height)
    x, columns = _span(cell_x, column % parts_x, parts_x, w, width)
    return batch.to(tl.int64), cell_y.to(tl.int64), cell_x.to(tl.int64), y, rows, x, columns


@triton.jit
def _ratio(numerator, denominator, DTYPE: tl.constexpr):
    """Rounded once: a GPU's float32 / is off by up to 2 ulp."""
    if DTYPE == tl.float32:  # noqa: SIM300  (a constexpr comes first)
        ratio = tl.div_rn(numerator.to(DTYPE), denominator.to(DTYPE))
    else:
        ratio = numerator.to(DTYPE) / denominator.to(DTYPE)
    return ratio


@triton.jit
def place_of(pid, held):
    """Where the gradient of a tile (or of a row of tiles) lies in a buffer that holds ``held`` of them, int64."""
    return (pid.to(tl.int32) % held).to(tl.int64)


@triton.jit
def second_weight(cell, pixel, samples, pixels, DTYPE: tl.constexpr):
    """Weight of the cell's second sample at ``pixel``, along one axis."""
    numerator = (2 * pixel + 1) * samples - (2 * cell + 1) * pixels
    weight = _ratio(numerator, 2 * pixels, DTYPE)
    return tl.where((cell < 0) | (cell >= samples - 1), 0.0, weight)


@triton.jit
def step_of(cell, samples, pixels, DTYPE: tl.constexpr):
    """How much that weight grows from one pixel to the next."""
    step = _ratio(samples, pixels, DTYPE)
    return tl.where((cell < 0) | (cell >= samples - 1), 0.0, step)


@triton.jit
def corners_of(batch, cell_y, cell_x, h, w):
    """Indices into (B, h, w) of a cell's samples: upper left, upper right, lower left, lower right."""
    upper = batch * h + tl.maximum(cell_y, 0)
    lower = batch * h + tl.minimum(cell_y + 1, h - 1)
    left, right = tl.maximum(cell_x, 0), tl.minimum(cell_x + 1, w - 1)
    return upper * w + left, upper * w + right, lower * w + left, lower * w + right


@triton.jit
def read_labels(target_ptr, offset, inside, ignore_index, CLASSES: tl.constexpr):
    """Labels as int32, -1 where none counts, and which of them are neither a class nor ignored."""
    value = tl.load(target_ptr + offset, mask=inside, other=0).to(tl.int64)
    is_class = (value >= 0) & (value < CLASSES)
    other = inside & (value != ignore_index)
    return tl.where(other & is_class, value, -1).to(tl.int32), other & ~is_class


@triton.jit
def first_bad(bad, local, batch, y, x, height, width, COLUMNS: tl.constexpr):
    """Linear index in (B, H, W) of a tile's first bad label; ``local`` counts its pixels row by row."""
    first = tl.min(tl.where(bad, local, NONE))
    linear = (batch * height + y + first // COLUMNS) * width + x + first % COLUMNS
    return tl.where(first == NONE, NO_BAD, linear)


@triton.jit(do_not_specialize=["h", "w"])
def pack_logits(
    logits_ptr,  # (B, C, h, w)
    packed_ptr,  # (B * h * w, LANES): classes innermost
    weight_ptr,  # (C,) or None
    smooth_ptr,  # (B * h * w,): mean over classes of weight times shifted logit
    magnitude_ptr,  # (B * h * w,): largest |logit|, NaN if any is
    h,
    w,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,  # classes rounded up
    SHIFT: tl.constexpr,  # subtract each sample's maximum over classes, else fill magnitude
    SMOOTH: tl.constexpr,  # fill smooth
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(w, BLOCK_X)
    pid = tl.program_id(0)
    x = ((pid % blocks) * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    row, b, y = (
        (pid // blocks).to(tl.int64),
        (pid // blocks // h).to(tl.int64),
        (pid // blocks % h).to(tl.int64),
    )
    lane = tl.arange(0, BLOCK_C)
    dtype = packed_ptr.dtype.element_ty
    logits_ptr += b * stride_b + y * stride_y
    inside = x < w
    at = row * w + x

    if SHIFT:
        best = tl.full([BLOCK_X, BLOCK_C], float("-inf"), dtype)
        for c0 in range(0, CLASSES, BLOCK_C):
            c = c0 + lane
            z = tl.load(
                logits_ptr + c.to(tl.int64)[None, :] * stride_c + x[:, None] * stride_x,
                mask=inside[:, None] & (c < CLASSES)[None, :],
                other=float("-inf"),
            ).to(dtype)
            best = tl.where(z > best, z, best)
        peak = tl.where(inside, tl.max(best, 1), 0.0)

    total = tl.full([BLOCK_X, BLOCK_C], 0, dtype)
    for c0 in range(0, LANES, BLOCK_C):
        c = c0 + lane
        exists = inside[:, None] & (c < CLASSES)[None, :]
        z = tl.load(
            logits_ptr + c.to(tl.int64)[None, :] * stride_c + x[:, None] * stride_x, mask=exists, other=0.0
        ).to(dtype)
        if SHIFT:
            z = z - peak[:, None]
        if SMOOTH:
            share = z * (1.0 / CLASSES)  # a sum of masked classes would overflow
            if weight_ptr is not None:
                share *= tl.load(weight_ptr + c, mask=c < CLASSES, other=0.0)[None, :]
            total += tl.where(exists, share, 0.0)
        if not SHIFT:
            size = tl.where(exists, tl.abs(z), 0.0)
            total = tl.where((size > total) | (size != size), size, total)
        z = tl.where((c < CLASSES)[None, :], z, PAD)
        tl.store(
            packed_ptr + at[:, None] * LANES + c[None, :], z, mask=inside[:, None] & (c < LANES)[None, :]
        )
    if SMOOTH:
        tl.store(smooth_ptr + at, tl.sum(total, 1), mask=inside)
    if not SHIFT:
        # The maximum skips NaN, the sum keeps it: the label map must know.
        tl.store(magnitude_ptr + at, tl.max(total, 1) + 0.0 * tl.sum(total, 1), mask=inside)
