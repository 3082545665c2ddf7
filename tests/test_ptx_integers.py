"""What the PTX machine computes with integers and predicates, against Python's integers and numpy."""

import itertools

import numpy as np
import pytest

from tests.ptx import small
from tests.ptx.values import integers, wrap

elementwise = small.elementwise
rng = np.random.default_rng(0)


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


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
