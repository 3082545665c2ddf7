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


class _Now:
    """Threads that access something, one for each place, and which barriers they have passed."""

    def __init__(self, lanes, machine):
        self.lanes, self.name = lanes, machine.name
        self.blocks, self.warps = machine.block, machine.warp  # of every thread
        self.block, self.warp = machine.block[lanes], machine.warp[lanes]
        self.epoch, self.warp_epoch = machine.epoch[self.block] + 1, machine.warp_epoch[self.warp]
        self.grid_block = machine.first + self.block + 1


class _Accesses:
    """Of every place, who accessed it in one way: the least and the greatest thread since the last barrier.

    Two threads, the least and the greatest, are enough to tell whether anybody else than a given thread (or warp, or
    block) is among them.
    """

    def __init__(self, size: int, between_blocks: bool):
        self.size, self.between_blocks = size, between_blocks
        if between_blocks:  # grid-wide numbers plus one, never forgotten
            self.first_block, self.last_block = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.forget()

    def forget(self) -> None:
        # Threads plus one, of one block; those of its warp since the warp's last barrier. Where the epoch, the block's
        # barriers plus one, is zero nobody was. Zeros take no memory.
        self.first, self.last = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        self.first_in_warp, self.last_in_warp = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        self.epoch, self.warp_epoch = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)

    def _recent(self, at, now):
        """Where the last accesses are those of this thread's block since its last barrier; None: nowhere."""
        recent = self.epoch[at] == now.epoch
        if not recent.any():
            return None
        first, last = self.first[at] - 1, self.last[at] - 1
        recent &= now.blocks[last] == now.block
        same_warp = (now.warps[first] == now.warp) & (now.warps[last] == now.warp)
        in_warp = recent & (now.warps[self.last_in_warp[at] - 1] == now.warp)
        in_warp &= self.warp_epoch[at] == now.warp_epoch
        return first, last, recent, same_warp, in_warp

    def others(self, at, now):
        """Where accesses by others are unordered with one ``now``, and a description of the other; None: nowhere."""
        lanes, among, bad = now.lanes, self._recent(at, now), None
        if among is not None:
            first, last, recent, same_warp, in_warp = among
            first_in_warp, last_in_warp = self.first_in_warp[at] - 1, self.last_in_warp[at] - 1
            in_warp &= same_warp & ((first_in_warp != lanes) | (last_in_warp != lanes))
            recent &= ~same_warp
            bad = recent | in_warp
        if self.between_blocks:
            before = self.first_block[at]
            elsewhere = (before > 0) & ((before != now.grid_block) | (self.last_block[at] != now.grid_block))
            bad = elsewhere if bad is None else bad | elsewhere
        if bad is None:
            return None

        def describe(i):
            if among is not None and in_warp[i]:
                other = first_in_warp[i] if first_in_warp[i] != lanes[i] else last_in_warp[i]
                return f"thread {now.name(other)}"
            if among is not None and recent[i]:
                away = now.warps[first[i]] != now.warp[i]
                return f"thread {now.name(first[i] if away else last[i])}"
            first_block, last_block = self.first_block[at[i]], self.last_block[at[i]]
            return f"block {(first_block if first_block != now.grid_block[i] else last_block) - 1}"

        return bad, describe

    def record(self, at, now) -> None:
        lanes, among = now.lanes, self._recent(at, now)
        low = high = low_in_warp = high_in_warp = lanes
        if among is not None:
            first, last, recent, _, in_warp = among
            low = np.where(recent, np.minimum(first, lanes), lanes)
            high = np.where(recent, np.maximum(last, lanes), lanes)
            low_in_warp = np.where(in_warp, np.minimum(self.first_in_warp[at] - 1, lanes), lanes)
            high_in_warp = np.where(in_warp, np.maximum(self.last_in_warp[at] - 1, lanes), lanes)
        # Of several threads at one place the last assignment stays: threads ascend, so backwards it is the least.
        self.first[at[::-1]], self.last[at] = low[::-1] + 1, high + 1
        self.first_in_warp[at[::-1]], self.last_in_warp[at] = low_in_warp[::-1] + 1, high_in_warp + 1
        self.epoch[at], self.warp_epoch[at] = now.epoch, now.warp_epoch
        if self.between_blocks:
            block, before = now.grid_block, self.first_block[at]
            self.first_block[at[::-1]] = np.where(before > 0, np.minimum(before, block), block)[::-1]
            self.last_block[at] = np.maximum(self.last_block[at], block)


class Races:
    """Notices accesses that no barrier orders (as compute-sanitizer's racecheck does, and for global memory too).

    Two threads' accesses to one place, one of them a write, are ordered by a block's barrier, within a warp by a
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

    def _note(self, at, lanes, machine, verb, done, conflicts, only=None) -> None:
        now = _Now(lanes, machine)
        for before in conflicts:
            found = self._by[before].others(at, now) if before in self._by else None
            if found is None:
                continue
            bad, describe = found
            if only is not None:
                bad = bad & only
            if bad.any():
                i = int(bad.argmax())
                raise PtxError(
                    f"race in {self.what}: thread {machine.name(lanes[i])} {verb} what {describe(i)} {before} "
                    "without a barrier between them"
                )
        if done not in self._by:
            self._by[done] = self._new()
        self._by[done].record(at, now)

    def on_read(self, at, lanes, machine) -> None:
        self._note(at, lanes, machine, "reads", "read", ("wrote", "changed atomically"))

    def on_write(self, at, lanes, machine, changed) -> None:
        before = ("wrote", "read", "changed atomically", "read atomically")
        self._note(at, lanes, machine, "writes", "wrote", before, changed)

    def on_strong_read(self, at, lanes, machine) -> None:
        self._note(at, lanes, machine, "reads atomically", "read atomically", ("wrote",))

    def on_atomic(self, at, lanes, machine) -> None:
        self._note(at, lanes, machine, "changes atomically", "changed atomically", ("wrote", "read"))


class Memory:
    """Bytes under addresses; reads and writes of vectors of equal size by many threads at once.

    ``unit``: a power of two, at most 16, of bytes that a program always accesses together, as every access is aligned
    to its size. Who accessed what is kept by these.
    """

    def __init__(self, size: int, what: str, unit: int, races: bool, between_blocks: bool = False):
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.what, self.unit = what, unit
        self.races = Races(len(self.bytes) // unit, what, between_blocks) if races else None
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

    def _units(self, at, size: int, lanes):
        """The units that accesses of ``size`` bytes touch, and the thread of each."""
        first, count = at // self.unit, -(-size // self.unit)
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(lanes, count)

    def note_read(self, at, size: int, lanes, machine, strong=False) -> None:
        """For races; ``size`` bytes from each index."""
        if self.races:
            note = self.races.on_strong_read if strong else self.races.on_read
            note(*self._units(at, size, lanes), machine)

    def note_atomic(self, at, size: int, lanes, machine) -> None:
        if self.races:
            self.races.on_atomic(*self._units(at, size, lanes), machine)

    def note_write(self, at, size: int, lanes, machine, changed) -> None:
        """``changed``: whether the bytes will be others, (accesses, parts of equal size)."""
        if self.races:
            units, parts = size // self.unit, changed.shape[1]
            if parts > units:
                changed = changed.reshape(-1, units, parts // units).any(2)
            else:
                changed = np.repeat(changed, units // parts, axis=1)
            self.races.on_write(*self._units(at, size, lanes), machine, changed.ravel())

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
            changed = np.stack([view[first + i] != value for i, value in enumerate(values)], 1)
            self.note_write(at, size * len(values), lanes, machine, changed)
        for i, value in enumerate(values):
            view[first + i] = value
        if any((view[first + i] != value).any() for i, value in enumerate(values)):
            raise PtxError(f"threads write different values to one address of {self.what}")


class Global(Memory):
    def __init__(self, regions: list[Region], unit: int = 1, races: bool = False):
        self.regions = _joined(regions)
        self.starts = np.array([r.address for r in self.regions], np.uint64)
        self.ends = np.array([r.address + r.size for r in self.regions], np.uint64)
        # Each region keeps its address modulo 16, so that a view's alignment is the address's.
        offsets, at = [], _GAP
        for region in self.regions:
            offsets.append(at + region.address % 16)
            at = -(-(offsets[-1] + region.size + _GAP) // 16) * 16
        self.offsets = np.array(offsets, np.int64)
        super().__init__(at, "global memory", unit, races, between_blocks=True)
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

    def __init__(self, blocks: int, size: int, unit: int = 1, races: bool = False):
        self.size, self.blocks = size, blocks
        self.pitch = -(-max(size, 1) // 16) * 16
        super().__init__(blocks * self.pitch, "shared memory", unit, races)
        self.bytes[:] = 0xFF
        # Who wrote each unit, and how many fences of the proxy it had passed: what tensor cores read must be fenced.
        self.proxy: tuple[np.ndarray, np.ndarray] | None = None

    def watch_proxy(self) -> None:
        if self.proxy is None:
            units = len(self.bytes) // self.unit
            self.proxy = np.full(units, -1, np.int32), np.zeros(units, np.int32)

    def put(self, at, values, size, lanes, machine, strong=False) -> None:
        super().put(at, values, size, lanes, machine, strong)
        if self.proxy:
            units, who = self._units(at, size * len(values), lanes)
            self.proxy[0][units], self.proxy[1][units] = who, machine.fences[who]

    def check_fenced(self, units, machine) -> None:
        """What tensor cores read through the asynchronous proxy."""
        writer, fences = self.proxy[0][units], self.proxy[1][units]
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
