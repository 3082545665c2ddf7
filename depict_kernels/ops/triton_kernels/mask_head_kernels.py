"""The mask head's kernels; mask_head.py launches them. Formulas in ops/reference/mask_head.py.

Tiles of patches x classes come as a tuple, one per chunk of classes; the helpers that walk the chunks serve both ways
of going through the classes: all of them at once, in registers, or (LOOP) block by block, twice.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.mask_head_scale import scales
from depict_kernels.ops.triton_kernels.tiles import (
    load_tile,
    rounded_product,
    sum_of_products,
    zero_rows,
)


@triton.jit
def _class_range(START, WIDTH: tl.constexpr):
    return START + tl.arange(0, WIDTH)


@triton.jit
def _logit_offsets(classes, rows, patch_count, WIDE: tl.constexpr):
    """Offsets in an image's (C, N) logits; 64 bits only for an image of 2**31 logits, they cost registers."""
    if WIDE:
        classes = classes.to(tl.int64)
    return classes[None, :] * patch_count + rows[:, None]


@triton.jit
def _zero_vector(WIDTH: tl.constexpr):
    return tl.zeros((WIDTH,), tl.float32)


@triton.jit
def _products(
    x,  # pointer to the first patch, row stride, patches left
    q,  # pointer to class 0, row stride, number of classes
    start,  # first class
    width,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x q^T in chunks of classes."""
    q_ptr = q[0] + tl.cast(start, tl.int64) * q[1]
    products = zero_rows(BLOCK_N, WIDTHS)
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for at in range(0, width, BLOCK_D):
        x_tile = load_tile(x[0] + at, x[1], row, column, x[2], width - at)
        new_products = ()
        for i in tl.static_range(len(WIDTHS)):
            classes = _class_range(STARTS[i], WIDTHS[i])
            q_tile = load_tile(q_ptr + at, q[1], classes, column, q[2] - start, width - at)
            product = tl.dot(x_tile, tl.trans(q_tile), products[i], input_precision=PRECISION)
            new_products = new_products + (product,)
        products = new_products
    return products


@triton.jit
def _tiles(
    x, q, start, at, width, STARTS: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Columns ``at`` and following of the patches and, in chunks, of the classes; zeros from ``width`` on."""
    q_ptr = q[0] + tl.cast(start, tl.int64) * q[1] + at
    column = tl.arange(0, BLOCK_D)
    x_tile = load_tile(x[0] + at, x[1], tl.arange(0, BLOCK_N), column, x[2], width - at)
    q_tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        classes = _class_range(STARTS[i], WIDTHS[i])
        q_tiles = q_tiles + (load_tile(q_ptr, q[1], classes, column, q[2] - start, width - at),)
    return x_tile, q_tiles


@triton.jit
def _products_and_norms(
    x, q, start, width, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What :func:`_products` gives, and the sums of squares of x's rows and (in chunks) of q's.

    Tiles are loaded a step ahead by hand. Left to Triton's pipeliner (which a loop of one stage is not), tiles that
    both wgmma and the sums read get too few buffers: up to 3.9 at least, it overwrites them while wgmma still reads
    (https://github.com/triton-lang/triton/issues/6691).
    """
    products = zero_rows(BLOCK_N, WIDTHS)
    x_squares = tl.zeros((BLOCK_N,), tl.float32)
    q_squares = ()
    for i in tl.static_range(len(WIDTHS)):
        q_squares = q_squares + (_zero_vector(WIDTHS[i]),)
    x_tile, q_tiles = _tiles(x, q, start, 0, width, STARTS, WIDTHS, BLOCK_N, BLOCK_D)
    for at in tl.range(0, width, BLOCK_D, num_stages=1):
        next_x, next_q = _tiles(x, q, start, at + BLOCK_D, width, STARTS, WIDTHS, BLOCK_N, BLOCK_D)
        x_squares += sum_of_products(x_tile.to(tl.float32), x_tile.to(tl.float32), 1)
        new_products, new_squares = (), ()
        for i in tl.static_range(len(WIDTHS)):
            product = tl.dot(x_tile, tl.trans(q_tiles[i]), products[i], input_precision=PRECISION)
            new_products = new_products + (product,)
            squares = sum_of_products(q_tiles[i].to(tl.float32), q_tiles[i].to(tl.float32), 1)
            new_squares = new_squares + (q_squares[i] + squares,)
        products, q_squares = new_products, new_squares
        x_tile, q_tiles = next_x, next_q
    return products, x_squares, q_squares


@triton.jit
def _inverse_norm(squares):
    """1 / norm, and 0 for a zero vector: zero vectors give zeros, not NaN."""
    return tl.where(squares > 0, 1 / tl.sqrt_rn(tl.where(squares > 0, squares, 1.0)), 0.0)


@triton.jit
def _end(class_count, WIDTHS: tl.constexpr, LOOP: tl.constexpr):
    """Where a pass over the classes ends, in steps of WIDTHS[0]: without LOOP after one, compiled as no loop."""
    if LOOP:
        return class_count
    else:
        return WIDTHS[0]


# --- forward ---


@triton.jit
def _cosines(
    x, q, inv_q_ptr, write, start, width, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines in chunks (0 past the last class) and 1 / |patch|; where ``write``, stores 1 / |class|."""
    products, x_squares, q_squares = _products_and_norms(
        x, q, start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D
    )
    inv_x = _inverse_norm(x_squares)
    cosines = ()
    for i in tl.static_range(len(WIDTHS)):
        inv_q = _inverse_norm(q_squares[i])
        if write:
            classes = _class_range(start + STARTS[i], WIDTHS[i])
            tl.store(inv_q_ptr + classes, inv_q, mask=classes < q[2])
        cosines = cosines + (rounded_product(products[i] * inv_x[:, None], inv_q[None, :]),)
    return cosines, inv_x


@triton.jit
def _merge(mean, deviation, cosines, start, class_count, STARTS: tl.constexpr, WIDTHS: tl.constexpr):
    """Mean and summed squared deviation of the classes before ``start`` with those of ``cosines`` (Chan's update)."""
    sums = tl.zeros_like(mean)
    for i in tl.static_range(len(WIDTHS)):
        sums += tl.sum(cosines[i], 1)
    count = tl.minimum(class_count - start, STARTS[len(WIDTHS) - 1] + WIDTHS[len(WIDTHS) - 1]).to(tl.float32)
    own = sums / count
    squares = tl.zeros_like(mean)
    for i in tl.static_range(len(WIDTHS)):
        valid = _class_range(start + STARTS[i], WIDTHS[i]) < class_count
        centred = tl.where(valid[None, :], cosines[i] - own[:, None], 0.0)
        squares += sum_of_products(centred, centred, 1)
    merged = start + count
    step = own - mean
    return mean + step * (count / merged), deviation + (squares + step * step * (start * count / merged))


@triton.jit
def _store_logits(
    logits_ptr, weight_ptr, bias_ptr, cosines, mean, rstd, start, patch_count, class_count, rows, left,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """LayerNorm's affine part and the transposed store: logits_ptr is at the first patch of class 0."""
    for i in tl.static_range(len(WIDTHS)):
        classes = _class_range(start + STARTS[i], WIDTHS[i])
        valid = classes < class_count
        weight = tl.load(weight_ptr + classes, mask=valid, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + classes, mask=valid, other=0.0).to(tl.float32)
        y = (cosines[i] - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        offset = _logit_offsets(classes, rows, patch_count, WIDE)
        mask = (rows[:, None] < left) & valid[None, :]
        tl.store(logits_ptr + offset, y.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mask_forward(
    x_ptr,  # (B, N, D)
    q_ptr,  # (B, C, D)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    logits_ptr,  # (B, C, N) contiguous
    inv_x_ptr,  # (B, N) float32
    inv_q_ptr,  # (B, C) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    patch_count,
    class_count,
    width,
    x_batch,  # strides in units of UNIT elements
    x_row,
    q_batch,
    q_row,
    eps,
    UNIT: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LOOP: tl.constexpr,  # classes go in blocks of WIDTHS[0], twice
    WIDE: tl.constexpr,  # an image's logits need 64-bit offsets
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(patch_count, BLOCK_N)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    left = patch_count - block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    x = (x_ptr + batch * x_batch * UNIT + first * x_row * UNIT, x_row * UNIT, left)
    q = (q_ptr + batch * q_batch * UNIT, q_row * UNIT, class_count)
    logits_ptr += batch * class_count * patch_count + first
    inv_q_ptr += batch * class_count

    mean = tl.zeros((BLOCK_N,), tl.float32)  # and sum of squared deviations of the classes so far
    deviation = tl.zeros((BLOCK_N,), tl.float32)
    inv_x = tl.zeros((BLOCK_N,), tl.float32)
    cosines = zero_rows(BLOCK_N, WIDTHS)
    end = _end(class_count, WIDTHS, LOOP)
    for start in range(0, end, WIDTHS[0]):
        cosines, inv_x = _cosines(
            x, q, inv_q_ptr, block == 0, start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D
        )
        mean, deviation = _merge(mean, deviation, cosines, start, class_count, STARTS, WIDTHS)
    rstd = 1 / tl.sqrt_rn(deviation / class_count + eps)
    for start in range(0, end, WIDTHS[0]):
        if LOOP:
            cosines, _ = _cosines(
                x, q, inv_q_ptr, False, start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D
            )
        _store_logits(
            logits_ptr, weight_ptr, bias_ptr, cosines, mean, rstd, start, patch_count, class_count, rows, left,
            STARTS, WIDTHS, WIDE,
        )  # fmt: skip

    offset = batch * patch_count + first + rows
    tl.store(inv_x_ptr + offset, inv_x, mask=rows < left)
    tl.store(mean_ptr + offset, mean, mask=rows < left)
    tl.store(rstd_ptr + offset, rstd, mask=rows < left)


# --- backward ---


@triton.jit
def _upstream(
    grad_ptr, weight_ptr, inv_q_ptr, product, patch, classes, patch_count, class_count, rows, WIDE: tl.constexpr
):  # fmt: skip
    """For one chunk: upstream gradient, that times weight, cosines, normalised cosines, 1 / |class|.

    Past the last class and the last patch all gradients are 0.
    """
    inv_x, mean, rstd, left = patch
    valid = classes < class_count
    mask = (rows[:, None] < left) & valid[None, :]
    offset = _logit_offsets(classes, rows, patch_count, WIDE)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + classes, mask=valid, other=0.0).to(tl.float32)
    inv_q = tl.load(inv_q_ptr + classes, mask=valid, other=0.0)
    m = product * inv_x[:, None] * inv_q[None, :]
    z = (m - mean[:, None]) * rstd[:, None]
    return grad, rounded_product(grad, weight[None, :]), m, z, inv_q


@triton.jit
def _add_sums(
    mean_g, mean_gz, grad_ptr, weight_ptr, inv_q_ptr, products, patch, start, patch_count, class_count, rows,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds g and g z of the chunks' classes, g being the gradient of the normalised cosines."""
    for i in tl.static_range(len(WIDTHS)):
        _, g, _, z, _ = _upstream(
            grad_ptr, weight_ptr, inv_q_ptr, products[i], patch, _class_range(start + STARTS[i], WIDTHS[i]),
            patch_count, class_count, rows, WIDE,
        )  # fmt: skip
        mean_g += tl.sum(g, 1)
        mean_gz += sum_of_products(g, z, 1)
    return mean_g, mean_gz


@triton.jit
def _finish(
    t_ptr, sums_ptr, along, scale, mean_g, mean_gz, grad_ptr, weight_ptr, inv_q_ptr, products, patch, start, t_row,
    sums_stride, patch_count, class_count, rows, STARTS: tl.constexpr, WIDTHS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores t and the chunks' sums over the patches; adds their part of the sum of grad_m * m per patch to along.

    The gradient is read again: from L2, where registers are dear.
    """
    inv_x, _, rstd, left = patch
    for i in tl.static_range(len(WIDTHS)):
        classes = _class_range(start + STARTS[i], WIDTHS[i])
        grad, g, _, z, inv_q = _upstream(
            grad_ptr, weight_ptr, inv_q_ptr, products[i], patch, classes, patch_count, class_count, rows, WIDE
        )  # fmt: skip
        valid = classes < class_count
        grad_m = rstd[:, None] * (g - mean_g[:, None] - z * mean_gz[:, None])
        grad_m = tl.where((rows[:, None] < left) & valid[None, :], grad_m, 0.0)
        t = (grad_m * inv_x[:, None] * (inv_q * scale)[None, :]).to(t_ptr.dtype.element_ty)
        # Zeros up to the row's end: the products then need no mask inside a vector.
        mask = (rows[:, None] < left) & (classes < t_row)[None, :]
        tl.store(t_ptr + (rows[:, None] * t_row + classes[None, :]), t, mask=mask)
        # grad_m * m of t as it was rounded: the gradients are then orthogonal to the vectors as they should.
        product = rounded_product(t.to(tl.float32), products[i])
        tl.store(sums_ptr + classes, sum_of_products(grad, z, 0), mask=valid)
        tl.store(sums_ptr + sums_stride + classes, tl.sum(grad, 0), mask=valid)
        tl.store(sums_ptr + 2 * sums_stride + classes, tl.sum(product, 0), mask=valid)
        along += tl.sum(product, 1)
    return along


@triton.jit
def mask_backward(
    grad_ptr,  # (B, C, N) contiguous
    x_ptr,  # (B, N, D)
    q_ptr,  # (B, C, D)
    weight_ptr,  # (C,)
    inv_x_ptr,  # (B, N)
    inv_q_ptr,  # (B, C)
    mean_ptr,  # (B, N)
    rstd_ptr,  # (B, N)
    peak_ptr,  # (B, peaks), or None: t goes without a scale
    t_ptr,  # (B, N, t_row): gradient of x q^T times an image's scale, in x's dtype, and zeros
    along_ptr,  # (B, N) float32: what times x is to be subtracted from t q
    sums_ptr,  # (3, programs, C) float32: of grad * z, grad, scale * grad_m * m over a program's patches
    unscale_ptr,  # (B,), or None: 1 / scale
    peaks,
    patch_count,
    class_count,
    width,
    t_row,
    x_batch,
    x_row,
    q_batch,
    q_row,
    UNIT: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LOOP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(patch_count, BLOCK_N)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    left = patch_count - block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    x = (x_ptr + batch * x_batch * UNIT + first * x_row * UNIT, x_row * UNIT, left)
    q = (q_ptr + batch * q_batch * UNIT, q_row * UNIT, class_count)
    grad_ptr += batch * class_count * patch_count + first
    inv_q_ptr += batch * class_count
    t_ptr += (batch * patch_count + first) * t_row
    sums_ptr += tl.program_id(0).to(tl.int64) * class_count
    sums_stride = tl.num_programs(0).to(tl.int64) * class_count
    offset = batch * patch_count + first + rows
    inv_x = tl.load(inv_x_ptr + offset, mask=rows < left, other=0.0)
    mean = tl.load(mean_ptr + offset, mask=rows < left, other=0.0)
    rstd = tl.load(rstd_ptr + offset, mask=rows < left, other=0.0)
    patch = (inv_x, mean, rstd, left)
    scale = tl.full([], 1.0, tl.float32)
    if peak_ptr is not None:
        scale, unscale = scales(peak_ptr + batch * peaks, peaks)
        if block == 0:
            tl.store(unscale_ptr + batch, unscale)
    mean_g = tl.zeros((BLOCK_N,), tl.float32)
    mean_gz = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)

    products = zero_rows(BLOCK_N, WIDTHS)
    end = _end(class_count, WIDTHS, LOOP)
    for start in range(0, end, WIDTHS[0]):
        products = _products(x, q, start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D)
        mean_g, mean_gz = _add_sums(
            mean_g, mean_gz, grad_ptr, weight_ptr, inv_q_ptr, products, patch, start, patch_count, class_count, rows,
            STARTS, WIDTHS, WIDE,
        )  # fmt: skip
    mean_g /= class_count
    mean_gz /= class_count
    for start in range(0, end, WIDTHS[0]):
        if LOOP:
            products = _products(x, q, start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D)
        along = _finish(
            t_ptr, sums_ptr, along, scale, mean_g, mean_gz, grad_ptr, weight_ptr, inv_q_ptr, products, patch, start,
            t_row, sums_stride, patch_count, class_count, rows, STARTS, WIDTHS, WIDE,
        )  # fmt: skip
    tl.store(along_ptr + offset, along * inv_x * inv_x, mask=rows < left)
