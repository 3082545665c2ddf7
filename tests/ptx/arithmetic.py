"""Arithmetic, bits and comparisons on a thread's own registers."""

from __future__ import annotations

import numpy as np

from tests.ptx import rounding
from tests.ptx.operands import DTYPES, bits_of, elementwise, kind_of, maker, reader, writer
from tests.ptx.program import Pair


def _simple(names, function):
    @maker(*names)
    def make(instruction, machine):
        return elementwise(instruction, machine, kind_of(instruction), function)


_simple(["add"], np.add)
_simple(["sub"], np.subtract)
_simple(["and"], np.bitwise_and)
_simple(["or"], np.bitwise_or)
_simple(["xor"], np.bitwise_xor)
_simple(["not"], np.bitwise_not)
_simple(["copysign"], lambda sign, size: np.copysign(size, sign))


@maker("abs", "neg")
def _sign(instruction, machine):
    kind, negate = kind_of(instruction), instruction.name == "neg"
    if kind not in ("bf16", "f16x2", "bf16x2"):
        return elementwise(instruction, machine, kind, np.negative if negate else np.abs)
    signs = DTYPES[kind].type(0x80008000 if kind.endswith("x2") else 0x8000)
    return elementwise(instruction, machine, kind, lambda a: a ^ signs if negate else a & ~signs)


@maker("max", "min")
def _extreme(instruction, machine):
    kind, greater = kind_of(instruction), instruction.name == "max"
    if DTYPES[kind].kind != "f":
        return elementwise(instruction, machine, kind, np.maximum if greater else np.minimum)
    through = "NaN" in instruction.words
    pick = (np.maximum if through else np.fmax) if greater else (np.minimum if through else np.fmin)

    def function(a, b):  # +0 is greater than -0
        zero = a + b if greater else -(-a - b)
        return rounding.canonical(np.where((a == 0) & (b == 0), zero, pick(a, b)))

    return elementwise(instruction, machine, kind, function)


def _high(a, b):
    """The upper half of a product, by Python's integers where 64 bits are not enough."""
    size = np.asarray(a).dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{np.asarray(a).dtype.kind}{2 * size}")
        return (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> wide.type(8 * size)).astype(
            np.asarray(a).dtype
        )
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return (product >> 64).astype(np.asarray(a).dtype)


def _widened(kind):
    return kind[0] + str(2 * int(kind[1:]))


@maker("mul", "mad")
def _multiply(instruction, machine):
    kind, words = kind_of(instruction), instruction.words
    plus = instruction.name == "mad"
    if DTYPES[kind].kind == "f":
        if plus:
            return _fused(instruction, machine)
        return elementwise(instruction, machine, kind, np.multiply)
    if "wide" in words:
        wide = DTYPES[_widened(kind)]
        inputs = [kind, kind, _widened(kind)]
        product = lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        function = (lambda a, b, c: product(a, b) + c) if plus else product
        return elementwise(instruction, machine, _widened(kind), function, inputs)
    product = _high if "hi" in words else np.multiply
    return elementwise(instruction, machine, kind, (lambda a, b, c: product(a, b) + c) if plus else product)


@maker("fma")
def _fused(instruction, machine):
    kind = kind_of(instruction)
    function = {"f32": rounding.fused_float, "f64": rounding.fused_double}[kind]
    return elementwise(instruction, machine, kind, function)


def _truncated(a, b):
    """Quotient towards zero; all ones for a division by zero, which PTX leaves open."""
    safe = np.where(b == 0, np.asarray(b).dtype.type(1), b)
    if np.asarray(a).dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(safe), a // safe)
    quotient = a // safe
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(quotient.dtype)
    return np.where(b == 0, np.asarray(b).dtype.type(-1), quotient)


# Of the approximations, in units of the last place: the error that PTX's specification allows (of ex2 a relative one of
# 2^-22, which is two to four units; of lg2 between 1/2 and 2 an absolute one of that size).
_ULPS = {"div": 2, "ex2": 2, "lg2": 2, "rcp": 1, "rsqrt": 1, "sqrt": 1}


def _approximation(name, exact):
    """``exact`` in float64, off by up to what is allowed: always the same by the same result."""

    def function(*values):
        true = np.asarray(exact(*(np.asarray(value, np.float64) for value in values)))
        near = true.astype(np.float32)
        hashed = bits_of(near) * np.uint32(2654435761) >> np.uint32(16)
        unit = np.spacing(np.abs(near)).astype(np.float64)
        if name == "lg2":
            unit = np.where(np.abs(true) < 1, 2.0**-23, unit)
        error = (hashed / 32767.5 - 1) * (_ULPS[name] - 0.5) * unit  # and half a unit by rounding
        off = (true + error).astype(np.float32)
        return np.where((near == 0) | (near == 1) | ~np.isfinite(near), near, off)

    return function


def _approximable(instruction, machine, exact):
    if machine.approximate and {"approx", "full"} & set(instruction.words) and kind_of(instruction) == "f32":
        exact = _approximation(instruction.name, exact)
    return elementwise(instruction, machine, kind_of(instruction), exact)


def _approximate_division(a, b):
    """div.approx: a * (1 / b), where the reciprocal of what is beyond 2^126 is zero."""
    beyond = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(beyond, a * np.copysign(np.float32(0), b), a / b)


@maker("div", "rem")
def _divide(instruction, machine):
    kind = kind_of(instruction)
    if DTYPES[kind].kind == "f":
        approximate = "approx" in instruction.words
        return _approximable(instruction, machine, _approximate_division if approximate else np.divide)
    if instruction.name == "div":
        function = _truncated
    else:
        function = lambda a, b: a - _truncated(a, b) * b
    return elementwise(instruction, machine, kind, function)


@maker("rcp")
def _reciprocal(instruction, machine):
    if instruction.words != ("approx", "ftz", "f64"):
        return _approximable(instruction, machine, lambda x: x.dtype.type(1) / x)
    read = reader(instruction.operands[1], "b64", machine)
    write = writer(instruction.operands[0], "f64", machine)
    upper = np.uint64(0xFFFFFFFF00000000)

    def function(bits):  # of the upper 32 bits, to the upper 32 bits
        value = np.asarray(bits & upper).view(np.float64)
        small = lambda x: np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)
        result = np.asarray(small(1.0 / small(value)))
        return np.where(np.isnan(result), result, (result.view(np.uint64) & upper).view(np.float64))

    return lambda lanes: write(lanes, function(read(lanes)))


@maker("ex2", "lg2", "sqrt", "rsqrt")
def _root_or_exponential(instruction, machine):
    exact = {
        "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    }[instruction.name]  # fmt: skip
    return _approximable(instruction, machine, exact)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(word: str, kind: str):
    if kind == "bf16":
        compare, to_float = comparison(word, "f32"), rounding.bfloat16_to_float
        return lambda a, b: compare(to_float(a), to_float(b))
    if DTYPES[kind].kind != "f":
        return _COMPARE[word]
    nan = lambda a, b: np.isnan(a) | np.isnan(b)
    if word == "nan":
        return nan
    if word == "num":
        return lambda a, b: ~nan(a, b)
    if word == "ne":
        return lambda a, b: (a != b) & ~nan(a, b)
    if word in _COMPARE:
        return _COMPARE[word]
    return lambda a, b: _COMPARE[word[:-1]](a, b) | nan(a, b)


@maker("setp")
def _set_predicate(instruction, machine):
    kind, words = kind_of(instruction), [w for w in instruction.words if w != "ftz"]
    compare = comparison(words[0], kind)
    if "ftz" in instruction.words:
        exact, flush = compare, rounding.flush
        compare = lambda a, b: exact(flush(a), flush(b))
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = joins.get(words[1])
    a, b = (reader(operand, kind, machine) for operand in instruction.operands[1:3])
    out = instruction.operands[0]
    first, second = (out.first, out.second) if isinstance(out, Pair) else (out, None)
    write, write_other = writer(first, "pred", machine), writer(second, "pred", machine)
    if join is None:

        def run(lanes):
            result = compare(a(lanes), b(lanes))
            write(lanes, result)
            write_other(lanes, ~np.asarray(result))

        return run
    c = reader(instruction.operands[3], "pred", machine)

    def run(lanes):
        result, other = compare(a(lanes), b(lanes)), c(lanes)
        write(lanes, join(result, other))
        write_other(lanes, join(~np.asarray(result), other))

    return run


@maker("selp")
def _select(instruction, machine):
    kind = kind_of(instruction)
    a, b = (reader(operand, kind, machine) for operand in instruction.operands[1:3])
    p, write = (
        reader(instruction.operands[3], "pred", machine),
        writer(instruction.operands[0], kind, machine),
    )
    return lambda lanes: write(lanes, np.where(p(lanes), a(lanes), b(lanes)))
