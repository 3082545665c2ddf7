"""Shifts, fields and bits of a thread's own registers."""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import PtxError
from tests.ptx.operands import DTYPES, UNSIGNED, elementwise, kind_of, maker, reader, writer


@maker("shl", "shr")
def _shift(instruction, machine):
    kind = kind_of(instruction)
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

    return elementwise(instruction, machine, kind, function, [kind, "u32"])


@maker("bfe")
def _extract(instruction, machine):
    kind = kind_of(instruction)
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
            out[i] = field % 2**bits
        return out.astype(UNSIGNED[bits // 8]).view(DTYPES[kind])

    def small(a, position, length):  # both immediate, as compilers write it
        at, count = int(position) & 0xFF, int(length) & 0xFF
        if at + count > bits or count == 0 or np.ndim(position) or np.ndim(length):
            return function(a, position, length)
        left, right = bits - at - count, bits - count
        return (a << DTYPES[kind].type(left)) >> DTYPES[kind].type(right)

    run = lambda a, p, n: function(a, p, n) if np.ndim(p) or np.ndim(n) else small(a, p, n)
    return elementwise(instruction, machine, kind, run, [kind, "u32", "u32"])


@maker("bfi")
def _insert(instruction, machine):
    kind = kind_of(instruction)
    bits = int(kind[1:])
    wide = UNSIGNED[bits // 8].type

    def function(a, b, position, length):
        position, length = (
            np.minimum(np.asarray(x) & np.uint32(0xFF), np.uint32(bits)) for x in (position, length)
        )
        whole = length == bits  # a shift by all bits is none in numpy
        low = (wide(1) << np.where(whole, 0, length).astype(wide)) - wide(1)
        mask, inside = np.where(whole, wide(2**bits - 1), low), position < bits
        by = np.where(inside, position, 0).astype(wide)
        return np.where(inside, (b & ~(mask << by)) | (a & mask) << by, b)

    return elementwise(instruction, machine, kind, function, [kind, kind, "u32", "u32"])


@maker("shf")
def _funnel(instruction, machine):
    left, wrap = instruction.words[0] == "l", instruction.words[1] == "wrap"

    def function(low, high, by):
        by = (np.asarray(by) & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return elementwise(instruction, machine, "b32", function)


@maker("lop3")
def _logic(instruction, machine):
    table = instruction.operands[4].value
    if not 0 <= table <= 255:
        raise PtxError(f"no table of three inputs: {table}")

    def function(a, b, c):
        out = np.uint32(0)
        for row in range(8):  # of the table: a is the row's bit 2, b bit 1, c bit 0
            if table >> row & 1:
                out = out | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    return elementwise(instruction, machine, "b32", function, ["b32"] * 3)


@maker("popc")
def _popc(instruction, machine):
    kind = kind_of(instruction)
    read = reader(instruction.operands[1], kind, machine)
    write = writer(instruction.operands[0], "u32", machine)
    return lambda lanes: write(lanes, np.bitwise_count(read(lanes)).astype(np.uint32))


@maker("brev")
def _brev(instruction, machine):
    kind = kind_of(instruction)
    bits = int(kind[1:])

    def function(a):
        one, out = a.dtype.type(1), np.zeros_like(a)
        for i in range(bits):
            out |= ((a >> a.dtype.type(i)) & one) << a.dtype.type(bits - 1 - i)
        return out

    return elementwise(instruction, machine, kind, function)


@maker("bfind", "clz")
def _bfind(instruction, machine):
    kind = kind_of(instruction)
    bits = int(kind[1:])
    read = reader(instruction.operands[1], kind, machine)
    write = writer(instruction.operands[0], "u32", machine)

    def run(lanes):
        value = np.asarray(read(lanes))
        if kind[0] == "s":
            value = np.where(value < 0, ~value, value)
        value = value.view(UNSIGNED[bits // 8])
        highest = np.full(value.shape, -1)
        for i in range(bits):
            highest = np.where(value >> value.dtype.type(i) & value.dtype.type(1), i, highest)
        if instruction.name == "clz":
            result = bits - 1 - highest
        else:
            result = np.where((highest >= 0) & ("shiftamt" in instruction.words), bits - 1 - highest, highest)
        write(lanes, result.astype(np.int32).view(np.uint32))

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

    return elementwise(instruction, machine, "b32", function)
