"""Tiles whose width is no power of two: a tuple of tensors, one per chunk of columns.

Triton's ranges are powers of two, so a head width of 100 would be padded to 128. As chunks of 64, 32 and 16 it
costs 112: the least that tensor cores take, which want multiples of 16. The width is masked inside the last
chunk, so that no padded copy of the data is made.
"""

from __future__ import annotations

import triton
import triton.language as tl


def chunks(width: int, widest: int = 64) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and widths of the power-of-two chunks that cover ``width``: 100 -> (0, 64, 96), (64, 32, 16).

    None is wider than ``widest``. 64 because Triton splits an accumulator wider than it is tall over its columns on
    sm_80, and the softmax between the two products then goes through shared memory. 128 is for Hopper: every product
    there costs a fence and a wait besides, so 100 is one chunk of 128, 16 columns more than it needs.
    """
    padded = max(16, -(-width // 16) * 16)
    if widest > 64 and padded % widest == widest - 16:
        padded += 16
    widths = (widest,) * (padded // widest) + tuple(w for w in (64, 32, 16) if padded % widest & w)
    starts = tuple(sum(widths[:i]) for i in range(len(widths)))
    return starts, widths


@triton.jit
def load_tile(ptr, row_stride, rows, columns, rows_left, columns_left):
    """Rows x columns at a pointer to the first; zeros past what is left."""
    mask = (rows[:, None] < rows_left) & (columns[None, :] < columns_left)
    return tl.load(ptr + (rows[:, None] * row_stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def load_chunk(
    ptr,
    row_stride,
    rows_left,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    if MASK_ROWS:
        tile = tl.load(ptr + (row * row_stride + column), mask=(row < rows_left) & (column < DIM), other=0.0)
    elif START + WIDTH > DIM:
        tile = tl.load(ptr + (row * row_stride + column), mask=column < DIM, other=0.0)
    else:
        tile = tl.load(ptr + (row * row_stride + column))
    return tile


@triton.jit
def load_rows(
    ptr,
    row_stride,
    rows_left,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """ROWS rows of a (n, DIM) matrix in chunks; zeros past DIM and, where MASK_ROWS, past ``rows_left`` rows."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles = tiles + (load_chunk(ptr, row_stride, rows_left, ROWS, DIM, STARTS[i], WIDTHS[i], MASK_ROWS),)
    return tiles


@triton.jit
def store_chunk(
    ptr,
    tile,
    row_stride,
    rows_left,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    tl.store(
        ptr + (row * row_stride + column),
        tile.to(ptr.dtype.element_ty),
        mask=(row < rows_left) & (column < DIM),
    )


@triton.jit
def store_rows(
    ptr,
    tiles,
    row_stride,
    rows_left,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    for i in tl.static_range(len(WIDTHS)):
        store_chunk(ptr, tiles[i], row_stride, rows_left, DIM, ROWS, STARTS[i], WIDTHS[i])


@triton.jit
def zero_chunk(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_rows(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles = tiles + (zero_chunk(ROWS, WIDTHS[i]),)
    return tiles


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before it is added to anything.

    What is summed over lanes must be: the compiler fuses a product with the addition that follows it, in each lane its
    own, so that lanes which are to hold one and the same sum differ by a rounding. Which of them writes to shared
    memory is undefined. (x + 0.0 would not do: of a square the compiler knows that it is not -0.0.)
    """
    return tl.fma(a, b, tl.full([], 0.0, a.dtype))


@triton.jit
def sum_of_products(a, b, axis: tl.constexpr):
    """tl.sum(a * b, axis), the same in every lane that holds it."""
    return tl.sum(rounded_product(a, b), axis)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """a b^T of two matrices in chunks of columns: one accumulator, no product with padding past a chunk."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(accumulator, p, b, PRECISION: tl.constexpr):
    """accumulator + p b, chunk by chunk."""
    tiles = ()
    for i in tl.static_range(len(b)):
        tiles = tiles + (tl.dot(p.to(b[i].dtype), b[i], accumulator[i], input_precision=PRECISION),)
    return tiles


@triton.jit
def scale_rows(tiles, factor):
    """Every row of a chunked matrix times its factor."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor[:, None],)
    return scaled
