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


class Races:
    """Who wrote and read every byte last, to notice accesses that no barrier orders (as racecheck does).

    Two threads' accesses to one byte, one of them a write, are ordered by a block's barrier, within a warp by a
    warp's; between blocks by nothing.
    """

    def __init__(self, size: int, what: str):
        self.what = what
        self.writer, self.reader = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        # How many barriers of its block, and of its warp, the thread had passed.
        self.written, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.written_warp, self.read_warp = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.shared_by_warps = np.zeros(
            size, bool
        )  # more than one warp read it since its block's last barrier

    def forget(self) -> None:
        self.writer[:] = self.reader[:] = -1
        self.shared_by_warps[:] = False

    def _unordered(self, other, epoch, warp_epoch, machine, lanes):
        block, warp = machine.block[lanes], machine.warp[lanes]
        same_block = machine.block[other] == block
        same_warp = machine.warp[other] == warp
        late = epoch == machine.epoch[block]
        late_warp = warp_epoch == machine.warp_epoch[warp]
        hazard = np.where(same_block, late & (~same_warp | late_warp), True)
        return (other >= 0) & (other != lanes) & hazard

    def on_read(self, at, lanes, machine) -> None:
        writer = self.writer[at]
        bad = self._unordered(writer, self.written[at], self.written_warp[at], machine, lanes)
        if bad.any():
            i = bad.argmax()
            raise PtxError(
                f"race in {self.what}: thread {machine.name(lanes[i])} reads what thread "
                f"{machine.name(writer[i])} wrote without a barrier between them"
            )
        block = machine.block[lanes]
        before = self.reader[at]
        again = (before >= 0) & (machine.block[before] == block) & (self.read[at] == machine.epoch[block])
        self.shared_by_warps[at] = again & (
            self.shared_by_warps[at] | (machine.warp[before] != machine.warp[lanes])
        )
        self.reader[at], self.read[at] = lanes, machine.epoch[block]
        self.read_warp[at] = machine.warp_epoch[machine.warp[lanes]]

    def on_write(self, at, lanes, machine, changed) -> None:
        for last, epoch, warp_epoch, verb in (
            (self.writer[at], self.written[at], self.written_warp[at], "wrote"),
            (self.reader[at], self.read[at], self.read_warp[at], "read"),
        ):
            bad = self._unordered(last, epoch, warp_epoch, machine, lanes)
            if verb == "read":
                block = machine.block[lanes]
                bad |= (last >= 0) & self.shared_by_warps[at] & (epoch == machine.epoch[block])
            bad &= changed  # the same value again does no harm
            if bad.any():
                i = bad.argmax()
                raise PtxError(
                    f"race in {self.what}: thread {machine.name(lanes[i])} writes what thread "
                    f"{machine.name(last[i])} {verb} without a barrier between them"
                )
        self.writer[at], self.written[at] = lanes, machine.epoch[machine.block[lanes]]
        self.written_warp[at] = machine.warp_epoch[machine.warp[lanes]]


class Memory:
    """Bytes under addresses; reads and writes of vectors of equal size by many threads at once."""

    def __init__(self, size: int, what: str, races: bool):
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.what = what
        self.races = Races(len(self.bytes), what) if races else None
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

    def load(self, addresses, size: int, count: int, lanes, machine) -> list[np.ndarray]:
        at = self.locate(addresses, size, count, lanes, machine)
        machine.count(self, addresses, size * count, lanes, "load")
        if self.races:
            each = (at[:, None] + np.arange(size * count)).ravel()
            self.races.on_read(each, np.repeat(lanes, size * count), machine)
        view, first = self._views[size], at // size
        return [view[first + i] for i in range(count)]

    def store(self, addresses, values: list[np.ndarray], size: int, lanes, machine) -> None:
        at = self.locate(addresses, size, len(values), lanes, machine)
        machine.count(self, addresses, size * len(values), lanes, "store")
        self.put(at, values, size, lanes, machine)

    def put(self, at, values: list[np.ndarray], size: int, lanes, machine) -> None:
        view, first = self._views[size], at // size
        if self.races:
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
        super().__init__(at, "global memory", races)
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
            inside &= addresses + np.uint64(size) <= self.ends[found]
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

    def place(self, addresses, size, lanes, machine):
        addresses = addresses.astype(np.int64, copy=False)
        outside = addresses + size > self.size
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
