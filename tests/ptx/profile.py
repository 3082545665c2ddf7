"""Counts what a kernel's warps issue and how its accesses fall on banks and sectors, by lines of its PTX.

What the counts are not: times, and not the GPU's own instructions. ptxas turns PTX into SASS: it drops moves, fuses
and unrolls, puts addresses into loads, spills registers, splits divisions and 64-bit integers into many instructions.
Compare variants of one kernel by them, and look for accesses that conflict; nothing here knows of latency, occupancy,
caches, or of how instructions overlap.

- Issued: once for each warp that executes an instruction with at least one of its threads, a divergent warp's parts
  apart. A warp whose guard holds for no thread counts too, as it does on the GPU.
- Wavefronts of shared memory: 32 banks of 4 bytes; the threads of a group (a warp for up to 4 bytes, half of it for 8,
  a quarter for 16, as ldmatrix's 8 rows) take as many as there are different words in one bank; equal words are free,
  but for atomic changes, which take turns. The ideal is one for each group that accesses anything. What tensor cores
  read from shared memory themselves (wgmma) is not counted.
- Sectors of global memory: 32 bytes; those a warp's access touches, against the fewest that hold as many bytes.
  Bytes are those that threads ask for. Nothing is known of what a cache has.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

_WARP = 32
_NAMES = {
    "integer": "and or xor not shl shr bfe bfi shf lop3 popc brev bfind clz prmt rem",
    "compare and select": "setp selp min max abs neg copysign",
    "move": "mov cvta",
    "transcendental": "ex2 lg2 rcp rsqrt sqrt",
    "conversion": "cvt",
    "tensor core": "mma",
    "exchange": "shfl vote match redux elect",
    "barrier": "bar barrier",
    "fence": "fence membar nanosleep prefetch griddepcontrol",
    "control": "bra ret exit trap",
}
_ACCESS = {"ld": "load", "st": "store"}
_CLASS = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def kind_of(instruction) -> str:
    """The class that an instruction is counted in."""
    name, words = instruction.name, instruction.words
    if name in ("add", "sub", "mul", "mad", "fma", "div"):
        if words[-1][0] != "f":
            return "integer division" if name == "div" else "integer"
        return "division" if name == "div" else {"f64": "float64"}.get(words[-1], "float")
    if name == "rem":
        return "integer division"
    if name in ("ld", "st", "atom", "red"):
        space = next((word for word in words if word in ("shared", "param")), "global")
        return f"{space} {_ACCESS.get(name, 'atomic')}"
    if name in ("ldmatrix", "stmatrix"):
        return "matrix load" if name == "ldmatrix" else "matrix store"
    if name == "cp":
        return "asynchronous copy" if "global" in words else "barrier"
    if name == "wgmma":
        return "tensor core" if words[0] == "mma_async" else "barrier"
    return _CLASS[name]


def flops_of(instruction) -> int:
    """Of one warp's part of a product on tensor cores."""
    for word in instruction.words if instruction.name in ("mma", "wgmma") else ():
        if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", word):
            m, n, k = map(int, found.groups())
            return 2 * m * n * k // (4 if instruction.name == "wgmma" else 1)
    return 0


@dataclass
class Counts:
    """Of one line, one class or all; ``sectors`` and ``bytes`` are of global memory."""

    text: str = ""
    kind: str = ""
    issued: int = 0
    flops: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    bytes: int = 0
    shared_bytes: int = 0

    def add(self, other: Counts) -> None:
        for name in list(self.__dict__)[2:]:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Profile:
    """Pass it as ``profile=`` to machine.launch; several launches add up."""

    def __init__(self):
        self.lines: dict[tuple[str, int], Counts] = defaultdict(Counts)  # by kernel and line

    # What the machine calls.

    def issue(self, machine, instruction, lanes) -> None:
        counts = self.lines[machine.program.name, instruction.line]
        if not counts.text:
            counts.text, counts.kind = instruction.text, kind_of(instruction)
        whole = isinstance(lanes, slice)
        warps = machine.lanes // _WARP if whole else len(np.unique(machine.warp[lanes]))
        counts.issued += warps
        counts.flops += warps * flops_of(instruction)

    def access(self, machine, memory, addresses, size, lanes, what) -> None:
        """``size`` bytes by each thread at ``addresses``; ``what`` is "load", "store" or "atomic"."""
        counts = self.lines[machine.program.name, machine.at.line]
        addresses = np.asarray(addresses).astype(np.int64)
        if memory is machine.shared:
            taken, ideal = wavefronts(addresses, size, lanes, apart=what == "atomic")
            counts.wavefronts += taken
            counts.ideal_wavefronts += ideal
            counts.shared_bytes += len(lanes) * size
        else:
            taken, ideal = sectors(addresses, size, machine.warp[lanes])
            counts.sectors += taken
            counts.ideal_sectors += ideal
            counts.bytes += len(lanes) * size

    # What a reader asks for.

    def by_class(self) -> dict[str, Counts]:
        out: dict[str, Counts] = defaultdict(Counts)
        for counts in self.lines.values():
            out[counts.kind].add(counts)
        return dict(out)

    def total(self) -> Counts:
        total = Counts()
        for counts in self.lines.values():
            total.add(counts)
        return total

    def worst(self, what: str = "conflicts", count: int = 10) -> list[tuple[str, int, Counts]]:
        """(kernel, line, counts) of the lines with the most of ``what``: "conflicts" (wavefronts beyond the ideal),
        "sectors" (beyond the ideal) or "issued"."""
        excess = {
            "conflicts": lambda c: c.wavefronts - c.ideal_wavefronts,
            "sectors": lambda c: c.sectors - c.ideal_sectors,
            "issued": lambda c: c.issued,
        }[what]
        rows = sorted(self.lines.items(), key=lambda item: -excess(item[1]))
        return [(*key, counts) for key, counts in rows[:count] if excess(counts) > 0]

    def table(self, count: int = 10) -> None:
        """Prints the classes, and the worst lines of each sort."""
        classes = sorted(self.by_class().items(), key=lambda item: -item[1].issued)
        print(
            f"{'class':20}{'issued':>12}{'wavefronts':>12}{'ideal':>12}{'sectors':>12}{'ideal':>12}{'bytes':>14}"
        )
        for name, c in [*classes, ("all", self.total())]:
            print(
                f"{name:20}{c.issued:12,}{c.wavefronts:12,}{c.ideal_wavefronts:12,}{c.sectors:12,}{c.ideal_sectors:12,}"
                f"{c.bytes:14,}"
            )
        print(f"tensor cores: {self.total().flops:,} floating-point operations")
        for what, of, ideal in (
            ("conflicts", "wavefronts", "ideal_wavefronts"),
            ("sectors", "sectors", "ideal_sectors"),
        ):
            for kernel, line, c in self.worst(what, count):
                print(
                    f"{kernel}:{line}: {getattr(c, of):,} {of}, ideally {getattr(c, ideal):,}, "
                    f"in {c.issued:,} issues: {c.text}"
                )


class ByProgram:
    """In the place of a Profile: one for each compiled kernel, as several variants can share a name."""

    def __init__(self):
        self._profiles: dict[int, tuple] = {}

    def _of(self, machine) -> Profile:
        return self._profiles.setdefault(id(machine.program), (machine.program, Profile()))[1]

    def issue(self, machine, instruction, lanes) -> None:
        self._of(machine).issue(machine, instruction, lanes)

    def access(self, machine, *arguments) -> None:
        self._of(machine).access(machine, *arguments)

    def profiles(self) -> list[tuple]:
        """(program, profile) in the order of their first instructions."""
        return list(self._profiles.values())


def wavefronts(addresses, size: int, lanes, apart: bool = False) -> tuple[int, int]:
    """Of accesses to shared memory, all groups together: how many, and the ideal. ``apart``: equal words take turns."""
    group = lanes // min(_WARP, max(1, 4 * _WARP // size))
    words = addresses[:, None] // 4 + np.arange(max(1, size // 4))
    rows = np.stack([np.broadcast_to(group[:, None], words.shape).ravel(), words.ravel()], 1)
    if not apart:
        rows = np.unique(rows, axis=0)
    banks, most = np.unique(rows[:, 0] * _WARP + rows[:, 1] % _WARP, return_counts=True)
    groups, first = np.unique(banks // _WARP, return_index=True)
    if not len(groups):
        return 0, 0
    return int(np.maximum.reduceat(most, first).sum()), len(groups)


def sectors(addresses, size: int, warps) -> tuple[int, int]:
    """Of one access by each thread to global memory: the sectors that warps touch, and the fewest."""
    touched = np.unique(np.stack([warps, addresses // 32], 1), axis=0)
    pieces = np.unique(np.stack([warps, addresses // size], 1), axis=0)
    _, count = np.unique(pieces[:, 0], return_counts=True)
    return len(touched), int((-(-count * size // 32)).sum())
