"""What the PTX machine computes with floats, conversions included, against Python's fractions and numpy."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import small
from tests.ptx.values import FLOATS, PAIRS, TINY, bfloat16, flushed, integers, rounded, same, to_float32

elementwise = small.elementwise
rng = np.random.default_rng(0)


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


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
