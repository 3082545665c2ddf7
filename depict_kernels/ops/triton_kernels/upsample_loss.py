"""Cross-entropy of upsampled logits and its gradient, tile by tile (csrc/cpu/cross_entropy.h does the same).

Inside a cell a class logit is linear along a pixel row, so its exponential is a geometric series e r^k: two
exponentials per class, row and tile of up to 16 columns, taken anew in every row. Logits come shifted by each
sample's maximum over classes; the bilinear shift bounds every interpolated logit, so no exponential overflows.

    Z[k] = sum over classes of e_c r_c^k,   loss = scale log Z[k] - hit z_y - smoothing part
    gradient of the cell's samples: sums over rows and k of bilinear weight * (u[k] e_c r_c^k - one-hot part),
    u[k] = scale / Z[k]: polynomials in r_c, evaluated by Horner's rule, no exponential stored

A tile in which a class falls further than the series can hold, or whose sums get small, is left to
upsample_careful.py, which takes every pixel's own maximum. Every tile writes the gradient of its four samples to a
place of its own; upsample_reduce.py adds them in a fixed order: no float atomics, bitwise repeatable.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.tiles import rounded_product, sum_of_products
from depict_kernels.ops.triton_kernels.upsample_cells import (
    NO_BAD,
    NONE,
    corners_of,
    first_bad,
    place_of,
    read_labels,
    second_weight,
    step_of,
    tile_of,
)

# Exponents below FLOOR are raised to it. That is harmless for a class that stays below NEGLIGIBLE in the whole cell
# while the sum is at least SMALL_SUM (a relative error of e^-42 / 2e-9 = 3e-10), and only then. FLOOR leaves room
# for an upstream gradient of 1e9: Horner's polynomials reach 16 e^64 times scale before e takes it back.
FLOOR = tl.constexpr(-64.0)
NEGLIGIBLE = tl.constexpr(-42.0)
SMALL_SUM = tl.constexpr(2e-9)
LOG2_E = tl.constexpr(1.4426950408889634)

SIZES = ["h", "w", "height", "width", "parts_y", "parts_x", "ignore_index", "first", "count", "held"]


@triton.jit
def _first_terms(packed_ptr, corners, c, tx, ty, step, LANES, COLUMNS: tl.constexpr):
    """Per row and class of a block: first term e and ratio r of the series; 1 per class that it cannot hold.

    The shifted logits are s + dx x + dy y + dxy x y, in base 2.
    """
    ul, ur = tl.load(packed_ptr + corners[0] * LANES + c), tl.load(packed_ptr + corners[1] * LANES + c)
    ll, lr = tl.load(packed_ptr + corners[2] * LANES + c), tl.load(packed_ptr + corners[3] * LANES + c)
    lowest = tl.minimum(tl.minimum(ul, ur), tl.minimum(ll, lr))
    highest = tl.maximum(tl.maximum(ul, ur), tl.maximum(ll, lr))
    wide = ((lowest < FLOOR) & (highest > NEGLIGIBLE)).to(tl.int32)
    # NaN passes these comparisons and reaches the loss.
    ul, ur = tl.where(ul < FLOOR, FLOOR, ul) * LOG2_E, tl.where(ur < FLOOR, FLOOR, ur) * LOG2_E
    ll, lr = tl.where(ll < FLOOR, FLOOR, ll) * LOG2_E, tl.where(lr < FLOOR, FLOOR, lr) * LOG2_E
    dx, dy, dxy = ur - ul, ll - ul, (lr - ll) - (ur - ul)
    slope = dx[None, :] + dxy[None, :] * ty[:, None]
    e = tl.exp2((ul[None, :] + dy[None, :] * ty[:, None]) + slope * tx)
    r = e  # a tile of one column needs no ratio, and r may be infinite where a step is longer than a cell
    if COLUMNS > 1:
        r = tl.exp2(slope * step)
    return e, r, wide


@triton.jit
def _rows_of(cell_y, cell_x, y0, rows, x0, h, w, height, width, ROWS: tl.constexpr):
    """A tile's rows: index, y, weight of the lower samples; at its first column, that of the right ones; its step."""
    row = tl.arange(0, ROWS)
    y = y0 + tl.minimum(row, rows - 1)  # rows past the last repeat it and do not count
    ty = second_weight(cell_y, y, h, height, tl.float32)
    tx = second_weight(cell_x, x0, w, width, tl.float32)
    return row, y, ty, tx, step_of(cell_x, w, width, tl.float32)


@triton.jit
def pixels(
    target,  # pointer and strides of b, y, x
    upstream,  # the same, with pointer None for a gradient of 1
    weights,  # pointers to the class weights and their sum, or None
    batch,
    y,
    x,
    inside,
    ignore_index,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Per pixel: label, whether it is bad, class weight, coefficients of z_y (hit), of log Z, of the smoothing part."""
    offset = batch * target[1] + y * target[2] + x * target[3]
    label, bad = read_labels(target[0], offset, inside, ignore_index, CLASSES)
    valid = label >= 0
    each = valid.to(DTYPE)
    if weights[0] is None:
        weight = each
    else:
        weight = tl.load(weights[0] + label, mask=valid, other=0.0)
    hit = (1.0 - SMOOTHING) * weight
    if upstream[0] is not None:
        offset = batch * upstream[1] + y * upstream[2] + x * upstream[3]
        each = tl.load(upstream[0] + offset, mask=valid, other=0.0).to(DTYPE)
        hit *= each
    smooth = SMOOTHING / CLASSES * each
    scale = hit
    if SMOOTHING > 0:
        if weights[1] is None:
            scale += CLASSES * smooth
        else:
            scale += tl.load(weights[1]) * smooth
    return label, bad, weight, hit, scale, smooth


@triton.jit
def bilinear(ul, ur, ll, lr, tx, ty):
    """Interpolates a cell's four samples, with the same rounding wherever it is called.

    A logit must not exceed the maximum that it was part of. Classes that are masked in the same samples tie; in a fused
    sum the small terms of the others would decide how the huge ones round, and make them differ by that.
    """
    upper = rounded_product(1 - tx, ul) + rounded_product(tx, ur)
    lower = rounded_product(1 - tx, ll) + rounded_product(tx, lr)
    return rounded_product(1 - ty, upper) + rounded_product(ty, lower)


@triton.jit
def losses(
    packed_ptr,
    smooth_ptr,
    corners,
    tx,
    ty,
    label,
    hit,
    smooth,
    weight_sum_ptr,
    log_sum,
    peak,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss per pixel; ``log_sum`` is the logarithm of the sum of exponentials of the shifted logits less ``peak``."""
    valid = label >= 0
    z = bilinear(
        tl.load(packed_ptr + corners[0] * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + corners[1] * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + corners[2] * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + corners[3] * LANES + label, mask=valid, other=0.0),
        tx,
        ty,
    )
    # An infinite weight multiplies what is positive, not terms of both signs. Beside masked samples peak and z are
    # huge, and the logarithm would round away.
    loss = hit * (log_sum + (peak - z))
    if SMOOTHING > 0:
        at_samples = bilinear(
            tl.load(smooth_ptr + corners[0]),
            tl.load(smooth_ptr + corners[1]),
            tl.load(smooth_ptr + corners[2]),
            tl.load(smooth_ptr + corners[3]),
            tx,
            ty,
        )
        log_z = log_sum + peak
        if weight_sum_ptr is None:
            loss += smooth * CLASSES * (log_z - at_samples)
        else:
            all = tl.load(weight_sum_ptr)
            loss += smooth * (all * log_z) - smooth * CLASSES * at_samples
            loss = tl.where(tl.abs(all) == float("inf"), all, loss)
    return tl.where(valid, loss, 0.0)


@triton.jit(do_not_specialize=SIZES)
def loss_series(
    packed_ptr,  # (B * h * w, LANES) float32: shifted logits, classes innermost
    smooth_ptr,  # (B * h * w,) or None without label smoothing
    weight_ptr,  # (C,) or None
    weight_sum_ptr,  # () or None
    target_ptr,  # (B, H, W)
    upstream_ptr,  # (B, H, W) or None: gradient of the unreduced loss
    pixel_loss_ptr,  # (B, H, W) contiguous or None
    partial_ptr,  # (tiles, 2) float64 or None: summed loss and weight
    bad_ptr,  # (tiles,) int64 or None: linear index of the first bad label
    careful_ptr,  # (count,) int8: 1 for a tile left to loss_careful
    u_ptr,  # (count, 2, COLUMNS, ROWS) float32: u of each pixel, in the first half
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
    first,  # of the tiles to do; one program each
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # pixels of a tile along x, at most 16
    WIDTH: tl.constexpr,  # COLUMNS rounded up to a power of two
    BLOCK_C: tl.constexpr,
):
    """Losses and u = scale / Z of the pixels of one tile."""
    local = tl.program_id(0).to(tl.int64)
    pid = first + local
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x, WIDE)
    if rows * columns == 0:
        tl.store(careful_ptr + local, 0)
        if partial_ptr is not None:
            tl.store(partial_ptr + 2 * pid, 0.0)
            tl.store(partial_ptr + 2 * pid + 1, 0.0)
        if bad_ptr is not None:
            tl.store(bad_ptr + pid, NO_BAD)
        return

    lane = tl.arange(0, BLOCK_C)
    corners = corners_of(batch, cell_y, cell_x, h, w)
    row, y, ty, tx, step = _rows_of(cell_y, cell_x, y0, rows, x0, h, w, height, width, ROWS)

    zero = tl.full([ROWS, BLOCK_C], 0.0, tl.float32)
    sums = ()
    for _column in tl.static_range(COLUMNS):
        sums = sums + (zero,)
    wide = tl.full([BLOCK_C], 0, tl.int32)
    for c0 in range(0, LANES, BLOCK_C):
        e, r, too_wide = _first_terms(packed_ptr, corners, c0 + lane, tx, ty, step, LANES, COLUMNS)
        wide |= too_wide
        r2 = r * r
        grown = ()
        for k in tl.static_range(COLUMNS):  # r and r^2 in turn: fewer products and roundings than r alone
            grown = grown + (sums[k] + (e if k % 2 == 0 else e * r),)
            if k % 2 == 1:
                e = e * r2
        sums = grown

    # The sums change hands through memory: from one thread per row, all of whose columns it knows, to one thread
    # per pixel. What follows would be done by every thread of a row otherwise.
    u_ptr += local * 2 * COLUMNS * ROWS
    for k in tl.static_range(COLUMNS):
        tl.store(u_ptr + k * ROWS + row, tl.sum(sums[k], 1))
    tl.debug_barrier()
    column = tl.arange(0, WIDTH)
    own = u_ptr + column[None, :] * ROWS + row[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    z = tl.load(own, mask=inside, other=1.0)
    target = (target_ptr, target_b, target_y, target_x)
    upstream = (upstream_ptr, upstream_b, upstream_y, upstream_x)
    x, weights = x0 + column, (weight_ptr, weight_sum_ptr)
    label, bad, weight, hit, scale, smooth = pixels(
        target, upstream, weights, batch, y[:, None], x[None, :], inside, ignore_index, SMOOTHING, CLASSES, tl.float32
    )  # fmt: skip
    live = scale != 0
    small = tl.max((live & (z < SMALL_SUM)).to(tl.int32))
    careful = tl.maximum(small, tl.max(wide, 0))
    tl.store(careful_ptr + local, careful.to(tl.int8))
    if careful != 0:
        return
    tl.debug_barrier()  # every thread has read its sums
    tl.store(own, tl.where(live, scale / z, 0.0), mask=(column < COLUMNS)[None, :])
    if bad_ptr is not None:
        pixel = row[:, None] * WIDTH + column[None, :]
        tl.store(bad_ptr + pid, first_bad(bad, pixel, batch, y0, x0, height, width, WIDTH))
    if (partial_ptr is not None) or (pixel_loss_ptr is not None):
        pixel_tx = tx + step * column.to(tl.float32)[None, :]
        log_sum = tl.log(tl.where(live, z, 1.0))
        loss = losses(
            packed_ptr, smooth_ptr, corners, pixel_tx, ty[:, None], label, hit, smooth, weight_sum_ptr, log_sum,
            0.0, SMOOTHING, CLASSES, LANES,
        )  # fmt: skip
        if pixel_loss_ptr is not None:
            at = (batch * height + y[:, None]) * width + x[None, :]
            tl.store(pixel_loss_ptr + at, loss, mask=inside)
        if partial_ptr is not None:
            tl.store(partial_ptr + 2 * pid, tl.sum(loss.to(tl.float64)))
            tl.store(partial_ptr + 2 * pid + 1, tl.sum(weight.to(tl.float64)))


@triton.jit(do_not_specialize=SIZES)
def gradient_series(
    packed_ptr,  # (B * h * w, LANES) float32; the other arguments as in loss_series
    weight_ptr,
    weight_sum_ptr,
    target_ptr,
    upstream_ptr,
    careful_ptr,
    u_ptr,  # a tile's part is scratch once u is read
    samples_ptr,  # (held, 4, LANES) float32: gradient of the samples of a tile's cell, at the tile's number % held
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
    first,
    held,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient that one tile gives to the four samples of its cell."""
    local = tl.program_id(0).to(tl.int64)
    if tl.load(careful_ptr + local) != 0:
        return
    pid = first + local
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x, WIDE)
    lane = tl.arange(0, BLOCK_C)
    samples_ptr += place_of(pid, held) * 4 * LANES
    if rows * columns == 0:
        for c0 in range(0, 4 * LANES, BLOCK_C):
            tl.store(samples_ptr + c0 + lane, tl.full([BLOCK_C], 0.0, tl.float32))
        return

    corners = corners_of(batch, cell_y, cell_x, h, w)
    row, y, ty, tx, step = _rows_of(cell_y, cell_x, y0, rows, x0, h, w, height, width, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    target = (target_ptr, target_b, target_y, target_x)
    upstream = (upstream_ptr, upstream_b, upstream_y, upstream_x)
    x, weights = x0 + column, (weight_ptr, weight_sum_ptr)
    label, _bad, _weight, hit, _scale, smooth = pixels(
        target, upstream, weights, batch, y[:, None], x[None, :], inside, ignore_index, SMOOTHING, CLASSES, tl.float32
    )  # fmt: skip
    pixel_tx = tx + step * column.to(tl.float32)[None, :]
    hit_right, hit_lower = hit * pixel_tx, hit * ty[:, None]
    hit_lr = hit_right * ty[:, None]
    coming = tl.min(tl.where(label >= 0, label, NONE))  # the next label that occurs in the tile
    if SMOOTHING > 0:
        smooth_right = rounded_product(smooth, pixel_tx)
        s_all, s_right = tl.sum(smooth + 0.0), tl.sum(smooth_right)  # (+ 0.0: see rounded_product)
        s_lower, s_lr = (
            sum_of_products(smooth, ty[:, None], None),
            sum_of_products(smooth_right, ty[:, None], None),
        )

    u_ptr += local * 2 * COLUMNS * ROWS
    u = ()
    for k in tl.static_range(COLUMNS):
        u = u + (tl.load(u_ptr + k * ROWS + row)[:, None],)
    # In its place, where it is needed: each pixel's label and, in the lower half, coefficient of z_y.
    hit_ptr = u_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    handed_over = False
    zero = tl.full([ROWS, BLOCK_C], 0.0, tl.float32)
    for c0 in range(0, LANES, BLOCK_C):
        c = c0 + lane
        e, r, _wide = _first_terms(packed_ptr, corners, c, tx, ty, step, LANES, COLUMNS)
        # total = sum of u_k r^k; moment = sum of k u_k r^k = r times its derivative
        total, moment = zero + u[COLUMNS - 1], zero
        for i in tl.static_range(1, COLUMNS):
            moment = moment * r + total
            total = total * r + u[COLUMNS - 1 - i]
        total, moment = rounded_product(total, e), rounded_product(moment, e * r)
        # The one-hot part. Of one label its sums over the tile are taken below; where a block of classes has several,
        # every class looks at every pixel, which costs as much as two such sums.
        last = -1
        if coming < c0 + BLOCK_C:
            last = tl.max(tl.where(label < c0 + BLOCK_C, label, -1))
            if last > coming:
                if not handed_over:  # through memory to the threads that hold a row's sums, as in loss_series
                    packed = (label.to(tl.int64) << 32) | hit.to(tl.uint32, bitcast=True).to(tl.int64)
                    own = hit_ptr + column[None, :] * ROWS + row[:, None]
                    tl.debug_barrier()  # every thread has its u
                    tl.store(own, packed, mask=(column < COLUMNS)[None, :])
                    tl.debug_barrier()
                    handed_over = True
                for k in tl.static_range(COLUMNS):
                    both = tl.load(hit_ptr + k * ROWS + row)[:, None]
                    is_class = (both >> 32).to(tl.int32) == c[None, :]
                    one_hot = tl.where(is_class, both.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
                    total -= one_hot
                    moment -= k * one_hot
        g_all, g_moment = tl.sum(total, 0), tl.sum(moment, 0)
        g_lower, g_lower_moment = (
            sum_of_products(total, ty[:, None], 0),
            sum_of_products(moment, ty[:, None], 0),
        )
        g_right, g_lr = tx * g_all + step * g_moment, tx * g_lower + step * g_lower_moment
        if last >= 0:
            if last == coming:
                here, is_class = label == coming, c == coming
                g_all -= tl.where(is_class, tl.sum(tl.where(here, hit, 0.0)), 0.0)
                g_right -= tl.where(is_class, tl.sum(tl.where(here, hit_right, 0.0)), 0.0)
                g_lower -= tl.where(is_class, tl.sum(tl.where(here, hit_lower, 0.0)), 0.0)
                g_lr -= tl.where(is_class, tl.sum(tl.where(here, hit_lr, 0.0)), 0.0)
            coming = tl.min(tl.where(label > last, label, NONE))
        if SMOOTHING > 0:
            if weight_ptr is None:
                share = tl.full([BLOCK_C], 1.0, tl.float32)
            else:
                share = tl.load(weight_ptr + c, mask=c < CLASSES, other=0.0)
            g_all -= share * s_all
            g_right -= share * s_right
            g_lower -= share * s_lower
            g_lr -= share * s_lr
        tl.store(samples_ptr + c, (g_all - g_right) - (g_lower - g_lr))
        tl.store(samples_ptr + LANES + c, g_right - g_lr)
        tl.store(samples_ptr + 2 * LANES + c, g_lower - g_lr)
        tl.store(samples_ptr + 3 * LANES + c, g_lr)
