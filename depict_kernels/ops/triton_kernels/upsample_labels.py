"""Label map and confusion matrix of upsampled logits (csrc/cpu/label_map.h does the same).

In a cell, class c can be the maximum somewhere only if the largest of its four samples reaches the largest, over
classes, of the smallest of their four. Trained masks leave one to three candidates of 150: only those are evaluated,
in class order, so that ties go to the lowest class as in torch.argmax.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.upsample_cells import (
    NO_BAD,
    corners_of,
    first_bad,
    read_labels,
    second_weight,
    tile_of,
)

PAIRS = tl.constexpr(8)  # (target, label) pairs of a tile that are counted together before single pixels are


@triton.jit(do_not_specialize=["h", "w", "height", "width", "parts_y", "parts_x", "ignore_index"])
def label_tiles(
    packed_ptr,  # (B * h * w, LANES) float32 or float64, classes innermost
    magnitude_ptr,  # (B * h * w,): largest |logit|, not finite where any logit is not
    labels_ptr,  # (B, H, W) contiguous uint8, int32 or int64, or None
    target_ptr,  # (B, H, W), or None
    bad_ptr,  # (tiles,) int64: linear index of the first bad label, or None
    counts_ptr,  # (C, C) int64 to add to, or None
    h,
    w,
    height,
    width,
    parts_y,
    parts_x,
    target_b,
    target_y,
    target_x,
    counts_y,
    counts_x,
    ignore_index,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two
    BLOCK_C: tl.constexpr,
    EPSILON: tl.constexpr,  # times the largest |logit|: covers the rounding of the evaluation
):
    pid = tl.program_id(0).to(tl.int64)
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x, WIDE)
    if bad_ptr is not None:
        tl.store(bad_ptr + pid, NO_BAD)
    if rows * columns == 0:
        return
    DTYPE: tl.constexpr = packed_ptr.dtype.element_ty
    ul, ur, ll, lr = corners_of(batch, cell_y, cell_x, h, w)
    magnitude = tl.load(magnitude_ptr + ul) + tl.load(magnitude_ptr + ur)
    magnitude += tl.load(magnitude_ptr + ll) + tl.load(magnitude_ptr + lr)
    ul_ptr, ur_ptr = packed_ptr + ul * LANES, packed_ptr + ur * LANES
    ll_ptr, lr_ptr = packed_ptr + ll * LANES, packed_ptr + lr * LANES

    lane = tl.arange(0, BLOCK_C)
    floor = tl.full([BLOCK_C], float("-inf"), DTYPE)
    for c0 in range(0, LANES, BLOCK_C):
        c = c0 + lane
        upper = tl.minimum(tl.load(ul_ptr + c), tl.load(ur_ptr + c))
        lowest = tl.minimum(upper, tl.minimum(tl.load(ll_ptr + c), tl.load(lr_ptr + c)))
        floor = tl.where((c < CLASSES) & (lowest > floor), lowest, floor)
    threshold = tl.max(floor, 0) - EPSILON * magnitude
    # With an infinite or NaN sample every class is evaluated.
    threshold = tl.where(magnitude < float("inf"), threshold, float("-inf"))

    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // COLUMNS, pixel % COLUMNS
    inside = (row < rows) & (column < columns)
    y, x = y0 + row, x0 + column
    ty = second_weight(cell_y, y, h, height, DTYPE)
    tx = second_weight(cell_x, x, w, width, DTYPE)
    w_ul, w_ur, w_ll, w_lr = (1 - ty) * (1 - tx), (1 - ty) * tx, ty * (1 - tx), ty * tx
    best = tl.full([ROWS * COLUMNS], float("-inf"), DTYPE)
    label = tl.full([ROWS * COLUMNS], 0, tl.int32)
    for c0 in range(0, LANES, BLOCK_C):
        c = c0 + lane
        upper = tl.maximum(tl.load(ul_ptr + c), tl.load(ur_ptr + c))
        highest = tl.maximum(upper, tl.maximum(tl.load(ll_ptr + c), tl.load(lr_ptr + c)))
        candidate = (c < CLASSES) & ((highest >= threshold) | (highest != highest))
        one = tl.min(tl.where(candidate, c, CLASSES), 0)
        while one < CLASSES:
            z = w_ul * tl.load(ul_ptr + one) + w_ur * tl.load(ur_ptr + one)
            z += w_ll * tl.load(ll_ptr + one) + w_lr * tl.load(lr_ptr + one)
            higher = (z > best) | ((z != z) & (best == best))  # NaN is the maximum, the first one wins
            best = tl.where(higher, z, best)
            label = tl.where(higher, one, label)
            one = tl.min(tl.where(candidate & (c > one), c, CLASSES), 0)

    if labels_ptr is not None:
        at = (batch * height + y) * width + x
        tl.store(labels_ptr + at, label.to(labels_ptr.dtype.element_ty), mask=inside)
    if counts_ptr is not None:
        offset = batch * target_b + y * target_y + x * target_x
        truth, bad = read_labels(target_ptr, offset, inside, ignore_index, CLASSES)
        tl.store(bad_ptr + pid, first_bad(bad, pixel, batch, y0, x0, height, width, COLUMNS))
        # Large regions of one class make all pixels hit one address: equal pairs are counted first, one atomic for
        # all of them. Integers: the order does not matter.
        end: tl.constexpr = CLASSES * CLASSES
        wide: tl.constexpr = tl.int64 if CLASSES > 46340 else tl.int32
        pair = tl.where(truth >= 0, truth.to(wide) * CLASSES + label, end)
        first = tl.min(pair, 0)
        for _ in range(PAIRS):
            if first < end:
                equal = pair == first
                count = tl.sum(equal.to(tl.int64), 0)
                at = (first // CLASSES).to(tl.int64) * counts_y + (first % CLASSES) * counts_x
                tl.atomic_add(counts_ptr + at, count, sem="relaxed")
                pair = tl.where(equal, end, pair)
                first = tl.min(pair, 0)
        if first < end:
            at = (pair // CLASSES).to(tl.int64) * counts_y + (pair % CLASSES) * counts_x
            tl.atomic_add(
                counts_ptr + at, tl.full([ROWS * COLUMNS], 1, tl.int64), mask=pair < end, sem="relaxed"
            )
