"""Operands as vectors over threads, and the table of instructions.

A maker takes an instruction and the machine and returns ``run(lanes)``, where ``lanes`` selects threads: a slice of
all or an array of indices.
"""

from __future__ import annotations

import numpy as np

from tests.ptx import rounding
from tests.ptx.errors import PtxError
from tests.ptx.program import Address, Float, Integer, Not, Register, Symbol, Vector

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
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
MAKERS = {}


def maker(*names):
    def add(function):
        MAKERS.update(dict.fromkeys(names, function))
        return function

    return add


def bits_of(value: np.ndarray) -> np.ndarray:
    return value.view(UNSIGNED[value.dtype.itemsize])


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
        narrow = UNSIGNED[dtype.itemsize]
        return lambda lanes: array[lanes].astype(narrow).view(dtype)
    if isinstance(operand, Float):
        if operand.width != 8 * dtype.itemsize:
            raise PtxError(f"a floating-point constant of {operand.width} bits as .{kind}")
        value = np.array(operand.bits, UNSIGNED[operand.width // 8]).view(dtype)[()]
        return lambda lanes: value
    if isinstance(operand, Integer):
        if dtype.kind == "f":
            raise PtxError(f"the integer constant {operand.value} as .{kind}")
        unsigned = UNSIGNED[dtype.itemsize]
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
    dtype, wide = DTYPES[kind], UNSIGNED[operand.bits // 8]
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


def elementwise(instruction, machine, kind, function, inputs=None):
    reads = [reader(o, k, machine) for o, k in zip(instruction.operands[1:], inputs or [kind] * 9)]
    write = writer(instruction.operands[0], kind, machine)
    if "ftz" in instruction.words:
        plain, flush = function, rounding.flush
        function = lambda *values: flush(plain(*map(flush, values)))
    if len(reads) == 1:
        (a,) = reads
        return lambda lanes: write(lanes, function(a(lanes)))
    if len(reads) == 2:
        a, b = reads
        return lambda lanes: write(lanes, function(a(lanes), b(lanes)))
    return lambda lanes: write(lanes, function(*(read(lanes) for read in reads)))


def kind_of(instruction):
    return instruction.words[-1]


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
