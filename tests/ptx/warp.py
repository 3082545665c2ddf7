"""Instructions in which the lanes of a warp take part together, and asynchronous copies."""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import PtxError
from tests.ptx.operands import address, maker, reader, writer
from tests.ptx.program import Integer, Pair, Register

_WARP = 32
_MASKED = ("shfl", "vote", "match", "redux", "elect", "bar")


def together(instruction) -> int:
    """How many threads have to execute it together: 0, a warp's or a warpgroup's."""
    if instruction.name == "wgmma" and instruction.words[0] == "mma_async":
        return 4 * _WARP
    if instruction.name in (
        "shfl",
        "vote",
        "match",
        "redux",
        "elect",
        "mma",
        "ldmatrix",
        "stmatrix",
        "wgmma",
    ):
        return _WARP
    return _WARP if instruction.name == "bar" and instruction.words[0] == "warp" else 0


def is_barrier(instruction) -> bool:
    return instruction.name in ("bar", "barrier") and instruction.words[0] != "warp"


def names_everyone(instruction) -> bool:
    mask = instruction.operands[-1]
    return isinstance(mask, Integer) and mask.value % 2**32 == 0xFFFFFFFF


def member_mask(instruction, machine):
    """A function of lanes that gives their masks of who must take part; None where all of a warp must, none ended."""
    if instruction.name not in _MASKED:
        return None
    read = reader(instruction.operands[-1], "b32", machine)
    return lambda lanes: np.broadcast_to(read(lanes), machine.size(lanes))


def _group(machine, lanes, mask):
    """Threads that name the same mask in one warp: how many such groups, and for every thread its group's row."""
    ids = machine.ids(lanes)
    key = machine.warp[ids].astype(np.int64) << 32 | mask(lanes).astype(np.int64)
    groups, row = np.unique(key, return_inverse=True)
    return len(groups), row


@maker("bar.warp")
def _warp_barrier(instruction, machine):
    mask = member_mask(instruction, machine)

    def run(lanes):
        # What a barrier of some of a warp's threads orders is not kept: races may then be reported that are none.
        warps = machine.warp[machine.ids(lanes)]
        everyone = (machine.live_lanes()[warps] & ~mask(lanes)) == 0
        machine.warp_epoch[np.unique(warps[everyone])] += 1

    return run


@maker("elect")
def _elect(instruction, machine):
    out, mask = instruction.operands[0], member_mask(instruction, machine)
    write, write_leader = writer(out.first, "b32", machine), writer(out.second, "pred", machine)

    def run(lanes):
        ids = machine.ids(lanes)
        count, row = _group(machine, lanes, mask)
        leader = np.full(count, _WARP)
        np.minimum.at(leader, row, ids % _WARP)
        write(lanes, leader[row].astype(np.uint32))
        write_leader(lanes, leader[row] == ids % _WARP)

    return run


@maker("shfl")
def _shuffle(instruction, machine):
    mode = instruction.words[1]
    to, value, by, clamp, _ = instruction.operands
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    write, write_inside = writer(first, "b32", machine), writer(second, "pred", machine)
    source = reader(value, "b32", machine)
    by, clamp = reader(by, "b32", machine), reader(clamp, "b32", machine)
    mask = member_mask(instruction, machine)

    def run(lanes):
        ids = machine.ids(lanes)
        lane, b, c = (
            ids % _WARP,
            np.asarray(by(lanes)).astype(np.int64),
            np.asarray(clamp(lanes)).astype(np.int64),
        )
        segment, last, b = c >> 8 & 31, c & 31, b & 31
        most = (lane & segment) | (last & ~segment)
        if mode == "bfly":
            other, inside = lane ^ b, (lane ^ b) <= most
        elif mode == "idx":
            other = (lane & segment) | (b & 31 & ~segment)
            inside = other <= most
        elif mode == "down":
            other, inside = lane + b, lane + b <= most
        else:
            other, inside = lane - b, lane - b >= most
        other = np.where(inside, other, lane)
        named = mask(lanes).astype(np.int64) & machine.live_lanes()[machine.warp[ids]]
        if not (named >> other & 1).all():
            i = int((named >> other & 1).argmin())
            raise PtxError(
                f"thread {machine.name(ids[i])} reads lane {other[i]}, which does not take part ({int(named[i]):#x})"
            )
        everyone = source(machine.all)
        if np.ndim(everyone) == 0:
            everyone = np.full(machine.lanes, everyone)
        write(lanes, everyone[ids - lane + other])
        write_inside(lanes, inside)

    return run


@maker("vote")
def _vote(instruction, machine):
    mode = instruction.words[1]
    to, source, _ = instruction.operands
    read = reader(source, "pred", machine)
    write = writer(to, "b32" if mode == "ballot" else "pred", machine)
    mask = member_mask(instruction, machine)

    def run(lanes):
        ids = machine.ids(lanes)
        holds = np.broadcast_to(read(lanes), ids.shape)
        count, row = _group(machine, lanes, mask)
        bits = np.zeros(count, np.uint32)
        np.bitwise_or.at(bits, row, holds.astype(np.uint32) << (ids % _WARP).astype(np.uint32))
        if mode == "ballot":
            return write(lanes, bits[row])
        there = np.zeros(count, np.uint32)
        np.bitwise_or.at(there, row, np.uint32(1) << (ids % _WARP).astype(np.uint32))
        results = {"any": bits != 0, "all": bits == there, "uni": (bits == there) | (bits == 0)}
        write(lanes, results[mode][row])

    return run


@maker("match")
def _match(instruction, machine):
    to, source, _ = instruction.operands
    kind, mask = instruction.words[-1], member_mask(instruction, machine)
    read, write = reader(source, kind, machine), writer(to, "b32", machine)

    def run(lanes):
        ids = machine.ids(lanes)
        values = np.broadcast_to(read(lanes), ids.shape)
        count, row = _group(machine, lanes, mask)
        table = np.zeros((count, _WARP), values.dtype)
        there = np.zeros((count, _WARP), bool)
        table[row, ids % _WARP], there[row, ids % _WARP] = values, True
        same = (table[row] == values[:, None]) & there[row]
        write(lanes, (same.astype(np.uint32) << np.arange(_WARP, dtype=np.uint32)).sum(1, dtype=np.uint32))

    return run


@maker("redux")
def _reduce(instruction, machine):
    operation, kind = instruction.words[1:]
    to, source, _ = instruction.operands
    read, write = reader(source, kind, machine), writer(to, kind, machine)
    mask = member_mask(instruction, machine)
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[operation]  # fmt: skip

    def run(lanes):
        ids = machine.ids(lanes)
        values = np.broadcast_to(read(lanes), ids.shape)
        count, row = _group(machine, lanes, mask)
        order = np.argsort(row, kind="stable")
        starts = np.searchsorted(row[order], np.arange(count))
        write(lanes, function.reduceat(values[order], starts, dtype=values.dtype)[row])

    return run


def _rows(machine, place, lanes, count):
    """The lanes 0 to 8 * count - 1 of each warp, and the matrices' rows' addresses, which they hold."""
    ids = machine.ids(lanes).reshape(-1, _WARP)[:, : 8 * count].ravel()
    addresses = place(lanes).reshape(-1, _WARP)[:, : 8 * count].ravel()
    return ids, addresses


def _matrices(instruction, registers) -> tuple[int, bool]:
    """How many matrices of 8 x 8 an instruction moves, and whether transposed."""
    count = int(next(word for word in instruction.words if word in ("x1", "x2", "x4"))[1:])
    if len(registers.parts) != count:
        raise PtxError(f"{len(registers.parts)} registers for {count} matrices")
    return count, "trans" in instruction.words


# Of each lane: where the lower half of its register stands in a matrix; the upper one stands right of it.
_ROW, _COLUMN = np.arange(_WARP) // 4, np.arange(_WARP) % 4 * 2


@maker("ldmatrix")
def _load_matrices(instruction, machine):
    to, place = instruction.operands
    count, transposed = _matrices(instruction, to)
    place = address(place, machine)
    writes = [writer(part, "b32", machine) for part in to.parts]

    def run(lanes):
        ids, addresses = _rows(machine, place, lanes, count)
        halves = machine.shared.load(addresses, 8, 2, ids, machine)
        values = np.stack(halves, 1).view(np.uint16).reshape(-1, count, 8, 8).astype(np.uint32)
        if transposed:
            values = values.swapaxes(2, 3)
        for i, write in enumerate(writes):
            matrix = values[:, i]
            write(lanes, (matrix[:, _ROW, _COLUMN] | matrix[:, _ROW, _COLUMN + 1] << np.uint32(16)).ravel())

    return run


@maker("stmatrix")
def _store_matrices(instruction, machine):
    place, source = instruction.operands
    count, transposed = _matrices(instruction, source)
    place = address(place, machine)
    reads = [reader(part, "b32", machine) for part in source.parts]

    def run(lanes):
        ids, addresses = _rows(machine, place, lanes, count)
        values = np.zeros((machine.size(lanes) // _WARP, count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            register = read(lanes).reshape(-1, _WARP)
            values[:, i, _ROW, _COLUMN] = register.astype(np.uint16)
            values[:, i, _ROW, _COLUMN + 1] = (register >> np.uint32(16)).astype(np.uint16)
        if transposed:
            values = values.swapaxes(2, 3)
        halves = np.ascontiguousarray(values).view(np.uint64).reshape(-1, 2)
        machine.shared.store(addresses, [halves[:, 0], halves[:, 1]], 8, ids, machine)

    return run


class Copies:
    """cp.async: what was asked for lands when its group is waited for."""

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.lanes, np.int32)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, ids, at, values) -> None:
        self.pending.append((ids, at, values, self.committed[ids].copy()))

    def wait(self, ids, groups_left: int) -> None:
        """Copies of all but the last ``groups_left`` groups of these threads land."""
        asked = np.zeros(self.machine.lanes, bool)
        asked[ids] = True
        left = []
        for who, at, values, group in self.pending:
            lands = asked[who] & (group < self.committed[who] - groups_left)
            if lands.any():
                words = list(values[lands].view(np.uint32).T)
                self.machine.shared.put(at[lands], words, 4, who[lands], self.machine)
            if not lands.all():
                left.append((who[~lands], at[~lands], values[~lands], group[~lands]))
        self.pending = left

    def check_finished(self) -> None:
        if self.pending:
            raise PtxError("a kernel ended before its asynchronous copies were waited for")


@maker("cp")
def _copy_async(instruction, machine):
    words = instruction.words
    if words[1] == "commit_group":

        def run(lanes):
            machine.copies.committed[lanes] += 1

        return run
    if words[1] in ("wait_group", "wait_all"):
        groups = instruction.operands[0].value if words[1] == "wait_group" else -1

        def run(lanes):
            machine.copies.wait(machine.ids(lanes), groups)

        return run
    to, source, size, *rest = instruction.operands
    if "cache_hint" in words:
        rest = rest[:-1]
    to, source = address(to, machine), address(source, machine)
    size = size.value
    if size != 16 and (words[1] == "cg" or size not in (4, 8)):
        raise PtxError(f"copies of {size} bytes")
    ignored = bool(rest) and isinstance(rest[0], Register) and rest[0].bits == 1
    given = reader(rest[0] if rest else Integer(size), "pred" if ignored else "b32", machine)

    def run(lanes):
        ids, to_address, from_address = machine.ids(lanes), to(lanes), source(lanes)
        filled = given(lanes)
        filled = np.broadcast_to(np.where(filled, 0, size) if ignored else filled, ids.shape).astype(np.int64)
        if (filled > size).any():
            raise PtxError(f"an asynchronous copy of {size} bytes is to read {filled.max()}")
        at = machine.shared.locate(to_address, size, 1, ids, machine)
        machine.count(machine.shared, to_address, size, ids, "store")
        if (from_address % np.uint64(size)).any():
            raise PtxError(f"an asynchronous copy reads from an address that is not aligned to {size} bytes")
        values, reads = np.zeros((len(ids), size), np.uint8), filled > 0
        machine.count(machine.memory, from_address[reads], size, ids[reads], "load")
        for count in np.unique(filled[filled > 0]):
            chosen = filled == count
            first = machine.memory.place(from_address[chosen], int(count), ids[chosen], machine)
            machine.memory.note_read(first, int(count), ids[chosen], machine)
            values[chosen, :count] = machine.memory.bytes[first[:, None] + np.arange(count)]
        # It may land at once, so nobody may still read what was there; until it has landed nobody knows what is there.
        machine.shared.note_write(at, size, ids, machine, np.ones((len(at), 1), bool))
        machine.shared.bytes[at[:, None] + np.arange(size)] = 0xFF
        machine.copies.add(ids, at, values)

    return run
