"""Floating-point results rounded once, as the hardware rounds them, for vectors of numpy.

Rounding to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008): a sum that is inexact
gets an odd last bit, so that rounding it again to at least two bits less gives the exact value's rounding.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_CANONICAL = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF), 8: np.uint64(0x7FFFFFFFFFFFFFFF)}
_SPLIT = float(2**27 + 1)


def flush(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 values as zeros of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def canonical(value: np.ndarray) -> np.ndarray:
    """NaNs as the one that instructions return."""
    value = np.asarray(value)
    bits = value.view(f"u{value.dtype.itemsize}")
    return np.where(np.isnan(value), _CANONICAL[value.dtype.itemsize], bits).view(value.dtype)


def bfloat16_to_float(bits) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat16(value) -> np.ndarray:
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def float_to_float16(value) -> np.ndarray:
    return canonical(np.asarray(value).astype(np.float16))


def _odd(value, error):
    """``value``, the nearest to the exact value + error, rounded to odd instead."""
    even = (value.view(f"u{value.dtype.itemsize}") & 1) == 0
    inexact = (error != 0) & np.isfinite(value) & np.isfinite(error)
    away = np.copysign(value.dtype.type(np.inf), error.astype(value.dtype))
    return np.where(inexact & even, np.nextafter(value, away), value)


def _sum(a, b):
    """The rounded sum and what it lacks (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product(a, b):
    """The rounded product and what it lacks (Dekker)."""
    product = a * b
    high_a, high_b = a * _SPLIT, b * _SPLIT
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    return product, low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)


def double_to_bfloat16(value) -> np.ndarray:
    value = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        near = value.astype(np.float32)
    largest = np.copysign(np.finfo(np.float32).max, value).astype(np.float32)
    near = np.where(np.isinf(near) & np.isfinite(value), largest, near)
    return float_to_bfloat16(_odd(near, value - near.astype(np.float64)))


def fused_float(a, b, c) -> np.ndarray:
    """a * b + c of float32, rounded once."""
    # The product of two float32 is exact in float64.
    return _odd(*_sum(np.asarray(a, np.float64) * b, np.asarray(c, np.float64))).astype(np.float32)


def fused_double(a, b, c) -> np.ndarray:
    """a * b + c of float64, rounded once."""
    a, b, c = (np.array(x) for x in np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c))))
    high, low = _product(a, b)
    middle, rest = _sum(c, low)
    top, left = _sum(high, middle)
    result = top + _odd(*_sum(rest, left))
    # Nothing above may have overflowed or lost bits below the smallest normal number.
    size = lambda x: (np.abs(x) > 2.0**-900) & (np.abs(x) < 2.0**900)
    safe = size(a) & size(b) & size(c) & size(high) & ((np.abs(result) > 2.0**-900) | (result == 0))
    for i in zip(*np.nonzero(np.atleast_1d(~safe))):
        i = i if a.ndim else ()
        result = np.array(result)
        result[i] = _exact(float(a[i]), float(b[i]), float(c[i]))
    return result


def _exact(a: float, b: float, c: float) -> float:
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)) or a == 0 or b == 0:
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    value = Fraction(a) * Fraction(b) + Fraction(c)
    if value == 0:
        return 0.0
    try:
        rounded = float(value)
    except OverflowError:
        rounded = np.inf
    return float(np.copysign(rounded, 1 if value > 0 else -1))
