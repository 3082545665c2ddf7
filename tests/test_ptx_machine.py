"""What the PTX machine computes, instruction by instruction, against Python's integers and fractions and numpy.

The faults it has to report are in test_ptx_faults.py. Where ptxas is installed it has to take every kernel here,
so that none tests an instruction that does not exist.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import machine, program, small

elementwise = small.elementwise
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


# Integers


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "u8", "i8"])
def test_integer_arithmetic(dtype):
    dtype = np.dtype(dtype)
    kind = ("s" if dtype.kind == "i" else "u") + str(8 * dtype.itemsize)
    a = integers(dtype)
    b, c = rng.permutation(a), rng.permutation(a)
    bits = 8 * dtype.itemsize
    div = lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    cases = {
        f"add.{kind}": lambda x, y, z: x + y,
        f"sub.{kind}": lambda x, y, z: x - y,
        f"mul.lo.{kind}": lambda x, y, z: x * y,
        f"mul.hi.{kind}": lambda x, y, z: x * y >> bits,
        f"min.{kind}": lambda x, y, z: min(x, y),
        f"max.{kind}": lambda x, y, z: max(x, y),
        f"div.{kind}": lambda x, y, z: div(x, y) if y else None,
        f"rem.{kind}": lambda x, y, z: x - div(x, y) * y if y else None,
        f"mad.lo.{kind}": lambda x, y, z: x * y + z,
        f"mad.hi.{kind}": lambda x, y, z: (x * y >> bits) + z,
    }
    for opcode, function in cases.items():
        operands = "{d}, {a}, {b}, {c}" if opcode.startswith("mad") else "{d}, {a}, {b}"
        inputs = (a, b, c) if opcode.startswith("mad") else (a, b)
        got = elementwise(f"{opcode} {operands}", dtype, *inputs)
        for x, y, z, value in zip(a, b, c, got):
            expected = function(int(x), int(y), int(z))
            assert expected is None or int(value) == wrap(expected, dtype), (opcode, x, y, z, value)


def test_wide_products():
    for dtype, wide in (("u2", "u4"), ("i2", "i4"), ("u4", "u8"), ("i4", "i8")):
        kind = ("s" if dtype[0] == "i" else "u") + str(8 * int(dtype[1]))
        a = integers(dtype)
        b = rng.permutation(a)
        c = integers(wide)[: len(a)]
        expected = a.astype(wide) * b.astype(wide)
        np.testing.assert_array_equal(
            elementwise(f"mul.wide.{kind} {{d}}, {{a}}, {{b}}", wide, a, b), expected
        )
        got = elementwise(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}}", wide, a, b, c)
        np.testing.assert_array_equal(got, expected + np.resize(c, len(a)))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    dtype, signed = np.dtype(f"u{bits // 8}"), np.dtype(f"i{bits // 8}")
    a = integers(dtype)
    b = rng.permutation(a)
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        np.testing.assert_array_equal(
            elementwise(f"{name}.b{bits} {{d}}, {{a}}, {{b}}", dtype, a, b), function(a, b)
        )
    np.testing.assert_array_equal(elementwise(f"not.b{bits} {{d}}, {{a}}", dtype, a), ~a)
    by = np.resize(np.array([0, 1, 7, bits - 1, bits, bits + 1, 200, 2**32 - 1], np.uint32), len(a))
    full = 2**bits - 1
    for name, values, function in (
        (f"shl.b{bits}", a, lambda x, n: (x << min(n, bits)) & full),
        (f"shr.u{bits}", a, lambda x, n: x >> min(n, bits)),
        (f"shr.b{bits}", a, lambda x, n: x >> min(n, bits)),
        (f"shr.s{bits}", a.view(signed), lambda x, n: x >> min(n, bits)),
    ):
        got = elementwise(f"{name} {{d}}, {{a}}, {{b}}", values.dtype, values, by)
        assert [int(x) for x in got] == [function(int(x), int(n)) for x, n in zip(values, by)], name
    s = integers(signed)
    expected = [wrap(abs(int(x)), signed) for x in s]
    assert [int(x) for x in elementwise(f"abs.s{bits} {{d}}, {{a}}", signed, s)] == expected
    assert [int(x) for x in elementwise(f"neg.s{bits} {{d}}, {{a}}", signed, s)] == [
        wrap(-int(x), signed) for x in s
    ]


@pytest.mark.parametrize("bits", [32, 64])
def test_bits(bits):
    unsigned, signed = np.dtype(f"u{bits // 8}"), np.dtype(f"i{bits // 8}")
    a = integers(unsigned)
    text = [format(int(x), f"0{bits}b") for x in a]
    assert elementwise(f"popc.b{bits} {{d}}, {{a}}", "u4", a).tolist() == [t.count("1") for t in text]
    assert elementwise(f"brev.b{bits} {{d}}, {{a}}", unsigned, a).tolist() == [int(t[::-1], 2) for t in text]
    assert elementwise(f"clz.b{bits} {{d}}, {{a}}", "u4", a).tolist() == [
        bits - int(x).bit_length() for x in a
    ]
    found = [int(x).bit_length() - 1 for x in a]
    assert elementwise(f"bfind.u{bits} {{d}}, {{a}}", "i4", a).tolist() == found
    expected = [bits - 1 - i if i >= 0 else -1 for i in found]
    assert elementwise(f"bfind.shiftamt.u{bits} {{d}}, {{a}}", "i4", a).tolist() == expected
    expected = [(int(x) if x >= 0 else ~int(x)).bit_length() - 1 for x in a.view(signed)]
    assert elementwise(f"bfind.s{bits} {{d}}, {{a}}", "i4", a.view(signed)).tolist() == expected


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits, dtype = int(kind[1:]), np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    a = np.resize(integers(dtype), 400)
    position = rng.choice([0, 1, 5, bits // 2, bits - 1, bits, 200, 255], 400).astype(np.uint32)
    length = rng.choice([0, 1, 3, bits // 2, bits - 1, bits, bits + 9, 255], 400).astype(np.uint32)

    def extract(value, at, count):  # the ISA's pseudocode
        most = bits - 1
        bit = lambda i: value >> i & 1
        sign = 0 if kind[0] == "u" or count == 0 else bit(min(at + count - 1, most))
        out = sum((bit(at + i) if i < count and at + i <= most else sign) << i for i in range(bits))
        return wrap(out, dtype)

    got = elementwise(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}}", dtype, a, position, length)
    expected = [extract(int(x), int(p), int(n)) for x, p, n in zip(a, position, length)]
    assert [int(x) for x in got] == expected
    for at, count in (
        (0, 8),
        (8, 8),
        (bits - 3, 3),
        (bits - 3, 9),
        (4, 0),
    ):  # constants, as compilers write them
        got = elementwise(f"bfe.{kind} {{d}}, {{a}}, {at}, {count}", dtype, a)
        assert [int(x) for x in got] == [extract(int(x), at, count) for x in a]


@pytest.mark.parametrize("bits", [32, 64])
def test_inserted_fields(bits):
    dtype = np.dtype(f"u{bits // 8}")
    a, b = np.resize(integers(dtype), 300), rng.permutation(np.resize(integers(dtype), 300))
    for position, length in itertools.product([0, 1, 8, bits - 1, bits, 255], [0, 1, 5, bits - 1, bits, 255]):
        mask = sum(1 << i for i in range(position, min(position + length, bits)))
        got = elementwise(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {position}, {length}", dtype, a, b)
        assert got.tolist() == [(int(y) & ~mask) | (int(x) << position & mask) for x, y in zip(a, b)]


def test_funnel_shifts():
    a, b = integers("u4"), rng.permutation(integers("u4"))
    by = np.resize(np.array([0, 1, 9, 31, 32, 33, 2**32 - 1], np.uint32), len(a))
    for mode, clamp in (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n & 31)):
        both = [(int(x) | int(y) << 32, clamp(int(n))) for x, y, n in zip(a, b, by)]
        got = elementwise(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", "u4", a, b, by)
        assert got.tolist() == [(v << n) >> 32 & 0xFFFFFFFF for v, n in both]
        got = elementwise(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", "u4", a, b, by)
        assert got.tolist() == [v >> n & 0xFFFFFFFF for v, n in both]


def test_logic_of_three_inputs():
    a, b, c = (rng.permutation(integers("u4")) for _ in range(3))
    cases = {
        "a & b & c": a & b & c,
        "a | b | c": a | b | c,
        "a & b & ~c": a & b & ~c,
        "(a & b | c) ^ a": (a & b | c) ^ a,
    }
    cases |= {"~a": ~a, "a ^ b ^ c": a ^ b ^ c}
    for text, expected in cases.items():
        table = eval(text, {"a": 0xF0, "b": 0xCC, "c": 0xAA}) & 0xFF
        got = elementwise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table}", "u4", a, b, c)
        np.testing.assert_array_equal(got, expected)


def test_permuted_bytes():
    a, b = integers("u4"), rng.permutation(integers("u4"))
    selector = rng.integers(0, 2**16, len(a)).astype(np.uint32)
    got = elementwise("prmt.b32 {d}, {a}, {b}, {c}", "u4", a, b, selector)
    for x, y, s, value in zip(a, b, selector, got):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        chosen = [s >> 4 * i & 15 for i in range(4)]
        expected = [source[c & 7] if c < 8 else (255 if source[c & 7] & 128 else 0) for c in chosen]
        assert int(value).to_bytes(4, "little") == bytes(expected)


# Floats


def test_float_arithmetic():
    a, b = PAIRS.T
    wide = lambda x: x.astype(np.float64)
    with np.errstate(all="ignore"):
        for name, exact in (
            ("add", wide(a) + b),
            ("sub", wide(a) - b),
            ("mul", wide(a) * b),
            ("div", wide(a) / b),
        ):
            expected = exact.astype(np.float32)  # float64 is enough for each of the four
            same(elementwise(f"{name}.rn.f32 {{d}}, {{a}}, {{b}}", "f4", a, b), expected)
        for name, function in (("add", np.add), ("mul", np.multiply), ("div.rn", np.divide)):
            expected = flushed(function(flushed(a), flushed(b)))
            same(elementwise(f"{name}.ftz.f32 {{d}}, {{a}}, {{b}}", "f4", a, b), expected)
        same(elementwise("sub.f64 {d}, {a}, {b}", "f8", wide(a), wide(b)), wide(a) - wide(b))


def test_division_that_is_not_exact():
    a, b = PAIRS.T
    with np.errstate(all="ignore"):
        same(elementwise("div.full.f32 {d}, {a}, {b}", "f4", a, b), a / b)
        big = (np.abs(b) > 2.0**126) & np.isfinite(b)
        got = elementwise("div.approx.f32 {d}, {a}, {b}", "f4", a, b)
        same(got[~big], (a / b)[~big])
        lost = np.where(np.isfinite(a[big]), np.copysign(np.float32(0), a[big] / b[big]), np.nan)
        same(got[big], lost)


def test_fused_products_are_rounded_once():
    count = 3000
    draw = lambda low, high: np.ldexp(rng.standard_normal(count), rng.integers(low, high, count))
    for dtype, opcode, limit in ((np.float32, "f32", 60), (np.float64, "f64", 200)):
        a, b = draw(-limit, limit).astype(dtype), draw(-limit, limit).astype(dtype)
        near = -(a.astype(np.float64) * b) * (1 + rng.integers(-3, 4, count) * float(np.finfo(dtype).eps) / 2)
        with np.errstate(over="ignore"):
            c = np.where(rng.random(count) < 0.7, near, draw(-2 * limit, 2 * limit)).astype(dtype)
        keep = np.isfinite(c)
        a, b, c = a[keep], b[keep], c[keep]
        # Halfway cases, which a second rounding would get wrong.
        eps = float(np.finfo(dtype).eps)
        a = np.append(a, [1 + eps, 1 + eps, 1.0]).astype(dtype)
        b = np.append(b, [1 + eps, 1 - eps, eps / 2]).astype(dtype)
        c = np.append(c, [-(1 + 2 * eps), eps**3, 1.0]).astype(dtype)
        got = elementwise(f"fma.rn.{opcode} {{d}}, {{a}}, {{b}}, {{c}}", dtype, a, b, c)
        exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
        expected = [to_float32(x) if dtype == np.float32 else float(x) for x in exact]
        np.testing.assert_array_equal(got, np.array(expected, dtype))


def test_fused_products_of_special_values():
    a, b = PAIRS.T
    c = rng.permutation(np.resize(FLOATS, len(a)))
    with np.errstate(all="ignore"):
        for opcode, dtype in (("fma.rn.f32", "f4"), ("fma.rn.f64", "f8")):
            got = elementwise(
                f"{opcode} {{d}}, {{a}}, {{b}}, {{c}}", dtype, *(x.astype(dtype) for x in (a, b, c))
            )
            plain = a.astype(np.float64) * b + c
            special = ~np.isfinite(plain) | (plain == 0)
            same(got[special], plain[special].astype(dtype))
    tiny = np.array([1e-200, 5e-324, 1e-170, -1e-200])
    got = elementwise("fma.rn.f64 {d}, {a}, {b}, {c}", "f8", tiny, tiny, tiny)
    assert got.tolist() == [float(Fraction(x) * Fraction(x) + Fraction(x)) for x in tiny]


def test_minimum_and_maximum():
    a, b = PAIRS.T
    neither = ~np.isnan(a) & ~np.isnan(b)
    key = lambda x: (float(x), not np.signbit(x))  # +0 is greater than -0
    for name, pick in (("min", min), ("max", max)):
        for dtype, kind in (("f4", "f32"), ("f8", "f64")):
            got = elementwise(f"{name}.{kind} {{d}}, {{a}}, {{b}}", dtype, a.astype(dtype), b.astype(dtype))
            same(got[neither], [pick(x, y, key=key) for x, y in zip(a[neither], b[neither])])
            same(got[np.isnan(a)], b[np.isnan(a)])
            same(got[np.isnan(b)], a[np.isnan(b)])
        got = elementwise(f"{name}.NaN.f32 {{d}}, {{a}}, {{b}}", "f4", a, b)
        assert (np.isnan(got) == ~neither).all()
        assert (got.view(np.uint32)[~neither] == 0x7FFFFFFF).all()
        flush = elementwise(f"{name}.ftz.f32 {{d}}, {{a}}, {{b}}", "f4", a, b)
        same(flush[neither], [pick(x, y, key=key) for x, y in zip(flushed(a[neither]), flushed(b[neither]))])


def test_signs():
    same(elementwise("abs.f32 {d}, {a}", "f4", FLOATS), np.abs(FLOATS))
    same(elementwise("neg.f32 {d}, {a}", "f4", FLOATS), -FLOATS)
    same(elementwise("neg.ftz.f32 {d}, {a}", "f4", FLOATS), -flushed(FLOATS))
    a, b = PAIRS.T
    same(elementwise("copysign.f32 {d}, {a}, {b}", "f4", a, b), np.copysign(b, a))
    bits = integers("u4")
    np.testing.assert_array_equal(elementwise("abs.bf16x2 {d}, {a}", "u4", bits), bits & 0x7FFF7FFF)
    np.testing.assert_array_equal(elementwise("neg.f16x2 {d}, {a}", "u4", bits), bits ^ 0x80008000)
    half = integers("u2")
    np.testing.assert_array_equal(elementwise("abs.bf16 {d}, {a}", "u2", half), half & 0x7FFF)
    np.testing.assert_array_equal(elementwise("neg.bf16 {d}, {a}", "u2", half), half ^ 0x8000)


def test_transcendental_functions():
    """Within 2 ulp of float64's; on a GPU they are as close, not the same."""
    x = np.concatenate([FLOATS, np.linspace(-130, 130, 501, dtype=np.float32)])
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        cases = {
            "ex2.approx": np.exp2(wide),
            "lg2.approx": np.log2(wide),
            "rcp.approx": 1 / wide,
            "rcp.rn": 1 / wide,
        }
        cases |= {"sqrt.approx": np.sqrt(wide), "sqrt.rn": np.sqrt(wide), "rsqrt.approx": 1 / np.sqrt(wide)}
        for name, expected in cases.items():
            expected = expected.astype(np.float32)
            got = elementwise(f"{name}.f32 {{d}}, {{a}}", "f4", x)
            close = np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32)) <= 2
            assert (close | (np.isnan(got) & np.isnan(expected))).all(), name
            got = elementwise(f"{name}.ftz.f32 {{d}}, {{a}}", "f4", x)
            assert not ((got != 0) & (np.abs(got) < TINY)).any(), name
            assert (elementwise(f"{name}.ftz.f32 {{d}}, {{a}}", "f4", np.float32([1e-40]))[0]) == {
                "ex2.approx": 1, "lg2.approx": -np.inf, "sqrt.approx": 0, "sqrt.rn": 0,
            }.get(name, np.inf)  # fmt: skip


def test_reciprocal_of_the_upper_half_of_a_double():
    x = np.concatenate(
        [rng.standard_normal(100) * 10.0 ** rng.integers(-300, 300, 100), [0.0, -0.0, 1e-310, np.inf]]
    )
    got = elementwise("rcp.approx.ftz.f64 {d}, {a}", "f8", x)
    assert (got.view(np.uint64) & 0xFFFFFFFF == 0).all()
    with np.errstate(all="ignore"):
        assert (np.abs(got[:100] * x[:100] - 1) < 2.0**-18).all()
    assert got[100:].tolist() == [np.inf, -np.inf, np.inf, 0]


# Comparisons and selections


def test_comparisons_of_floats():
    a, b = PAIRS.T
    nan = np.isnan(a) | np.isnan(b)
    functions = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    for name, plain in functions.items():
        np.testing.assert_array_equal(
            elementwise(f"setp.{name}.f32 {{d}}, {{a}}, {{b}}", bool, a, b), plain & ~nan
        )
        np.testing.assert_array_equal(
            elementwise(f"setp.{name}u.f32 {{d}}, {{a}}, {{b}}", bool, a, b), plain | nan
        )
    np.testing.assert_array_equal(
        elementwise("setp.num.f64 {d}, {a}, {b}", bool, a.astype("f8"), b.astype("f8")), ~nan
    )
    np.testing.assert_array_equal(elementwise("setp.nan.f32 {d}, {a}, {b}", bool, a, b), nan)
    got = elementwise("setp.eq.ftz.f32 {d}, {a}, {b}", bool, a, b)
    np.testing.assert_array_equal(got, flushed(a) == flushed(b))
    with np.errstate(over="ignore"):
        half = PAIRS.astype(np.float16)
    got = elementwise("setp.lt.f16 {d}, {a}, {b}", bool, *half.T)
    np.testing.assert_array_equal(got, half[:, 0] < half[:, 1])
    bits = (PAIRS.view(np.uint32) >> 16).astype(np.uint16)  # cut off, so that values stay distinct and signed
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    for name, function in (("ne", np.not_equal), ("gt", np.greater), ("equ", np.equal)):
        got = elementwise(f"setp.{name}.bf16 {{d}}, {{a}}, {{b}}", bool, *bits.T)
        unordered = np.isnan(values).any(1)
        expected = function(*values.T) & ~unordered | (unordered if name == "equ" else False)
        np.testing.assert_array_equal(got, expected)


def test_comparisons_of_integers():
    for dtype, kind in (
        ("u4", "u32"),
        ("i4", "s32"),
        ("u8", "u64"),
        ("i8", "s64"),
        ("u2", "u16"),
        ("i2", "s16"),
    ):
        a = integers(dtype)
        b = np.where(rng.random(len(a)) < 0.3, a, rng.permutation(a))
        functions = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
        functions |= {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b} if kind[0] == "u" else {}
        for name, expected in functions.items():
            got = elementwise(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}}", bool, a, b)
            np.testing.assert_array_equal(got, expected)


def test_combined_predicates():
    """p = (a < b) op c and q = !(a < b) op c."""
    a, b = rng.integers(0, 4, 256).astype(np.int32), rng.integers(0, 4, 256).astype(np.int32)
    c = rng.random(256) < 0.5
    for name, join in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for negated in (False, True):
            other = f"{'!' if negated else ''}{{c}}"
            p = elementwise(f"setp.lt.{name}.s32 {{d}}|%p2, {{a}}, {{b}}, {other}", bool, a, b, c)
            q = elementwise(f"setp.lt.{name}.s32 %p2|{{d}}, {{a}}, {{b}}, {other}", bool, a, b, c)
            np.testing.assert_array_equal(p, join(a < b, c ^ negated))
            np.testing.assert_array_equal(q, join(~(a < b), c ^ negated))
    np.testing.assert_array_equal(
        elementwise("selp.s32 {d}, {a}, {b}, {c}", "i4", a, b, c), np.where(c, a, b)
    )
    np.testing.assert_array_equal(elementwise("xor.pred {d}, {a}, {b}", bool, c, c[::-1].copy()), c ^ c[::-1])
    np.testing.assert_array_equal(elementwise("not.pred {d}, {a}", bool, c), ~c)


# Conversions


@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_to_integers(to):
    bits, low = int(to[1:]), -(2 ** (int(to[1:]) - 1)) if to[0] == "s" else 0
    high = low + 2**bits - 1
    wide = max(bits, 16)  # there is no register of 8 bits here: results are widened
    dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{wide // 8}")
    x = np.concatenate(
        [FLOATS, np.arange(-4, 4, 0.25), np.float32([low, high, low - 1.5, high + 1.0, 300.5])]
    )
    rounds = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for source, values in (("f32", x.astype("f4")), ("f64", x.astype("f8"))):
        for how, function in rounds.items():
            got = elementwise(f"cvt.{how}.{to}.{source} {{d}}, {{a}}", dtype, values)
            for value, result in zip(values, got):
                if np.isnan(value):
                    expected = (
                        0 if source == "f32" and bits < 64 else (low if to[0] == "s" else 2 ** (bits - 1))
                    )
                elif np.isinf(value):
                    expected = high if value > 0 else low
                else:
                    expected = min(max(function(float(value)), low), high)
                assert int(result) == expected, (how, to, source, value)


def test_integers_to_floats():
    for dtype, kind in (
        ("i4", "s32"),
        ("u4", "u32"),
        ("i8", "s64"),
        ("u8", "u64"),
        ("i2", "s16"),
        ("i1", "s8"),
    ):
        a = integers(dtype)
        exact = [Fraction(int(x)) for x in a]
        got = elementwise(f"cvt.rn.f32.{kind} {{d}}, {{a}}", "f4", a)
        assert got.tolist() == [to_float32(x) for x in exact]
        assert elementwise(f"cvt.rn.f64.{kind} {{d}}, {{a}}", "f8", a).tolist() == [float(x) for x in exact]
        got = elementwise(f"cvt.rn.f16.{kind} {{d}}, {{a}}", "f2", a)
        assert got.tolist() == [rounded(x, 11, -24, 65504.0) for x in exact]
    # 2^25 + 2^17 + 1: float32 would lose the one, and the half-way case that is left would go down.
    one = np.array([2**25 + 2**17 + 1], np.int32)
    assert elementwise("cvt.rn.bf16.s32 {d}, {a}", "u2", one).tolist() == (bfloat16(one)).tolist()
    assert bfloat16(one) == np.float32(2**25 + 2**18).view(np.uint32) >> 16


def test_integers_to_integers():
    byte, word, long = integers("u1"), integers("u4"), integers("u8")
    np.testing.assert_array_equal(
        elementwise("cvt.s32.s8 {d}, {a}", "i4", byte), byte.view("i1").astype("i4")
    )
    np.testing.assert_array_equal(
        elementwise("cvt.s64.s8 {d}, {a}", "i8", word), word.astype("i1").astype("i8")
    )
    np.testing.assert_array_equal(elementwise("cvt.u32.u8 {d}, {a}", "u4", word), word & 255)
    np.testing.assert_array_equal(
        elementwise("cvt.s64.s32 {d}, {a}", "i8", word), word.view("i4").astype("i8")
    )
    np.testing.assert_array_equal(elementwise("cvt.u64.u32 {d}, {a}", "u8", word), word.astype("u8"))
    np.testing.assert_array_equal(elementwise("cvt.u32.u64 {d}, {a}", "u4", long), long.astype("u4"))
    np.testing.assert_array_equal(
        elementwise("cvt.s16.s8 {d}, {a}", "i2", byte), byte.view("i1").astype("i2")
    )


def test_floats_to_floats():
    x = np.concatenate([FLOATS, (rng.standard_normal(500) * 10.0 ** rng.integers(-45, 38, 500)).astype("f4")])
    # Halfway between two of 16 bits, and next to it.
    base = (rng.integers(0x3000, 0x4700, 100).astype(np.uint32) << 16) | 0x8000
    x = np.concatenate([x, *((base.astype(np.int64) + d).astype(np.uint32).view("f4") for d in (-1, 0, 1))])
    half = (rng.integers(0x0, 0x7B00, 100).astype(np.uint16).view("f2")).astype("f8")
    ulp = np.spacing(half.astype("f2")).astype("f8")
    x = np.concatenate([x, (half + ulp / 2).astype("f4"), (half + ulp / 2 * 1.0001).astype("f4")])
    with np.errstate(over="ignore"):
        exact16 = [rounded(Fraction(float(v)), 11, -24, 65504.0) if np.isfinite(v) else v for v in x]
        expected = np.copysign(np.array(exact16), x).astype("f2")
    same(elementwise("cvt.rn.f16.f32 {d}, {a}", "f2", x), expected)
    finite = x[np.isfinite(x)]
    negative_zero = np.signbit(finite).astype(np.uint32) << 15
    assert (elementwise("cvt.rn.bf16.f32 {d}, {a}", "u2", finite) == (bfloat16(finite) | negative_zero)).all()
    assert elementwise("cvt.rn.bf16.f32 {d}, {a}", "u2", np.float32([np.nan, np.inf])).tolist() == [
        0x7FFF,
        0x7F80,
    ]
    # Packed: the first source goes to the upper half.
    y = rng.permutation(finite)
    got = elementwise("cvt.rn.bf16x2.f32 {d}, {a}, {b}", "u4", finite, y)
    assert (got >> 16 == elementwise("cvt.rn.bf16.f32 {d}, {a}", "u2", finite)).all()
    assert (got & 0xFFFF == elementwise("cvt.rn.bf16.f32 {d}, {a}", "u2", y)).all()
    got = elementwise("cvt.rn.f16x2.f32 {d}, {a}, {b}", "u4", finite, y)
    assert (got >> 16 == elementwise("cvt.rn.f16.f32 {d}, {a}", "u2", finite)).all()
    # From float64 at once: 1 + 2^-8 + 2^-40 is above the middle of two bfloat16, though float32 forgets it.
    d = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 2.0**-11 + 2.0**-40, 3e38, 1e39])
    assert elementwise("cvt.rn.bf16.f64 {d}, {a}", "u2", d).tolist() == [
        0x3F81,
        0x3F80,
        0x3F80,
        0x7F62,
        0x7F80,
    ]
    assert elementwise("cvt.rn.f16.f64 {d}, {a}", "f2", d[2:3]).tolist() == [1 + 2.0**-10]
    wide = rng.standard_normal(300) * 10.0 ** rng.integers(-46, 39, 300)
    assert elementwise("cvt.rn.f32.f64 {d}, {a}", "f4", wide).tolist() == [
        to_float32(Fraction(v)) for v in wide
    ]
    ftz = elementwise("cvt.rn.ftz.f32.f64 {d}, {a}", "f4", np.array([1e-40, -1e-40, 1e-38, 1.5]))
    same(ftz, np.float32([0, -0.0, 0, 1.5]))
    # Wider is exact.
    h = np.arange(0, 0x7C00, 7).astype(np.uint16).view("f2")
    same(elementwise("cvt.f32.f16 {d}, {a}", "f4", h), h.astype("f4"))
    bits = np.arange(0, 0x7F80, 13).astype(np.uint16)
    same(elementwise("cvt.f32.bf16 {d}, {a}", "f4", bits), (bits.astype(np.uint32) << 16).view("f4"))
    same(elementwise("cvt.f64.f32 {d}, {a}", "f8", FLOATS), FLOATS.astype("f8"))
    # To integers of the same type.
    z = np.float32([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, 1e-40])
    same(elementwise("cvt.rni.f32.f32 {d}, {a}", "f4", z), [0, 2, -0.0, -2, 3, -3, 0])
    same(elementwise("cvt.rpi.f32.f32 {d}, {a}", "f4", z), [1, 2, -0.0, -1, 3, -2, 1])
    same(elementwise("cvt.rpi.ftz.f32.f32 {d}, {a}", "f4", z)[-1:], [0])


def test_tf32_rounds_half_away_from_zero():
    bits = (rng.integers(0, 0x7F000000, 500).astype(np.uint32) & ~np.uint32(0x1FFF)) | rng.choice(
        np.array([0, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32), 500
    )
    x = bits.view("f4") * rng.choice(np.float32([1, -1]), 500)
    got = elementwise("cvt.rna.tf32.f32 {d}, {a}", "u4", x)
    unit = lambda v: Fraction(2) ** (max(math.frexp(v)[1] - 1, -126) - 10)
    for value, result in zip(x, got.view("f4")):
        u = unit(float(abs(value)))
        expected = math.floor(Fraction(float(abs(value))) / u + Fraction(1, 2)) * u
        assert Fraction(float(abs(result))) == expected and np.signbit(result) == np.signbit(value)


# Registers, parameters, memory


def test_moves_and_vectors():
    low, high = integers("u4"), rng.permutation(integers("u4"))
    packed = elementwise("mov.b64 {d}, {{{a}, {b}}}", "u8", low, high)
    np.testing.assert_array_equal(packed, low.astype("u8") | high.astype("u8") << np.uint64(32))
    np.testing.assert_array_equal(elementwise("mov.b64 {{_, {d}}}, {a}", "u4", packed), high)
    np.testing.assert_array_equal(
        elementwise("mov.b32 {{%h5, {d}}}, {a}", "u2", low), (low >> 16).astype("u2")
    )
    assert (elementwise("mov.f32 {d}, 0f3FC00000", "f4", low) == 1.5).all()
    assert (elementwise("mov.f64 {d}, 0dBFF8000000000000", "f8", low) == -1.5).all()
    assert (elementwise("mov.b32 {d}, -2", "i4", low) == -2).all()


def test_loads_widen_by_their_type():
    source = integers("u1")[:32].copy()
    out = np.zeros((32, 4), np.int64)
    body = "cvt.u64.u32 %d1, %t;\nadd.s64 %d1, %d1, %a0;\n"
    for i, kind in enumerate(("s8", "u8", "b8")):
        body += f"ld.global.{kind} %d{2 + i}, [%d1];\n"
    body += "ld.global.s8 %r1, [%d1];\ncvt.s64.s32 %d5, %r1;\n" + small.at("%d6", 1, 32)
    body += "st.global.v2.b64 [%d6], {%d2, %d3};\nst.global.v2.b64 [%d6+16], {%d4, %d5};"
    small.run(body, source, out)
    signed, unsigned = source.view("i1").astype("i8"), source.astype("i8")
    np.testing.assert_array_equal(out, np.stack([signed, unsigned, unsigned, signed], 1))


def test_addresses_and_narrow_stores():
    out = np.zeros(64, np.uint16)
    small.run(
        small.at("%d1", 0, 4) + "add.s64 %d1, %d1, 4;\nmov.u32 %r1, 0x12345678;\n"
        "st.global.b16 [%d1+-4], %r1;\nst.global.b8 [%d1+-2], %r1;",
        out,
    )
    assert out.reshape(32, 2).tolist() == [[0x5678, 0x78]] * 32


def test_parameters_are_aligned():
    text = small.HEAD + (
        ".visible .entry k(.param .u64 a, .param .u8 b, .param .f64 c, .param .align 16 .b8 d[24], .param .u16 e)"
        "{\n"
        ".reg .b64 %d<9>; .reg .b32 %r<3>; ld.param.u64 %d1, [a]; ld.param.u8 %r1, [b]; ld.param.f64 %d2, [c];\n"
        "ld.param.u64 %d3, [d+16]; ld.param.u16 %r2, [e]; st.global.u32 [%d1], %r1; st.global.u64 [%d1+8], %d2;\n"
        "st.global.u64 [%d1+16], %d3; st.global.u32 [%d1+24], %r2; ret; }"
    )
    parsed = program.parse(text)
    assert [p.offset for p in parsed.parameters.values()] == [0, 8, 16, 32, 56]
    out, blob = np.zeros(4, np.uint64), bytearray(range(58))
    blob[:8] = np.array([out.ctypes.data], np.uint64).tobytes()
    machine.launch(parsed, (1,), 32, bytes(blob), [machine.Region(out.ctypes.data, out.nbytes)])
    little = lambda low, count: int.from_bytes(bytes(range(low, low + count)), "little")
    assert out.tolist() == [little(8, 1), little(16, 8), little(48, 8), little(56, 2)]


def test_special_registers():
    out = np.zeros((12 * 64, 8), np.uint32)
    names = ["%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%nctaid.y", "%nctaid.z"]
    body = "".join(f"mov.u32 %r{i}, {name};\n" for i, name in enumerate(names))
    body += "mad.lo.s32 %r10, %r4, %r6, %r3;\nmov.u32 %r11, %nctaid.x;\nmad.lo.s32 %r10, %r10, %r11, %r2;\n"
    body += "mad.lo.s32 %r10, %r10, 64, %r0;\n" + small.at("%d1", 0, 32, "%r10")
    body += "st.global.v4.u32 [%d1], {%r0, %r1, %r2, %r3};\nst.global.v4.u32 [%d1+16], {%r4, %r5, %r6, %r7};"
    small.run(body, out, threads=64, grid=(2, 3, 2))
    thread = np.arange(64)
    for z, y, x in itertools.product(range(2), range(3), range(2)):
        rows = out.reshape(2, 3, 2, 64, 8)[z, y, x]
        expected = [thread, 64, x, y, z, thread % 32, 3, 2]
        np.testing.assert_array_equal(rows, np.stack([np.broadcast_to(e, 64) for e in expected], 1))


def test_atomic_operations():
    counts, floats = np.zeros(4, np.int64), np.zeros(1, np.float32)
    extremes = np.array([1000, -1000, 0], np.int32)
    old = np.zeros(96, np.uint64)
    body = "and.b32 %r1, %g, 3;\n" + small.at("%d1", 0, 8, "%r1") + "cvt.u64.u32 %d2, %g;\n"
    body += (
        "atom.global.gpu.relaxed.add.u64 %d3, [%d1], %d2;\n"
        + small.at("%d4", 3, 8)
        + "st.global.u64 [%d4], %d3;\n"
    )
    body += "red.global.add.f32 [%a1], 0f3F000000;\nsub.s32 %r2, %g, 48;\n"
    body += "red.global.min.s32 [%a2], %r2;\nred.global.max.s32 [%a2+4], %r2;\n"
    body += "atom.global.cas.b32 %r3, [%a2+8], 0, 7;"
    small.run(body, counts, floats, extremes, old, grid=(3,))
    assert counts.tolist() == [sum(range(i, 96, 4)) for i in range(4)]
    assert floats[0] == 48 and extremes.tolist() == [-48, 47, 7]
    for i in range(4):  # in some order, every sum before an addition
        seen = sorted(old[i::4].tolist())
        assert seen == list(itertools.accumulate(range(i, 96, 4), initial=0))[:-1]


def test_registers_in_braces_are_others():
    out = np.zeros(32, np.uint32)
    body = "mov.u32 %r1, 5;\n{\n.reg .b32 %r<3>;\n.reg .b32 x;\nmov.u32 %r1, 9;\nmov.u32 x, 1;\n}\n"
    body += small.at("%d1", 0, 4) + "st.global.u32 [%d1], %r1;"
    small.run(body, out)
    assert (out == 5).all()


def test_shared_memory_behind_static():
    text = small.HEAD.replace(".align 1024", ".align 16") + ".shared .align 4 .b8 fixed[20];\n"
    text += small.entry(
        "k", "mov.u32 %r1, fixed;\nmov.u32 %r2, dynamic;\nst.global.v2.u32 [%a0], {%r1, %r2};", 1
    )
    out = np.zeros(2, np.uint32)
    small.execute(program.parse(text), [out], shared=16)
    assert out.tolist() == [0, 32]


# Control


def test_divergence_in_a_loop():
    """Thread i adds 1 to i and skips multiples of three; odd ones leave early."""
    out = np.zeros(64, np.uint32)
    small.run(
        "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nand.b32 %r5, %t, 1;\nsetp.eq.u32 %p5, %r5, 1;\nLOOP:\n"
        "add.u32 %r1, %r1, 1;\n"
        "setp.gt.u32 %p1, %r1, %t;\n@%p1 bra DONE;\nrem.u32 %r3, %r1, 3;\nsetp.eq.u32 %p2, %r3, 0;\n"
        "@%p2 bra LOOP;\n"
        "add.u32 %r2, %r2, %r1;\nsetp.gt.and.u32 %p3, %r2, 20, %p5;\n@!%p3 bra.uni LOOP;\nDONE:\n"
        + small.at("%d1", 0, 4)
        + "@%p5 st.global.u32 [%d1], %r2;\n@!%p5 st.global.u32 [%d1], %r2;",
        out,
        threads=64,
    )

    def one(i):
        total = 0
        for k in range(1, i + 1):
            if k % 3:
                total += k
                if total > 20 and i % 2:
                    break
        return total

    assert out.tolist() == [one(i) for i in range(64)]


def test_barriers_count_threads_that_have_ended():
    out = np.zeros(64, np.uint32)
    small.run(
        "setp.ge.u32 %p1, %t, 40;\n@%p1 ret;\nmov.u32 %r1, dynamic;\nmad.lo.s32 %r1, %t, 4, %r1;\n"
        "st.shared.u32 [%r1], %t;\n"
        "bar.sync 0;\nxor.b32 %r2, %t, 1;\nmov.u32 %r3, dynamic;\nmad.lo.s32 %r2, %r2, 4, %r3;\n"
        "ld.shared.u32 %r4, [%r2];\n" + small.at("%d1", 0, 4) + "st.global.u32 [%d1], %r4;",
        out,
        threads=64,
        shared=256,
    )
    assert out.tolist() == [i ^ 1 if i < 40 else 0 for i in range(64)]


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
