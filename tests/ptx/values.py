"""Values that the tests of the PTX machine's arithmetic try, and what is right for them, by Python's fractions."""

import itertools
import math
from fractions import Fraction

import numpy as np

rng = np.random.default_rng(0)

FLOATS = np.array(
    [
        0.0,
        -0.0,
        1,
        -1,
        1.5,
        -2.5,
        0.5,
        3.3,
        -7.7,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        -1e-40,
        2**-126,
        -(2.0**-126),
    ]
    + [3.4028235e38, -3.4028235e38, 1e-30, 1e30, 65504, 65520, 2147483648, -2147483648, 4294967296, 1e19],
    np.float32,
)
PAIRS = np.array(list(itertools.product(FLOATS, FLOATS)), np.float32)
TINY = 2.0**-126


def integers(dtype, count=200):
    info = np.iinfo(dtype)
    edge = [
        0,
        1,
        2,
        3,
        7,
        31,
        100,
        info.max,
        info.max - 1,
        info.min,
        info.min + 1,
        info.max // 2,
        info.max // 3,
    ]
    drawn = [int(x) for x in rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)]
    return np.array([x for x in edge + drawn if info.min <= x <= info.max], dtype)


def wrap(value, dtype):
    info = np.iinfo(dtype)
    return (value - int(info.min)) % 2**info.bits + int(info.min)


def flushed(x):
    return np.where(np.abs(x) < np.float32(TINY), np.copysign(np.float32(0), x), x)


def same(got, expected):
    """Equal, with the signs of zeros; any NaN for a NaN."""
    expected = np.asarray(expected, got.dtype)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    np.testing.assert_array_equal(np.signbit(got[~nan]), np.signbit(expected[~nan]))


def rounded(value: Fraction, precision: int, least: int, most: float) -> float:
    """To the nearest float of ``precision`` bits whose smallest exponent is ``least``, ties to even."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value.numerator)) - math.log2(value.denominator))
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    out = (
        float(round(value / unit) * unit)
        if abs(value) < 2 * Fraction(most)
        else math.copysign(math.inf, value)
    )
    return out if abs(out) <= most else math.copysign(math.inf, value)


def to_float32(value):
    return rounded(value, 24, -149, float(np.finfo(np.float32).max))


def bfloat16(values):
    """Bits of the nearest, and values of bits."""
    most = float.fromhex("0x1.fep127")
    exact = [rounded(Fraction(float(v)), 8, -133, most) if np.isfinite(v) else v for v in values]
    return np.array(exact, np.float32).view(np.uint32) >> 16
