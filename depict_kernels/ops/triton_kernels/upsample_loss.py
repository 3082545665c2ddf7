"""Cross-entropy of upsampled logits and its gradient, tile by tile (csrc/cpu/cross_entropy.h does the same).

Inside a cell a class logit is linear along a pixel row, so its exponential is a geometric series e r^k: two
exponentials per class, row and tile of up to 16 columns, taken anew in every row. Logits come shifted by each
sample's maximum over classes; the bilinear shift bounds every interpolated logit, so no exponential overflows.

    Z[k] = sum over classes of e_c r_c^k,   loss = scale log Z[k] - hit z_y - smoothing part
    gradient of the cell's samples: sums over rows and k of bilinear weight * (u[k] e_c r_c^k - one-hot part),
    u[k] = scale / Z[k]: polynomials in r_c, evaluated by Horner's rule, no exponential stored

A tile in which a class falls further than the series can hold, or whose sums get small, is left to the careful
kernel, which takes every pixel's own maximum. Every tile writes the gradient of its four samples to a place of its
own; upsample_reduce.py adds them in a fixed order: no float atomics, bitwise repeatable.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.upsample_cells import (
    NO_BAD,
    NONE,
    corners_of,
    first_bad,
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

_SIZES = ["h", "w", "height", "width", "parts_y", "parts_x", "ignore_index"]


@triton.jit
def _columns(tile, LEVELS: tl.constexpr):
    """(ROWS, 2**LEVELS) -> its columns, a tuple of (ROWS,)."""
    parts = (tile,)
    for level in tl.static_range(LEVELS):
        low, high = (), ()
        for i in tl.static_range(len(parts)):
            pairs = tl.reshape(parts[i], [tile.shape[0], 1 << (LEVELS - 1 - level), 2])
            even, odd = tl.split(pairs)
            low, high = low + (even,), high + (odd,)
        parts = low + high
    columns = ()
    for i in tl.static_range(len(parts)):
        columns = columns + (tl.reshape(parts[i], [tile.shape[0]]),)
    return columns


@triton.jit
def _stack(columns, LEVELS: tl.constexpr):
    """The inverse of :func:`_columns`; missing columns repeat the last."""
    parts = ()
    for i in tl.static_range(1 << LEVELS):
        column = columns[i if i < len(columns) else len(columns) - 1]
        parts = parts + (tl.reshape(column, [column.shape[0], 1]),)
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            pairs = tl.join(parts[i], parts[i + len(parts) // 2])
            joined = joined + (tl.reshape(pairs, [parts[i].shape[0], 2 << level]),)
        parts = joined
    return parts[0]


@triton.jit
def _series(ul_ptr, ur_ptr, ll_ptr, lr_ptr, c):
    """Shifted logits of a block of classes as s + dx x + dy y + dxy x y, base 2; 1 where the series cannot hold it."""
    ul, ur, ll, lr = tl.load(ul_ptr + c), tl.load(ur_ptr + c), tl.load(ll_ptr + c), tl.load(lr_ptr + c)
    lowest = tl.minimum(tl.minimum(ul, ur), tl.minimum(ll, lr))
    highest = tl.maximum(tl.maximum(ul, ur), tl.maximum(ll, lr))
    wide = ((lowest < FLOOR) & (highest > NEGLIGIBLE)).to(tl.int32)
    # NaN passes these comparisons and reaches the loss.
    ul, ur = tl.where(ul < FLOOR, FLOOR, ul) * LOG2_E, tl.where(ur < FLOOR, FLOOR, ur) * LOG2_E
    ll, lr = tl.where(ll < FLOOR, FLOOR, ll) * LOG2_E, tl.where(lr < FLOOR, FLOOR, lr) * LOG2_E
    return ul, ur - ul, ll - ul, (lr - ll) - (ur - ul), wide


@triton.jit
def _pixels(
    target_ptr,
    target_b,
    target_y,
    target_x,
    weight_ptr,
    weight_sum_ptr,
    upstream_ptr,
    upstream_b,
    upstream_y,
    upstream_x,
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
    label, bad = read_labels(
        target_ptr, batch * target_b + y * target_y + x * target_x, inside, ignore_index, CLASSES
    )
    valid = label >= 0
    each = valid.to(DTYPE)
    if weight_ptr is None:
        weight = each
    else:
        weight = tl.load(weight_ptr + label, mask=valid, other=0.0)
    if upstream_ptr is not None:
        offset = batch * upstream_b + y * upstream_y + x * upstream_x
        each = tl.load(upstream_ptr + offset, mask=valid, other=0.0).to(DTYPE)
    hit = (1.0 - SMOOTHING) * weight
    if upstream_ptr is not None:
        hit *= each
    smooth = SMOOTHING / CLASSES * each
    scale = hit
    if SMOOTHING > 0:
        if weight_sum_ptr is None:
            scale += CLASSES * smooth
        else:
            scale += tl.load(weight_sum_ptr) * smooth
    return label, bad, weight, hit, scale, smooth


@triton.jit
def _bilinear(ul, ur, ll, lr, tx, ty):
    return (1 - ty) * ((1 - tx) * ul + tx * ur) + ty * ((1 - tx) * ll + tx * lr)


@triton.jit
def _losses(
    packed_ptr,
    smooth_ptr,
    ul,
    ur,
    ll,
    lr,
    tx,
    ty,
    label,
    hit,
    scale,
    smooth,
    log_sum,
    SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss per pixel; ``log_sum`` is the logarithm of the sum of exponentials of the shifted logits."""
    valid = label >= 0
    z = _bilinear(
        tl.load(packed_ptr + ul * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + ur * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + ll * LANES + label, mask=valid, other=0.0),
        tl.load(packed_ptr + lr * LANES + label, mask=valid, other=0.0),
        tx,
        ty,
    )
    loss = scale * log_sum - hit * z
    if SMOOTHING > 0:
        at_samples = _bilinear(
            tl.load(smooth_ptr + ul),
            tl.load(smooth_ptr + ur),
            tl.load(smooth_ptr + ll),
            tl.load(smooth_ptr + lr),
            tx,
            ty,
        )
        loss -= smooth * at_samples
    return tl.where(valid, loss, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def loss_series(
    packed_ptr,  # (B * h * w, LANES) float32: shifted logits, classes innermost
    smooth_ptr,  # (B * h * w,) or None without label smoothing
    weight_ptr,  # (C,) or None
    weight_sum_ptr,  # (1,) or None
    target_ptr,  # (B, H, W)
    upstream_ptr,  # (B, H, W) or None: gradient of the unreduced loss
    pixel_loss_ptr,  # (B, H, W) contiguous or None
    partial_ptr,  # (tiles, 2) float64 or None: summed loss and weight
    bad_ptr,  # (tiles,) int64 or None: linear index of the first bad label
    careful_ptr,  # (tiles,) int8: 1 for a tile left to loss_careful
    samples_ptr,  # (tiles, 4, LANES) or None: gradient of the cell's samples
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
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # pixels of a tile along x, at most 16
    LEVELS: tl.constexpr,  # 2**LEVELS >= COLUMNS
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x)
    lane = tl.arange(0, BLOCK_C)
    if rows * columns == 0:
        tl.store(careful_ptr + pid, 0)
        if partial_ptr is not None:
            tl.store(partial_ptr + 2 * pid, 0.0)
            tl.store(partial_ptr + 2 * pid + 1, 0.0)
        if bad_ptr is not None:
            tl.store(bad_ptr + pid, NO_BAD)
        if samples_ptr is not None:
            for c0 in range(0, 4 * LANES, BLOCK_C):
                tl.store(samples_ptr + pid * 4 * LANES + c0 + lane, tl.full([BLOCK_C], 0.0, tl.float32))
        return

    ul, ur, ll, lr = corners_of(batch, cell_y, cell_x, h, w)
    ul_ptr, ur_ptr = packed_ptr + ul * LANES, packed_ptr + ur * LANES
    ll_ptr, lr_ptr = packed_ptr + ll * LANES, packed_ptr + lr * LANES
    row = tl.arange(0, ROWS)
    y = y0 + tl.minimum(row, rows - 1)  # rows past the last repeat it and do not count
    ty = second_weight(cell_y, y, h, height, tl.float32)
    tx = second_weight(cell_x, x0, w, width, tl.float32)
    step = step_of(cell_x, w, width, tl.float32)

    zero = tl.full([ROWS, BLOCK_C], 0.0, tl.float32)
    sums = ()
    for _column in tl.static_range(COLUMNS):
        sums = sums + (zero,)
    wide = tl.full([BLOCK_C], 0, tl.int32)
    for c0 in range(0, LANES, BLOCK_C):
        s, dx, dy, dxy, too_wide = _series(ul_ptr, ur_ptr, ll_ptr, lr_ptr, c0 + lane)
        wide |= too_wide
        slope = dx[None, :] + dxy[None, :] * ty[:, None]
        e = tl.exp2((s[None, :] + dy[None, :] * ty[:, None]) + slope * tx)
        r = tl.exp2(slope * step)
        r2 = r * r
        grown = ()
        for k in tl.static_range(COLUMNS):  # r and r^2 in turn: fewer products and roundings than r alone
            grown = grown + (sums[k] + (e if k % 2 == 0 else e * r),)
            if k % 2 == 1:
                e = e * r2
        sums = grown
    reduced = ()
    for k in tl.static_range(COLUMNS):
        reduced = reduced + (tl.sum(sums[k], 1),)
    z = _stack(reduced, LEVELS)  # (ROWS, 2**LEVELS)

    column = tl.arange(0, 1 << LEVELS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    label, bad, weight, hit, scale, smooth = _pixels(
        target_ptr,
        target_b,
        target_y,
        target_x,
        weight_ptr,
        weight_sum_ptr,
        upstream_ptr,
        upstream_b,
        upstream_y,
        upstream_x,
        batch,
        y[:, None],
        (x0 + column)[None, :],
        inside,
        ignore_index,
        SMOOTHING,
        CLASSES,
        tl.float32,
    )
    live = scale != 0
    small = tl.max((live & (z < SMALL_SUM)).to(tl.int32))
    careful = tl.maximum(small, tl.max(wide, 0))
    tl.store(careful_ptr + pid, careful.to(tl.int8))
    if careful == 0:
        z = tl.where(live, z, 1.0)
        pixel_tx = tx + step * column.to(tl.float32)[None, :]
        if (partial_ptr is not None) or (pixel_loss_ptr is not None):
            loss = _losses(
                packed_ptr,
                smooth_ptr,
                ul,
                ur,
                ll,
                lr,
                pixel_tx,
                ty[:, None],
                label,
                hit,
                scale,
                smooth,
                tl.log(z),
                SMOOTHING,
                LANES,
            )
            if pixel_loss_ptr is not None:
                at = (batch * height + y[:, None]) * width + (x0 + column)[None, :]
                tl.store(pixel_loss_ptr + at, loss, mask=inside)
            if partial_ptr is not None:
                tl.store(partial_ptr + 2 * pid, tl.sum(loss.to(tl.float64)))
                tl.store(partial_ptr + 2 * pid + 1, tl.sum(weight.to(tl.float64)))
        if bad_ptr is not None:
            local = row[:, None] * (1 << LEVELS) + column[None, :]
            tl.store(bad_ptr + pid, first_bad(bad, local, batch, y0, x0, height, width, 1 << LEVELS))

        if samples_ptr is not None:
            samples_ptr += pid * 4 * LANES
            if SMOOTHING > 0:
                row_right, row_all = tl.sum(smooth * pixel_tx, 1), tl.sum(smooth, 1)
                s_all, s_right = tl.sum(row_all, 0), tl.sum(row_right, 0)
                s_lower, s_lr = tl.sum(row_all * ty, 0), tl.sum(row_right * ty, 0)
            u = _columns(scale / z, LEVELS)
            block = tl.where(label >= 0, label // BLOCK_C * BLOCK_C, NONE)
            coming = tl.min(block)  # next block of classes in which some pixel has its label
            for c0 in range(0, LANES, BLOCK_C):
                c = c0 + lane
                s, dx, dy, dxy, too_wide = _series(ul_ptr, ur_ptr, ll_ptr, lr_ptr, c)
                slope = dx[None, :] + dxy[None, :] * ty[:, None]
                e = tl.exp2((s[None, :] + dy[None, :] * ty[:, None]) + slope * tx)
                r = tl.exp2(slope * step)
                # total = sum of u_k r^k; right = sum of k u_k r^k = r times its derivative
                total = tl.broadcast_to(u[COLUMNS - 1][:, None], [ROWS, BLOCK_C])
                right = zero
                for i in tl.static_range(1, COLUMNS):
                    right = right * r + total
                    total = total * r + u[COLUMNS - 1 - i][:, None]
                total *= e
                if COLUMNS > 1:  # else r may be infinite: downsampling steps over more than a cell
                    right *= e * r
                if c0 == coming:
                    labels = _columns(label, LEVELS)
                    if upstream_ptr is not None:
                        hits = _columns(hit, LEVELS)
                    hit_all = zero
                    hit_right = zero
                    for k in tl.static_range(COLUMNS):
                        here = labels[k][:, None] == c[None, :]
                        if upstream_ptr is None:  # every pixel of class c has the same weight
                            hit_all += tl.where(here, 1.0, 0.0)
                            hit_right += tl.where(here, 1.0 * k, 0.0)
                        else:
                            amount = tl.where(here, hits[k][:, None], 0.0)
                            hit_all += amount
                            hit_right += k * amount
                    if upstream_ptr is None:
                        share = tl.full([BLOCK_C], 1.0 - SMOOTHING, tl.float32)
                        if weight_ptr is not None:
                            share *= tl.load(weight_ptr + c, mask=c < CLASSES, other=0.0)
                        hit_all *= share[None, :]
                        hit_right *= share[None, :]
                    total -= hit_all
                    right -= hit_right
                    coming = tl.min(tl.where(block > c0, block, NONE))
                g_all, g_k = tl.sum(total, 0), tl.sum(right, 0)
                g_lower, g_lower_k = tl.sum(total * ty[:, None], 0), tl.sum(right * ty[:, None], 0)
                g_right, g_lr = tx * g_all + step * g_k, tx * g_lower + step * g_lower_k
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


@triton.jit(do_not_specialize=_SIZES)
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
    careful_ptr,  # (tiles,) int8, or None to do every tile
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
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two here
    BLOCK_C: tl.constexpr,
):
    """One exponential per pixel and class, relative to the pixel's own maximum."""
    pid = tl.program_id(0).to(tl.int64)
    if careful_ptr is not None:  # noqa: SIM102 (decided when compiled)
        if tl.load(careful_ptr + pid) == 0:
            return
    batch, cell_y, cell_x, y0, rows, x0, columns = tile_of(pid, h, w, height, width, parts_y, parts_x)
    DTYPE: tl.constexpr = packed_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // COLUMNS, pixel % COLUMNS
    inside = (row < rows) & (column < columns)
    y = y0 + tl.maximum(tl.minimum(row, rows - 1), 0)  # pixels past the last repeat it and do not count
    x = x0 + tl.maximum(tl.minimum(column, columns - 1), 0)
    ty = second_weight(cell_y, y, h, height, DTYPE)
    tx = second_weight(cell_x, x, w, width, DTYPE)
    ul, ur, ll, lr = corners_of(batch, cell_y, cell_x, h, w)
    label, bad, weight, hit, scale, smooth = _pixels(
        target_ptr,
        target_b,
        target_y,
        target_x,
        weight_ptr,
        weight_sum_ptr,
        upstream_ptr,
        upstream_b,
        upstream_y,
        upstream_x,
        batch,
        y,
        x,
        inside,
        ignore_index,
        SMOOTHING,
        CLASSES,
        DTYPE,
    )

    best = tl.full([ROWS * COLUMNS, BLOCK_C], float("-inf"), DTYPE)
    for c0 in range(0, LANES, BLOCK_C):
        z = _logits(packed_ptr, ul, ur, ll, lr, c0 + lane, tx, ty, CLASSES, LANES)
        best = tl.where(z > best, z, best)
    peak = tl.max(best, 1)
    sums = tl.full([ROWS * COLUMNS, BLOCK_C], 0.0, DTYPE)
    for c0 in range(0, LANES, BLOCK_C):
        z = _logits(packed_ptr, ul, ur, ll, lr, c0 + lane, tx, ty, CLASSES, LANES)
        sums += tl.exp(z - peak[:, None])
    sums = tl.sum(sums, 1)

    if (partial_ptr is not None) or (pixel_loss_ptr is not None):
        loss = _losses(
            packed_ptr,
            smooth_ptr,
            ul,
            ur,
            ll,
            lr,
            tx,
            ty,
            label,
            hit,
            scale,
            smooth,
            tl.log(sums) + peak,
            SMOOTHING,
            LANES,
        )
        if pixel_loss_ptr is not None:
            tl.store(pixel_loss_ptr + (batch * height + y) * width + x, loss, mask=inside)
        if partial_ptr is not None:
            tl.store(partial_ptr + 2 * pid, tl.sum(loss.to(tl.float64), 0))
            tl.store(partial_ptr + 2 * pid + 1, tl.sum(weight.to(tl.float64), 0))
    if bad_ptr is not None:
        tl.store(bad_ptr + pid, first_bad(bad, pixel, batch, y0, x0, height, width, COLUMNS))

    if samples_ptr is not None:
        samples_ptr += pid * 4 * LANES
        u = tl.where(scale != 0, scale / sums, 0.0)
        for c0 in range(0, LANES, BLOCK_C):
            c = c0 + lane
            z = _logits(packed_ptr, ul, ur, ll, lr, c, tx, ty, CLASSES, LANES)
            grad = tl.where((scale != 0)[:, None], tl.exp(z - peak[:, None]) * u[:, None], 0.0)
            grad -= tl.where(label[:, None] == c[None, :], hit[:, None], 0.0)
            if SMOOTHING > 0:
                if weight_ptr is None:
                    grad -= smooth[:, None]
                else:
                    grad -= smooth[:, None] * tl.load(weight_ptr + c, mask=c < CLASSES, other=0.0)[None, :]
            tl.store(samples_ptr + c, tl.sum(grad * ((1 - ty) * (1 - tx))[:, None], 0))
            tl.store(samples_ptr + LANES + c, tl.sum(grad * ((1 - ty) * tx)[:, None], 0))
            tl.store(samples_ptr + 2 * LANES + c, tl.sum(grad * (ty * (1 - tx))[:, None], 0))
            tl.store(samples_ptr + 3 * LANES + c, tl.sum(grad * (ty * tx)[:, None], 0))


@triton.jit
def _logits(packed_ptr, ul, ur, ll, lr, c, tx, ty, CLASSES: tl.constexpr, LANES: tl.constexpr):
    """Shifted logits of pixels (rows) and a block of classes (columns); -inf past the last class."""
    z = _bilinear(
        tl.load(packed_ptr + ul * LANES + c)[None, :],
        tl.load(packed_ptr + ur * LANES + c)[None, :],
        tl.load(packed_ptr + ll * LANES + c)[None, :],
        tl.load(packed_ptr + lr * LANES + c)[None, :],
        tx[:, None],
        ty[:, None],
    )
    return tl.where((c < CLASSES)[None, :], z, float("-inf"))
