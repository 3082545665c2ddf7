"""Products of tensor cores: mma.sync and wgmma, summed exactly and cut off to float32 as the hardware does."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.errors import PtxError
from tests.ptx.operands import maker, reader, writer
from tests.ptx.program import Register, Vector
from tests.ptx.rounding import bfloat16_to_float

_WARP = 32
_TO_FLOAT = {
    "f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float64),
    "bf16": lambda bits: bfloat16_to_float(bits).astype(np.float64),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),
}


def cut(value: np.ndarray) -> np.ndarray:
    """float64 to float32 towards zero, but beyond the largest to infinity, so that an overflow shows."""
    near = value.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(value)
    return np.where(beyond & np.isfinite(near), np.nextafter(near, np.float32(0)), near)


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
    shape, kind = instruction.words[2], instruction.words[-2]
    k = int(shape.split("k")[1])
    d, a, b, c = instruction.operands
    expected = k // (4 if kind == "tf32" else 8)
    if [len(operand.parts) for operand in (d, a, b, c)] != [4, 2 * expected, expected, 4]:
        raise PtxError("the shape and the numbers of registers do not fit")
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
        before = [
            spread(add(lanes)).astype(np.float64) for add in adds
        ]  # d may stand among them in another order
        for i, (start, write) in enumerate(zip(before, writes)):
            write(lanes, cut(product[:, i // 2, :, :, i % 2].reshape(-1) + start))

    return run


def _places(descriptor, rows, k, size, k_major) -> np.ndarray:
    """Offsets in shared memory of a matrix (rows, k), as a descriptor of wgmma places it.

    In units of 16 bytes T (PTX ISA, "Strides" and "Matrix Descriptor Format" of wgmma, and CUTLASS's canonical layouts
    agree): K-major ((8, m), (T, 2)) : ((width, stride), (1, leading or T)); MN-major ((T, width, m), (8, k)) : ((1, T,
    leading), (width, stride)), without swizzle with leading and stride exchanged.
    """
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
    if swizzle:  # bits 4 to 6 of the address exchange with bits 7 to 9
        mask = width // 16 - 1
        at = at ^ ((at >> 7 & mask) << 4)
    return at


class Products:
    """wgmma: results land when their group is waited for; until then accumulators are NaN and tiles stay as they are.

    Not checked: that wgmma.fence stands between a thread's own use of the registers and the first product.
    """

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.lanes, np.int32)
        self.pending: list[tuple] = []
        self.busy: dict[Register, np.ndarray] = {}  # how many products under way a thread's register is in
        self.results: dict[Register, np.ndarray] = {}

    def before(self, register, lanes) -> np.ndarray:
        """Of an accumulator: what the products under way will leave in it."""
        if register not in self.busy:
            self.busy[register] = np.zeros(self.machine.lanes, np.int32)
            self.results[register] = np.zeros(self.machine.lanes, np.float32)
        now = self.machine.register(register).view(np.float32)[lanes]
        return np.where(self.busy[register][lanes] > 0, self.results[register][lanes], now)

    def add(self, lanes, results, tiles) -> None:
        """``results`` by register; ``tiles`` are (indices of shared bytes, the bytes), (warpgroups, n) each."""
        for register, value in results.items():
            self.results[register][lanes] = value
            self.busy[register][lanes] += 1
            self.machine.register(register)[lanes] = 0xFFFFFFFF
        ids = self.machine.ids(lanes)
        self.pending.append((ids, self.committed[ids].copy(), tuple(results), tiles))

    def wait(self, ids, groups_left: int) -> None:
        asked = np.zeros(self.machine.lanes, bool)
        asked[ids] = True
        left = []
        for who, group, registers, tiles in self.pending:
            lands = asked[who] & (group < self.committed[who] - groups_left)
            if lands.any():
                for at, before in tiles:
                    if (self.machine.shared.bytes[at] != before).any():
                        raise PtxError(
                            "shared memory was written before the product that reads it was waited for"
                        )
                done = who[lands]
                for register in registers:
                    self.busy[register][done] -= 1
                    free = done[self.busy[register][done] == 0]
                    self.machine.register(register).view(np.float32)[free] = self.results[register][free]
            if not lands.all():
                stay = ~lands
                left.append((who[stay], group[stay], registers, tiles))
        self.pending = left

    def check_finished(self) -> None:
        if self.pending:
            raise PtxError("a kernel ended before its products were waited for")


@maker("wgmma")
def _wgmma(instruction, machine):
    words = instruction.words
    if words[0] == "fence":
        return lambda lanes: None
    if words[0] == "commit_group":

        def run(lanes):
            machine.products.committed[lanes] += 1

        return run
    if words[0] == "wait_group":
        groups = instruction.operands[0].value
        return lambda lanes: machine.products.wait(machine.ids(lanes), groups)
    shape = next(word for word in words if word.startswith("m64n"))
    n, k = (int(x) for x in re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    kind, size = words[-1], 4 if words[-1] == "tf32" else 2
    d, a, b, scale, *rest = instruction.operands
    from_registers = isinstance(a, Vector)
    signs, trans = [x.value for x in rest[:2]], [x.value for x in rest[2:]]
    expected = 0 if kind == "tf32" else 1 if from_registers else 2
    if n % 8 or not 8 <= n <= 256 or len(d.parts) != n // 2 or (from_registers and len(a.parts) != 4):
        raise PtxError("the shape and the numbers of registers do not fit")
    if signs != [1, 1] or len(trans) != expected or not set(trans) <= {0, 1}:
        raise PtxError("a product with these signs or transpositions is not supported")
    transposed_b = trans[-1] if trans else 0
    transposed_a = trans[0] if trans and not from_registers else 0
    if len(set(d.parts)) != len(d.parts):
        raise PtxError("an accumulator stands twice")
    if from_registers:
        a_reads = [reader(part, "b32", machine) for part in a.parts]
    else:
        a_read = reader(a, "b64", machine)
    b_read = reader(b, "b64", machine)
    scale = reader(scale, "pred", machine)
    if machine.check_fences:
        machine.shared.watch_proxy()
    group = 4 * _WARP

    def matrices(read, lanes, rows, k_major, tiles):
        """(warpgroups, rows, k), and appends the bytes they were read from to ``tiles``."""
        ids = machine.ids(lanes)
        descriptors = np.broadcast_to(read(lanes), ids.shape).reshape(-1, group)
        if (descriptors != descriptors[:, :1]).any():
            raise PtxError("a warpgroup's threads name different matrices")
        blocks = machine.block[ids].reshape(-1, group)[:, 0].astype(np.int64)
        out = np.zeros((len(blocks), rows, k))
        for value in np.unique(descriptors[:, 0]):
            chosen = descriptors[:, 0] == value
            at = _places(int(value), rows, k, size, k_major)
            if (at + size > machine.shared.size).any():
                raise PtxError("a matrix descriptor names bytes beyond the shared memory")
            at = at[None] + blocks[chosen][:, None, None] * machine.shared.pitch
            each = (at[..., None] + np.arange(size)).reshape(len(at), -1)
            # Whole pieces of 16 bytes, wherever they lie.
            units = np.stack([np.unique(places // machine.shared.unit) for places in each])
            if machine.check_fences:
                machine.shared.check_fenced(units, machine)
            for lane in ids.reshape(-1, group)[chosen][:, ::_WARP].T:  # one thread of every warp
                if machine.shared.races:
                    machine.shared.races.on_read(units.ravel(), np.repeat(lane, units.shape[1]), machine)
            tiles.append((each, machine.shared.bytes[each]))
            out[chosen] = _TO_FLOAT[kind](machine.shared.bytes.view(f"u{size}")[at // size])
        return out

    def run(lanes):
        ids, tiles = machine.ids(lanes), []
        if from_registers:
            registers = [np.broadcast_to(read(lanes), ids.shape) for read in a_reads]
            first = _fragment(registers, kind, 16).reshape(-1, 64, k)
        else:
            first = matrices(a_read, lanes, 64, not transposed_a, tiles)
        second = matrices(b_read, lanes, n, not transposed_b, tiles)
        product = np.einsum("wik,wjk->wij", first, second).reshape(-1, 2, 8, n // 8, 4, 2)
        keep = np.broadcast_to(scale(lanes), ids.shape)
        results = {}
        for i, register in enumerate(d.parts):
            part = product[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
            before = np.where(keep, machine.products.before(register, lanes).astype(np.float64), 0.0)
            results[register] = cut(part + before)
        machine.products.add(lanes, results, tiles)

    return run
