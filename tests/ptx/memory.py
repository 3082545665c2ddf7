"""Memory that the machine's threads share, and what they may not do with it.

Addresses of global memory are those of the host's tensors. A kernel sees the regions it was given and nothing else;
they are copied in before a launch and back after it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from tests.ptx.errors import PtxError

_GAP = 64


@dataclass(frozen=True)
class Region:
    """Host memory that a kernel may touch."""

    address: int
    size: int


class _Accesses:
    """Of every byte, who accessed it in one way: the least and the greatest thread since the last barrier.

    Two threads, the least and the greatest, are enough to tell whether anybody else than a given thread (or warp, or
    block) is among them.
    """

    def __init__(self, size: int, between_blocks: bool):
        self.size, self.between_blocks = size, between_blocks
        if between_blocks:  # grid-wide numbers plus one, never forgotten
            self.first_block, self.last_block = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.forget()

    def forget(self) -> None:
        # Threads plus one, of one block; those of its warp since the warp's last barrier. Zeros take no memory.
        self.first, self.last = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        self.first_in_warp, self.last_in_warp = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        self.epoch, self.warp_epoch = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)

    def _recent(self, at, lanes, machine):
        first, last, block = self.first[at] - 1, self.last[at] - 1, machine.block[lanes]
        recent = (first >= 0) & (machine.block[last] == block) & (self.epoch[at] == machine.epoch[block])
        warp = machine.warp[lanes]
        same_warp = (machine.warp[first] == warp) & (machine.warp[last] == warp)
        in_warp = recent & (machine.warp[self.last_in_warp[at] - 1] == warp)
        in_warp &= self.warp_epoch[at] == machine.warp_epoch[warp]
        return first, last, recent, same_warp, in_warp

    def others(self, at, lanes, machine):
        """Where accesses by others are unordered with one by ``lanes`` now, and a description of the other."""
        first, last, recent, same_warp, in_warp = self._recent(at, lanes, machine)
        first_in_warp, last_in_warp = self.first_in_warp[at] - 1, self.last_in_warp[at] - 1
        bad = recent & ~same_warp
        bad |= in_warp & same_warp & ((first_in_warp != lanes) | (last_in_warp != lanes))

        def describe(i):
            if in_warp[i] and same_warp[i]:
                return f"thread {machine.name(first_in_warp[i] if first_in_warp[i] != lanes[i] else last_in_warp[i])}"
            if recent[i] and not same_warp[i]:
                away = machine.warp[first[i]] != machine.warp[lanes[i]]
                return f"thread {machine.name(first[i] if away else last[i])}"
            first_block, last_block = self.first_block[at[i]] - 1, self.last_block[at[i]] - 1
            away = first_block != machine.first + machine.block[lanes[i]]
            return f"block {first_block if away else last_block}"

        if self.between_blocks:
            block = machine.first + machine.block[lanes] + 1
            before = self.first_block[at]
            bad |= (before > 0) & ((before != block) | (self.last_block[at] != block))
        return bad, describe

    def record(self, at, lanes, machine) -> None:
        first, last, recent, _, in_warp = self._recent(at, lanes, machine)
        # Of several threads at one byte the last assignment stays: threads ascend, so backwards it is the least.
        self.first[at[::-1]] = np.where(recent, np.minimum(first, lanes), lanes)[::-1] + 1
        self.last[at] = np.where(recent, np.maximum(last, lanes), lanes) + 1
        low = np.where(in_warp, np.minimum(self.first_in_warp[at] - 1, lanes), lanes)
        high = np.where(in_warp, np.maximum(self.last_in_warp[at] - 1, lanes), lanes)
        self.first_in_warp[at[::-1]], self.last_in_warp[at] = low[::-1] + 1, high + 1
        self.epoch[at] = machine.epoch[machine.block[lanes]]
        self.warp_epoch[at] = machine.warp_epoch[machine.warp[lanes]]
        if self.between_blocks:
            block = machine.first + machine.block[lanes] + 1
            before = self.first_block[at]
            self.first_block[at[::-1]] = np.where(before > 0, np.minimum(before, block), block)[::-1]
            self.last_block[at] = np.maximum(self.last_block[at], block)


class Races:
    """Notices accesses that no barrier orders (as compute-sanitizer's racecheck does, and for global memory too).

    Two threads' accesses to one byte, one of them a write, are ordered by a block's barrier, within a warp by a
    warp's of all its threads; between blocks by nothing. Atomic accesses may meet each other, and nothing is ordered
    by them: a kernel whose blocks hand over data through a counter is reported. Writes that change nothing are not.
    """

    def __init__(self, size: int, what: str, between_blocks: bool):
        self.what = what
        self._new = lambda: _Accesses(size, between_blocks)
        self._by = {}

    def forget(self) -> None:
        for accesses in self._by.values():
            accesses.forget()

    def _check(self, at, lanes, machine, verb, conflicts, only=None) -> None:
        for done in conflicts:
            if done not in self._by:
                continue
            bad, describe = self._by[done].others(at, lanes, machine)
            if only is not None:
                bad &= only
            if bad.any():
                i = int(bad.argmax())
                raise PtxError(
                    f"race in {self.what}: thread {machine.name(lanes[i])} {verb} what {describe(i)} {done} "
                    "without a barrier between them"
                )

    def _record(self, at, lanes, machine, done) -> None:
        if done not in self._by:
            self._by[done] = self._new()
        self._by[done].record(at, lanes, machine)

    def on_read(self, at, lanes, machine) -> None:
        self._check(at, lanes, machine, "reads", ("wrote", "changed atomically"))
        self._record(at, lanes, machine, "read")

    def on_write(self, at, lanes, machine, changed) -> None:
        self._check(
            at, lanes, machine, "writes", ("wrote", "read", "changed atomically", "read atomically"), changed
        )
        self._record(at, lanes, machine, "wrote")

    def on_strong_read(self, at, lanes, machine) -> None:
        self._check(at, lanes, machine, "reads atomically", ("wrote",))
        self._record(at, lanes, machine, "read atomically")

    def on_atomic(self, at, lanes, machine) -> None:
        self._check(at, lanes, machine, "changes atomically", ("wrote", "read"))
        self._record(at, lanes, machine, "changed atomically")


class Memory:
    """Bytes under addresses; reads and writes of vectors of equal size by many threads at once."""

    def __init__(self, size: int, what: str, races: bool, between_blocks: bool = False):
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.what = what
        self.races = Races(len(self.bytes), what, between_blocks) if races else None
        self._views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}

    def place(self, addresses, size: int, lanes, machine) -> np.ndarray:
        """Indices of bytes for addresses, all of which must be allowed."""
        raise NotImplementedError

    def _aligned(self, at, addresses, size, lanes, machine):
        if (addresses % size).any():
            i = (addresses % size != 0).argmax()
            raise PtxError(
                f"thread {machine.name(lanes[i])}: address {int(addresses[i]):#x} in {self.what} is not aligned to "
                f"{size} bytes"
            )
        return at

    def locate(self, addresses, size: int, count: int, lanes, machine) -> np.ndarray:
        """Checked indices of ``count`` consecutive values of ``size`` bytes: the first one's byte."""
        at = self.place(addresses, size * count, lanes, machine)
        return self._aligned(at, addresses, size * count, lanes, machine)

    def note_read(self, at, size: int, lanes, machine, strong=False) -> None:
        """For races; ``size`` bytes from each index."""
        if self.races:
            each = (at[:, None] + np.arange(size)).ravel()
            note = self.races.on_strong_read if strong else self.races.on_read
            note(each, np.repeat(lanes, size), machine)

    def note_atomic(self, at, size: int, lanes, machine) -> None:
        if self.races:
            each = (at[:, None] + np.arange(size)).ravel()
            self.races.on_atomic(each, np.repeat(lanes, size), machine)

    def load(self, addresses, size: int, count: int, lanes, machine, strong=False) -> list[np.ndarray]:
        at = self.locate(addresses, size, count, lanes, machine)
        machine.count(self, addresses, size * count, lanes, "load")
        self.note_read(at, size * count, lanes, machine, strong)
        view, first = self._views[size], at // size
        return [view[first + i] for i in range(count)]

    def store(self, addresses, values: list[np.ndarray], size: int, lanes, machine, strong=False) -> None:
        at = self.locate(addresses, size, len(values), lanes, machine)
        machine.count(self, addresses, size * len(values), lanes, "store")
        self.put(at, values, size, lanes, machine, strong)

    def put(self, at, values: list[np.ndarray], size: int, lanes, machine, strong=False) -> None:
        view, first = self._views[size], at // size
        if strong:
            self.note_atomic(at, size * len(values), lanes, machine)
        elif self.races:
            each = (at[:, None] + np.arange(size * len(values))).ravel()
            changed = np.stack([view[first + i] != value for i, value in enumerate(values)], 1)
            who = np.repeat(lanes, size * len(values))
            self.races.on_write(each, who, machine, np.repeat(changed.ravel(), size))
        for i, value in enumerate(values):
            view[first + i] = value
        if any((view[first + i] != value).any() for i, value in enumerate(values)):
            raise PtxError(f"threads write different values to one address of {self.what}")


class Global(Memory):
    def __init__(self, regions: list[Region], races: bool = False):
        self.regions = _joined(regions)
        self.starts = np.array([r.address for r in self.regions], np.uint64)
        self.ends = np.array([r.address + r.size for r in self.regions], np.uint64)
        # Each region keeps its address modulo 16, so that a view's alignment is the address's.
        offsets, at = [], _GAP
        for region in self.regions:
            offsets.append(at + region.address % 16)
            at = -(-(offsets[-1] + region.size + _GAP) // 16) * 16
        self.offsets = np.array(offsets, np.int64)
        super().__init__(at, "global memory", races, between_blocks=True)
        for region, offset in zip(self.regions, offsets):
            self.bytes[offset : offset + region.size] = _host(region)

    def forget_accesses(self) -> None:
        """Other blocks come; their threads have the numbers of those before."""
        if self.races:
            self.races.forget()

    def write_back(self) -> None:
        for region, offset in zip(self.regions, self.offsets):
            _host(region)[:] = self.bytes[offset : offset + region.size]

    def place(self, addresses, size, lanes, machine):
        addresses = addresses.astype(np.uint64, copy=False)
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = found >= 0
        if len(self.regions):
            inside &= (addresses < self.ends[found]) & (self.ends[found] - addresses >= np.uint64(size))
        if not inside.all():
            i = (~inside).argmax()
            raise PtxError(
                f"thread {machine.name(lanes[i])}: {size} bytes at {int(addresses[i]):#x} lie outside of every tensor"
            )
        return (addresses - self.starts[found]).astype(np.int64) + self.offsets[found]


class Shared(Memory):
    """Every block's shared memory, poisoned with NaN."""

    def __init__(self, blocks: int, size: int, races: bool = False):
        self.size, self.blocks = size, blocks
        self.pitch = -(-max(size, 1) // 16) * 16
        super().__init__(blocks * self.pitch, "shared memory", races)
        self.bytes[:] = 0xFF
        # Who wrote each byte, and how many fences of the proxy it had passed: what tensor cores read must be fenced.
        self.proxy: tuple[np.ndarray, np.ndarray] | None = None

    def watch_proxy(self) -> None:
        if self.proxy is None:
            self.proxy = np.full(len(self.bytes), -1, np.int32), np.zeros(len(self.bytes), np.int32)

    def put(self, at, values, size, lanes, machine, strong=False) -> None:
        super().put(at, values, size, lanes, machine, strong)
        if self.proxy:
            each = (at[:, None] + np.arange(size * len(values))).ravel()
            who = np.repeat(lanes, size * len(values))
            self.proxy[0][each], self.proxy[1][each] = who, machine.fences[who]

    def check_fenced(self, at, machine) -> None:
        """Bytes that tensor cores read through the asynchronous proxy."""
        writer, fences = self.proxy[0][at], self.proxy[1][at]
        bad = (writer >= 0) & (machine.fences[writer] == fences)
        if bad.any():
            raise PtxError(
                f"tensor cores read what thread {machine.name(writer[bad].ravel()[0])} wrote to shared memory "
                "without a fence.proxy.async after it"
            )

    def place(self, addresses, size, lanes, machine):
        addresses = addresses.astype(np.int64, copy=False)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            i = outside.argmax()
            raise PtxError(
                f"thread {machine.name(lanes[i])}: {size} bytes at {int(addresses[i]):#x} lie outside of the block's "
                f"{self.size} bytes of shared memory"
            )
        return addresses + machine.block[lanes].astype(np.int64) * self.pitch


def _host(region: Region) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.size).from_address(region.address))


def _joined(regions: list[Region]) -> list[Region]:
    """Without empty and overlapping ones."""
    out: list[Region] = []
    for region in sorted(regions, key=lambda r: r.address):
        if region.size == 0:
            continue
        if out and region.address < out[-1].address + out[-1].size:
            end = max(out[-1].address + out[-1].size, region.address + region.size)
            out[-1] = Region(out[-1].address, end - out[-1].address)
        else:
            out.append(region)
    return out
