"""Moves and conversions between a thread's own registers."""

from __future__ import annotations

import numpy as np

from tests.ptx import rounding
from tests.ptx.operands import DTYPES, MAKERS, kind_of, maker, reader, writer
from tests.ptx.program import Vector


@maker("cvta")
def _convert_address(instruction, machine):
    return MAKERS["mov"](instruction, machine)


@maker("mov")
def _move(instruction, machine):
    kind = kind_of(instruction)
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


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(value, to, source, how):
    rounded = _ROUND[how](value)
    limits = np.iinfo(DTYPES[to])
    # The largest integer of 64 bits is no float: what reaches the power of two above it is clamped apart.
    above = rounded >= 2.0 ** (limits.bits - (to[0] == "s"))
    below = rounded <= float(limits.min)
    unknown = np.isnan(value)
    inside = np.where(above | below | unknown, 0, rounded).astype(DTYPES[to])
    nan = limits.min if to[0] == "s" else 1 << (limits.bits - 1)
    if source != "f64" and limits.bits < 64:
        nan = 0
    result = np.where(
        above, DTYPES[to].type(limits.max), np.where(below, DTYPES[to].type(limits.min), inside)
    )
    return np.where(unknown, DTYPES[to].type(nan), result)


@maker("cvt")
def _convert(instruction, machine):
    words = instruction.words
    to, source = words[-2:]
    how = words[0]
    if to in ("bf16x2", "f16x2"):
        first, second = (reader(operand, source, machine) for operand in instruction.operands[1:3])
        write = writer(instruction.operands[0], "b32", machine)
        half = (
            rounding.float_to_bfloat16
            if to == "bf16x2"
            else lambda v: rounding.float_to_float16(v).view(np.uint16)
        )

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
    dtype, integer = DTYPES[to], lambda kind: kind[0] in "us"
    to_float = rounding.bfloat16_to_float if source == "bf16" else np.asarray
    if integer(to) and not integer(source):
        function = lambda value: _to_integer(to_float(value), to, source, how)
    elif to == "bf16":
        function = lambda value: rounding.double_to_bfloat16(value.astype(np.float64))
    elif how in _ROUND:
        function = lambda value: rounding.canonical(_ROUND[how](value))
    elif to == "f16":  # through float64, which holds every integer that is not infinite as float16
        function = lambda value: rounding.float_to_float16(np.asarray(value).astype(np.float64))
    elif integer(source):
        function = lambda value: np.asarray(value).astype(dtype)
    else:
        function = lambda value: rounding.canonical(to_float(value).astype(dtype))
    if "ftz" in words:  # of float32 alone, what goes in and what comes out
        exact, flush = function, rounding.flush
        function = lambda value: exact(flush(value)) if source == "f32" else exact(value)
        if to == "f32":
            inner = function
            function = lambda value: flush(inner(value))
    return lambda lanes: write(lanes, function(read(lanes)))
