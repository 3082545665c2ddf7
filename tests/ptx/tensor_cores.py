"""Products of tensor cores: mma.sync and wgmma, summed exactly and cut off to float32 as the hardware does."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.arithmetic import bfloat16_to_float, maker, reader, writer
from tests.ptx.errors import PtxError
from tests.ptx.program import Vector

_WARP = 32
_TO_FLOAT = {
    "f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float64),
    "bf16": lambda bits: bfloat16_to_float(bits).astype(np.float64),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),
}


def cut(value: np.ndarray) -> np.ndarray:
    """float64 to float32 towards zero."""
    near = value.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(value)
    return np.where(beyond & np.isfinite(value), np.nextafter(near, np.float32(0)), near)


def _fragment(registers: list[np.ndarray], kind: str, rows: int) -> np.ndarray:
    """Registers (warps * 32 each) as matrices (warps, rows, k): lane 4 g + t holds row g (and g + 8)."""
    warps = len(registers[0]) // _WARP
    values = np.stack([r.reshape(warps, 8, 4) for r in registers], 1)  # warp, register, g, t
    halves = rows // 8
    values = values.reshape(warps, len(registers) // halves, halves, 8, 4)  # warp, block of k, upper, g, t
    if kind == "tf32":
        out = values.transpose(0, 2, 3, 1, 4)
    else:
        pair = np.stack([values & np.uint32(0xFFFF), values >> np.uint32(16)], -1)
        out = pair.transpose(0, 2, 3, 1, 4, 5)
    return _TO_FLOAT[kind](np.ascontiguousarray(out)).reshape(warps, rows, -1)


@maker("mma")
def _mma(instruction, machine):
    words = instruction.words
    shape = next(word for word in words if re.fullmatch(r"m\d+n\d+k\d+", word))
    kinds = words[-4:]
    if not shape.startswith("m16n8") or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] not in _TO_FLOAT:
        raise PtxError(f"not supported: {instruction.text}")
    if words[words.index(shape) + 1 :][:2] != ("row", "col"):
        raise PtxError(f"not supported: {instruction.text}")
    k, kind = int(shape.split("k")[1]), kinds[1]
    d, a, b, c = instruction.operands
    expected = k // (4 if kind == "tf32" else 8)
    if len(a.parts) != 2 * expected or len(b.parts) != expected:
        raise PtxError(f"not supported: {instruction.text}")
    reads = [[reader(part, "b32", machine) for part in operand.parts] for operand in (a, b)]
    adds = [reader(part, "f32", machine) for part in c.parts]
    writes = [writer(part, "f32", machine) for part in d.parts]

    def run(lanes):
        count = machine.size(lanes)
        spread = lambda value: np.broadcast_to(value, (count,))
        first = _fragment([spread(read(lanes)) for read in reads[0]], kind, 16)
        second = _fragment([spread(read(lanes)) for read in reads[1]], kind, 8)
        product = np.einsum("wik,wjk->wij", first, second)
        # d: lane 4 g + t holds rows g and g + 8 at columns 2 t and 2 t + 1
        product = product.reshape(-1, 2, 8, 4, 2)
        for i, (add, write) in enumerate(zip(adds, writes)):
            part = product[:, i // 2, :, :, i % 2].reshape(-1)
            write(lanes, cut(part + spread(add(lanes)).astype(np.float64)))

    return run


def _operand_from_shared(machine, blocks, descriptor, rows, k, size, k_major):
    """A matrix (rows, k) of 16-byte pieces in shared memory, as a descriptor of wgmma places it."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle, base = descriptor >> 62 & 3, descriptor >> 49 & 7
    if base:
        raise PtxError("a matrix descriptor with a base offset is not supported")
    per = 16 // size  # elements in 16 bytes
    width = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes that are contiguous before a stride applies
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if k_major:
        if swizzle == 0:
            at = row % 8 * 16 + row // 8 * stride + column // per * leading
        else:
            at = row % 8 * width + row // 8 * stride + column // per * 16
        at = at + column % per * size
    else:
        pieces = width // 16  # of `per` rows each
        piece = row // per
        if swizzle == 0:
            at = piece * stride + column % 8 * 16 + column // 8 * leading
        else:
            at = piece % pieces * 16 + piece // pieces * leading + column % 8 * width + column // 8 * stride
        at = at + row % per * size
    at = at + start
    if swizzle:
        mask = width // 16 - 1
        at = at ^ ((at >> 7 & mask) << 4)
    if (at + size > machine.shared.size).any():
        raise PtxError("a matrix descriptor names bytes beyond the shared memory")
    view = machine.shared.bytes.view(f"u{size}")
    return view[(at[None] + blocks[:, None, None] * machine.shared.pitch) // size]


@maker("wgmma")
def _wgmma(instruction, machine):
    words = instruction.words
    if words[0] in ("fence", "commit_group", "wait_group"):
        return lambda lanes: None
    shape = next(word for word in words if re.fullmatch(r"m64n\d+k\d+", word))
    n, k = (int(x) for x in re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    to_kind, kind = words[words.index(shape) + 1 :][:2]
    if to_kind != "f32" or kind not in _TO_FLOAT:
        raise PtxError(f"not supported: {instruction.text}")
    d, a, b, scale, *rest = instruction.operands
    signs, trans = [x.value for x in rest[:2]], [x.value for x in rest[2:]]
    if signs != [1, 1]:
        raise PtxError(f"not supported: {instruction.text}")
    from_registers = isinstance(a, Vector)
    transposed_b = trans[-1] if trans else 0
    transposed_a = trans[0] if trans and not from_registers else 0
    size = 4 if kind == "tf32" else 2
    accumulators = [(reader(part, "f32", machine), writer(part, "f32", machine)) for part in d.parts]
    if from_registers:
        a_reads = [reader(part, "b32", machine) for part in a.parts]
    else:
        a_read = reader(a, "b64", machine)
    b_read = reader(b, "b64", machine)
    scale = reader(scale, "pred", machine)
    group = 4 * _WARP

    def matrices(read, lanes, rows, major_k):
        descriptors = np.broadcast_to(read(lanes), (machine.size(lanes),)).reshape(-1, group)
        if (descriptors != descriptors[:, :1]).any():
            raise PtxError("a warpgroup's threads name different matrices")
        blocks = machine.block[machine.ids(lanes)].reshape(-1, group)[:, 0].astype(np.int64)
        out = np.zeros((len(blocks), rows, k))
        for value in np.unique(descriptors[:, 0]):
            chosen = descriptors[:, 0] == value
            bits = _operand_from_shared(machine, blocks[chosen], int(value), rows, k, size, major_k)
            out[chosen] = _TO_FLOAT[kind](bits)
        return out

    def run(lanes):
        ids = machine.ids(lanes)
        if len(ids) % group or (ids.reshape(-1, group)[:, 0] % group).any():
            raise PtxError("not all threads of a warpgroup take part")
        if from_registers:
            registers = [np.broadcast_to(read(lanes), ids.shape) for read in a_reads]
            first = _fragment(registers, kind, 16).reshape(-1, 64, k)
        else:
            first = matrices(a_read, lanes, 64, not transposed_a)
        second = matrices(b_read, lanes, n, not transposed_b)
        product = np.einsum("wik,wjk->wij", first, second).reshape(-1, 2, 8, n // 8, 4, 2)
        keep = np.broadcast_to(scale(lanes), ids.shape)
        for i, (read, write) in enumerate(accumulators):
            part = product[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
            before = np.where(keep, read(lanes).astype(np.float64), 0.0)
            write(lanes, cut(part + before))

    return run
