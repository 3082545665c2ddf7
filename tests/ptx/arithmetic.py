"""What each instruction on a thread's own registers does, for vectors of threads.

A maker takes an instruction and the machine and returns ``run(lanes)``, where ``lanes`` selects threads: a slice of
all or an array of indices.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import PtxError
from tests.ptx.program import Address, Float, Integer, Not, Pair, Register, Symbol, Vector

DTYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8) for kind in "ub"},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "tf32": np.dtype("u4"),
}
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
MAKERS = {}


def maker(*names):
    def add(function):
        MAKERS.update(dict.fromkeys(names, function))
        return function

    return add


def bits_of(value: np.ndarray) -> np.ndarray:
    return value.view(_UNSIGNED[value.dtype.itemsize])


def reader(operand, kind: str, machine):
    """A function of lanes that gives an operand's values as type ``kind`` (or "pred")."""
    if kind == "pred":
        if isinstance(operand, Not):
            array = machine.register(operand.register)
            return lambda lanes: ~array[lanes]
        if isinstance(operand, Integer):
            value = np.bool_(operand.value != 0)
            return lambda lanes: value
        array = machine.register(operand)
        return lambda lanes: array[lanes]
    dtype = DTYPES[kind]
    if isinstance(operand, Register):
        array = machine.register(operand)
        if operand.bits == 8 * dtype.itemsize:
            viewed = array.view(dtype)
            return lambda lanes: viewed[lanes]
        if operand.bits < 8 * dtype.itemsize:
            raise PtxError(f"{operand.name} is narrower than .{kind}")
        narrow = _UNSIGNED[dtype.itemsize]
        return lambda lanes: array[lanes].astype(narrow).view(dtype)
    if isinstance(operand, Float):
        raw = np.array(operand.bits, _UNSIGNED[operand.width // 8]).view(f"f{operand.width // 8}")
        value = raw.view(dtype)[()] if raw.dtype.itemsize == dtype.itemsize else raw.astype(dtype)[()]
        return lambda lanes: value
    if isinstance(operand, Integer):
        unsigned = _UNSIGNED[dtype.itemsize]
        value = np.array(operand.value % 2 ** (8 * dtype.itemsize), unsigned).view(dtype)[()]
        return lambda lanes: value
    if isinstance(operand, Symbol):
        value = machine.symbol(operand.name)
        if np.ndim(value):
            value = value.astype(dtype)
            return lambda lanes: value[lanes]
        value = dtype.type(value)
        return lambda lanes: value
    raise PtxError(f"operand not understood: {operand}")


def writer(operand, kind: str, machine):
    """A function (lanes, values) that puts values of type ``kind`` into a register, widened by its sign."""
    if operand is None:
        return lambda lanes, value: None
    array = machine.register(operand)
    if operand.bits == 1:

        def put(lanes, value):
            array[lanes] = value

        return put
    dtype, wide = DTYPES[kind], _UNSIGNED[operand.bits // 8]
    if operand.bits < 8 * dtype.itemsize:
        raise PtxError(f"{operand.name} is narrower than .{kind}")
    if operand.bits == 8 * dtype.itemsize:
        viewed = array.view(dtype)

        def put(lanes, value):
            viewed[lanes] = value

        return put
    signed = np.dtype(f"i{operand.bits // 8}")

    def put(lanes, value):
        if dtype.kind == "i":
            array[lanes] = value.astype(signed).view(wide)
        else:
            array[lanes] = bits_of(np.asarray(value)).astype(wide)

    return put


def flush(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 values as zeros of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def bfloat16_to_float(bits) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat16(value) -> np.ndarray:
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _elementwise(instruction, machine, kind, function, inputs=None):
    reads = [reader(o, k, machine) for o, k in zip(instruction.operands[1:], inputs or [kind] * 9)]
    write = writer(instruction.operands[0], kind, machine)
    if "ftz" in instruction.words:
        plain, function = function, lambda *values: flush(plain(*map(flush, values)))
    if len(reads) == 1:
        (a,) = reads
        return lambda lanes: write(lanes, function(a(lanes)))
    if len(reads) == 2:
        a, b = reads
        return lambda lanes: write(lanes, function(a(lanes), b(lanes)))
    a, b, c = reads
    return lambda lanes: write(lanes, function(a(lanes), b(lanes), c(lanes)))


def _kind(instruction):
    return instruction.words[-1]


def _simple(names, function, floats=None):
    @maker(*names)
    def make(instruction, machine):
        kind = _kind(instruction)
        if kind in ("bf16", "f16x2", "bf16x2"):
            raise PtxError(f"not supported: {instruction.text}")
        chosen = floats if floats is not None and DTYPES.get(kind, DTYPES["b8"]).kind == "f" else function
        return _elementwise(instruction, machine, kind, chosen)


_simple(["add"], np.add)
_simple(["sub"], np.subtract)
_simple(["and"], np.bitwise_and)
_simple(["or"], np.bitwise_or)
_simple(["xor"], np.bitwise_xor)
_simple(["not"], np.bitwise_not)


@maker("neg", "abs")
def _sign(instruction, machine):
    kind, negative = _kind(instruction), instruction.name == "neg"
    if kind in ("bf16", "f16x2", "bf16x2"):  # by the sign bits
        signs = DTYPES[kind].type(0x80008000 if kind.endswith("x2") else 0x8000)
        function = (lambda a: a ^ signs) if negative else (lambda a: a & ~signs)
        return _elementwise(instruction, machine, kind, function)
    return _elementwise(instruction, machine, kind, np.negative if negative else np.abs)


@maker("copysign")  # the second operand with the sign of the first
def _copy_sign(instruction, machine):
    return _elementwise(instruction, machine, _kind(instruction), lambda a, b: np.copysign(b, a))


@maker("max", "min")
def _extreme(instruction, machine):
    name = instruction.name
    if DTYPES[_kind(instruction)].kind == "f":
        function = {
            "max": np.maximum if "NaN" in instruction.words else np.fmax,
            "min": np.minimum if "NaN" in instruction.words else np.fmin,
        }[name]
    else:
        function = np.maximum if name == "max" else np.minimum
    return _elementwise(instruction, machine, _kind(instruction), function)


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
    kind, words = _kind(instruction), instruction.words
    plus = instruction.name == "mad"
    if DTYPES[kind].kind == "f":
        if plus:
            return MAKERS["fma"](instruction, machine)
        return _elementwise(instruction, machine, kind, np.multiply)
    if "wide" in words:
        wide = DTYPES[_widened(kind)]
        inputs = [kind, kind, _widened(kind)]
        product = lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        function = (lambda a, b, c: product(a, b) + c) if plus else product
        return _elementwise(instruction, machine, _widened(kind), function, inputs)
    product = _high if "hi" in words else np.multiply
    return _elementwise(instruction, machine, kind, (lambda a, b, c: product(a, b) + c) if plus else product)


@maker("fma")
def _fused(instruction, machine):
    kind = _kind(instruction)
    if kind == "f32":
        wide = np.float64
        function = lambda a, b, c: (np.asarray(a).astype(wide) * b + c).astype(np.float32)
    elif kind == "f64":
        wide = np.longdouble
        function = lambda a, b, c: (np.asarray(a).astype(wide) * b + c).astype(np.float64)
    else:
        raise PtxError(f"not supported: {instruction.text}")
    return _elementwise(instruction, machine, kind, function)


def _truncated(a, b):
    """Quotient towards zero; all ones for a division by zero, which PTX leaves open."""
    safe = np.where(b == 0, np.asarray(b).dtype.type(1), b)
    if np.asarray(a).dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(safe), a // safe)
    quotient = a // safe
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(quotient.dtype)
    return np.where(b == 0, np.asarray(b).dtype.type(-1), quotient)


def _full_division(a, b):
    """div.full: beyond 2^126 the quotient is zero."""
    size = np.abs(b)
    zero = (size > 2.0**126) & np.isfinite(b) & np.isfinite(a)
    return np.where(zero, np.asarray(b).dtype.type(0), a / b)


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
        return np.where(
            (near == 0) | (near == 1) | ~np.isfinite(near), near, (true + error).astype(np.float32)
        )

    return function


def _approximable(instruction, machine, exact):
    kind = _kind(instruction)
    if machine.approximate and {"approx", "full"} & set(instruction.words):
        if kind == "f32":
            exact = _approximation(instruction.name, exact)
        else:  # rcp.approx.ftz.f64 is a start for Newton's iteration: 20 bits
            plain, high = exact, np.uint64(0xFFFFFFFF00000000)
            exact = lambda x: (bits_of(np.asarray(plain(x))) & high).view(np.float64)
    return _elementwise(instruction, machine, kind, exact)


@maker("div", "rem")
def _divide(instruction, machine):
    kind = _kind(instruction)
    if DTYPES[kind].kind == "f":
        approximate = {"full", "approx"} & set(instruction.words)
        return _approximable(instruction, machine, _full_division if approximate else np.divide)
    if instruction.name == "div":
        return _elementwise(instruction, machine, kind, _truncated)
    return _elementwise(instruction, machine, kind, lambda a, b: a - _truncated(a, b) * b)


@maker("ex2", "lg2", "sqrt", "rcp", "rsqrt")
def _root_or_exponential(instruction, machine):
    exact = {
        "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x,
        "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    }[instruction.name]  # fmt: skip
    if _kind(instruction) not in ("f32", "f64"):
        raise PtxError(f"not supported: {instruction.text}")
    return _approximable(instruction, machine, exact)


@maker("shl", "shr")
def _shift(instruction, machine):
    kind = _kind(instruction)
    bits = 8 * DTYPES[kind].itemsize
    left = instruction.name == "shl"

    def function(a, by):
        a = np.asarray(a)
        inside = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
        if left:
            return np.where(by >= bits, a.dtype.type(0), a << inside)
        if a.dtype.kind == "i":
            return a >> inside
        return np.where(by >= bits, a.dtype.type(0), a >> inside)

    return _elementwise(instruction, machine, kind, function, [kind, "u32"])


@maker("bfe")
def _extract(instruction, machine):
    kind = _kind(instruction)
    bits = 8 * DTYPES[kind].itemsize

    def function(a, position, length):
        out = np.zeros(np.broadcast(a, position, length).shape, object)
        each = np.broadcast_arrays(a, position & 0xFF, length & 0xFF)
        for i in np.ndindex(out.shape):
            value, at, count = (int(x[i]) for x in each)
            count = min(count, bits - at) if kind[0] == "u" else count
            field = (value >> at) & ((1 << max(count, 0)) - 1)
            if kind[0] == "s" and count > 0:
                top = min(at + count - 1, bits - 1)
                if (value >> top) & 1:
                    field |= -1 << min(count, bits)
            out[i] = field
        return out.astype(object).astype(np.int64).astype(DTYPES[kind])

    def small(a, position, length):  # both immediate, as compilers write it
        at, count = int(position) & 0xFF, int(length) & 0xFF
        if at + count > bits or count == 0 or np.ndim(position) or np.ndim(length):
            return function(a, position, length)
        left, right = bits - at - count, bits - count
        return (a << DTYPES[kind].type(left)) >> DTYPES[kind].type(right)

    run = lambda a, p, n: function(a, p, n) if np.ndim(p) or np.ndim(n) else small(a, p, n)
    return _elementwise(instruction, machine, kind, run, [kind, "u32", "u32"])


@maker("popc")
def _popc(instruction, machine):
    kind = _kind(instruction)
    read = reader(instruction.operands[1], kind, machine)
    write = writer(instruction.operands[0], "u32", machine)
    return lambda lanes: write(lanes, np.bitwise_count(read(lanes)).astype(np.uint32))


@maker("brev")
def _brev(instruction, machine):
    def function(a):
        out = np.zeros_like(a)
        for i in range(32):
            out |= ((a >> np.uint32(i)) & np.uint32(1)) << np.uint32(31 - i)
        return out

    return _elementwise(instruction, machine, "b32", function)


@maker("bfind", "clz")
def _bfind(instruction, machine):
    if _kind(instruction) not in ("u32", "b32"):
        raise PtxError(f"not supported: {instruction.text}")
    read = reader(instruction.operands[1], "u32", machine)
    write = writer(instruction.operands[0], "u32", machine)

    def run(lanes):
        value = read(lanes)
        highest = np.floor(np.log2(np.maximum(value, 1).astype(np.float64))).astype(np.uint32)
        if instruction.name == "clz":
            result = np.where(value == 0, np.uint32(32), np.uint32(31) - highest)
        else:
            found = np.uint32(31) - highest if "shiftamt" in instruction.words else highest
            result = np.where(value == 0, np.uint32(0xFFFFFFFF), found)
        write(lanes, result)

    return run


@maker("prmt")
def _permute(instruction, machine):
    if instruction.words != ("b32",):
        raise PtxError(f"not supported: {instruction.text}")

    def function(a, b, selector):
        both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
        out = np.uint64(0)
        for i in range(4):
            chosen = (np.asarray(selector) >> np.uint32(4 * i)) & np.uint32(0xF)
            byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(chosen & np.uint32(8), sign, byte)
            out = out | byte << np.uint64(8 * i)
        return out.astype(np.uint32)

    return _elementwise(instruction, machine, "b32", function)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(word: str, kind: str):
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
    kind, words = _kind(instruction), [w for w in instruction.words if w != "ftz"]
    compare = comparison(words[0], kind)
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
    kind = _kind(instruction)
    a, b = (reader(operand, kind, machine) for operand in instruction.operands[1:3])
    p, write = (
        reader(instruction.operands[3], "pred", machine),
        writer(instruction.operands[0], kind, machine),
    )
    return lambda lanes: write(lanes, np.where(p(lanes), a(lanes), b(lanes)))


@maker("cvta")
def _convert_address(instruction, machine):
    if "shared" in instruction.words or "local" in instruction.words:
        raise PtxError(f"not supported: {instruction.text}")
    return MAKERS["mov"](instruction, machine)


@maker("mov")
def _move(instruction, machine):
    kind = _kind(instruction)
    to, source = instruction.operands
    if isinstance(source, Vector):  # the first part lies lowest
        part = f"b{int(kind[1:]) // len(source.parts)}"
        reads = [reader(operand, part, machine) for operand in source.parts]
        write, wide, bits = writer(to, kind, machine), DTYPES[kind].type, int(part[1:])

        def run(lanes):
            value = wide(0)
            for i, read in enumerate(reads):
                value = value | np.asarray(read(lanes)).astype(wide) << wide(bits * i)
            write(lanes, value)

        return run
    if isinstance(to, Vector):
        bits = int(kind[1:]) // len(to.parts)
        read, narrow = reader(source, kind, machine), DTYPES[f"b{bits}"].type
        writes = [writer(part, f"b{bits}", machine) for part in to.parts]

        def run(lanes):
            value = read(lanes)
            for i, write in enumerate(writes):
                write(lanes, (value >> value.dtype.type(bits * i)).astype(narrow))

        return run
    read, write = reader(source, kind, machine), writer(to, kind, machine)
    return lambda lanes: write(lanes, read(lanes))


def _to_integer(value, kind, rounding):
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](value)
    limits = np.iinfo(DTYPES[kind])
    wide = rounded.astype(np.longdouble)  # holds 64-bit limits exactly
    clamped = np.clip(wide, np.longdouble(limits.min), np.longdouble(limits.max))
    return np.where(np.isnan(value), 0, clamped).astype(DTYPES[kind])


_TO_FLOAT = {
    "bf16": bfloat16_to_float,
    "f16": lambda value: value.astype(np.float32),
}


@maker("cvt")
def _convert(instruction, machine):
    words = list(instruction.words)
    to, source = words[-2:]
    rounding = words[0] if len(words) > 2 else None
    unknown = set(words[:-2]) - {"rn", "rna", "rni", "rzi", "rmi", "rpi", "rz", "ftz"}
    if unknown or ("rz" in words and to != "f32"):
        raise PtxError(f"not supported: {instruction.text}")
    if to in ("bf16x2", "f16x2"):
        first, second = (reader(operand, source, machine) for operand in instruction.operands[1:3])
        write = writer(instruction.operands[0], "b32", machine)
        half = float_to_bfloat16 if to == "bf16x2" else lambda v: np.asarray(v).astype("f2").view("u2")

        def run(lanes):
            high, low = half(first(lanes)).astype(np.uint32), half(second(lanes)).astype(np.uint32)
            write(lanes, high << np.uint32(16) | low)

        return run
    if to == "tf32":  # half away from zero
        read, write = (
            reader(instruction.operands[1], "b32", machine),
            writer(instruction.operands[0], "b32", machine),
        )
        finite = np.uint32(0x7F800000)

        def run(lanes):
            bits = read(lanes)
            rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            write(lanes, np.where(bits & finite == finite, bits, rounded))

        return run
    read, write = (
        reader(instruction.operands[1], source, machine),
        writer(instruction.operands[0], to, machine),
    )
    dtype, integer = DTYPES[to], lambda kind: kind[0] in "usb" and kind != "bf16"
    if integer(to) and not integer(source):
        prepare = _TO_FLOAT.get(source, lambda value: value)
        function = lambda value: _to_integer(prepare(value), to, rounding)
    elif to == "bf16":
        function = lambda value: float_to_bfloat16(np.asarray(value).astype(np.float32))
    elif source in _TO_FLOAT and to != source:
        function = lambda value: _TO_FLOAT[source](value).astype(dtype)
    elif to == source and rounding in ("rni", "rzi", "rmi", "rpi"):
        function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    else:
        function = lambda value: np.asarray(value).astype(dtype)
    if "ftz" in words:
        plain, function = function, lambda value: plain(flush(value))
    return lambda lanes: write(lanes, function(read(lanes)))


def address(operand: Address, machine):
    """A function of lanes that gives addresses (or offsets in shared memory, or among parameters) as uint64."""
    offset = np.uint64(operand.offset % 2**64)
    if isinstance(operand.base, Register):
        array = machine.register(operand.base)
        if operand.base.bits == 32:
            narrow = np.uint32(operand.offset % 2**32)
            return lambda lanes: (array[lanes] + narrow).astype(np.uint64)
        return lambda lanes: array[lanes] + offset
    base = operand.base.value if isinstance(operand.base, Integer) else machine.symbol(operand.base.name)
    value = np.uint64(base + operand.offset)
    return lambda lanes: np.full(machine.size(lanes), value)


def parts(operand) -> tuple:
    return operand.parts if isinstance(operand, Vector) else (operand,)


@maker("ld")
def _load(instruction, machine):
    words, kind = instruction.words, _kind(instruction)
    to, place = parts(instruction.operands[0]), address(instruction.operands[1], machine)
    size = DTYPES[kind].itemsize
    writes = [writer(operand, kind, machine) for operand in to]
    dtype = DTYPES[kind]
    if words[0] == "param":
        blob = np.frombuffer(machine.parameters, np.uint8)

        def run(lanes):
            at = place(lanes)[:, None] + np.arange(size, dtype=np.uint64)
            for i, write in enumerate(writes):
                write(lanes, blob[(at + np.uint64(i * size)).astype(np.int64)].view(dtype)[:, 0])

        return run
    memory = machine.shared if words[0] == "shared" else machine.memory
    if words[0] not in ("shared", "global", *DTYPES):
        raise PtxError(f"not supported: {instruction.text}")

    def run(lanes):
        values = memory.load(place(lanes), size, len(writes), machine.ids(lanes), machine)
        for write, value in zip(writes, values):
            write(lanes, value.view(dtype))

    return run


@maker("st")
def _store(instruction, machine):
    words, kind = instruction.words, _kind(instruction)
    place, values = address(instruction.operands[0], machine), parts(instruction.operands[1])
    size, dtype = DTYPES[kind].itemsize, DTYPES[kind]
    reads = [reader(operand, kind, machine) for operand in values]
    memory = machine.shared if words[0] == "shared" else machine.memory
    if words[0] not in ("shared", "global", *DTYPES):
        raise PtxError(f"not supported: {instruction.text}")

    def run(lanes):
        count = machine.size(lanes)
        bits = [np.broadcast_to(bits_of(np.asarray(read(lanes), dtype)), (count,)) for read in reads]
        memory.store(place(lanes), bits, size, machine.ids(lanes), machine)

    return run


@maker("atom", "red")
def _atomic(instruction, machine):
    words, kind = instruction.words, _kind(instruction)
    memory = machine.shared if words[0] == "shared" else machine.memory
    dtype = DTYPES[kind]
    operands = instruction.operands if instruction.name == "atom" else [None, *instruction.operands]
    write, place = writer(operands[0], kind, machine), address(operands[1], machine)
    reads = [reader(operand, kind, machine) for operand in operands[2:]]
    combine = {
        "add": lambda old, new: old + new, "min": min, "max": max, "exch": lambda old, new: new,
        "or": lambda old, new: old | new, "and": lambda old, new: old & new,
    }  # fmt: skip
    (name,) = [word for word in words if word in combine or word == "cas"]

    def run(lanes):
        ids, addresses = machine.ids(lanes), place(lanes)
        at = memory.locate(addresses, dtype.itemsize, 1, ids, machine) // dtype.itemsize
        view = memory.bytes.view(dtype)
        values = [np.broadcast_to(read(lanes), ids.shape) for read in reads]
        old = np.zeros(len(ids), dtype)
        for i in range(len(ids)):
            old[i] = view[at[i]]
            if name == "cas":
                if old[i] == values[0][i]:
                    view[at[i]] = values[1][i]
            else:
                view[at[i]] = combine[name](old[i], values[0][i])
        write(lanes, old)

    return run


@maker("fence", "membar", "nanosleep", "prefetch", "griddepcontrol", "wgmma.fence")
def _nothing(instruction, machine):
    return lambda lanes: None
