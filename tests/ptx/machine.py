"""Executes a kernel's PTX for all threads at once, as vectors of numpy: tests of compiled kernels without a GPU.

Threads that stand at one instruction run it together, those furthest behind first. Reported as errors: accesses
outside of the tensors a kernel was given or of its shared memory, misaligned ones, races in shared and global memory
(on request), warp operations that not all named lanes reach, barriers that not all threads reach. Asynchronous copies
and products of warpgroups land when they are waited for, their places NaN until then; shared memory and registers
start as NaN; tensor cores cut sums off (tensor_cores.py). Instructions and modifiers that are unknown are errors, never
skipped (forms.py).

It says nothing of speed, beyond counts of instructions, bank conflicts and sectors (profile.py). What it does not see:
orders of threads other than its own, but for races; the order that atomic operations and fences give to other memory;
a missing wgmma.fence; what ptxas makes of the PTX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx import accesses, arithmetic, bit_fields, forms, moves, operands, tensor_cores, warp
from tests.ptx.errors import PtxError
from tests.ptx.memory import Global, Region, Shared
from tests.ptx.program import Not, Program, Register

FAMILIES = (
    accesses,
    arithmetic,
    bit_fields,
    moves,
    tensor_cores,
    warp,
)  # each adds its instructions to operands.MAKERS
WARP = 32
_RUNNING, _AT_BARRIER, _WAITING, _DONE = range(4)
_MOST_LANES = 8192
_MOST_ISSUES = 10_000_000  # of one machine, minutes: a loop that waits for what never comes has to end


class Machine:
    """``blocks`` of a grid, starting at ``first``, of ``threads`` each."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        parameters: bytes,
        memory: Global,
        shared_bytes: int,
        first: int,
        blocks: int,
        races: bool,
        profile=None,
        approximate: bool = False,
        fences: bool = True,
    ):
        if threads % WARP:
            raise PtxError(f"{threads} threads are no multiple of {WARP}")
        most = program.most_threads
        if most is not None and (threads > most or (program.exactly and threads != most)):
            raise PtxError(f"{program.name} is compiled for {most} threads, not {threads}")
        if len(parameters) < program.parameter_bytes:
            raise PtxError(
                f"{program.name} takes {program.parameter_bytes} bytes of parameters, not {len(parameters)}"
            )
        self.program, self.parameters, self.memory = program, parameters, memory
        self.grid, self.threads, self.blocks, self.profile = grid, threads, blocks, profile
        self.approximate, self.check_fences = approximate, fences
        self.lanes = blocks * threads
        self.all = slice(0, self.lanes)
        self.everyone = np.arange(self.lanes)
        self.block = (self.everyone // threads).astype(np.int32)
        self.warp = (self.everyone // WARP).astype(np.int32)
        self.first = first
        self.shared = Shared(
            blocks, program.shared_bytes(shared_bytes), accesses.unit(program, "shared"), races
        )
        self.epoch = np.zeros(blocks, np.int32)
        self.warp_epoch = np.zeros(self.lanes // WARP, np.int32)
        self._registers: dict[Register, np.ndarray] = {}
        self.fences = np.zeros(self.lanes, np.int32)  # of the asynchronous proxy
        self.copies, self.products = warp.Copies(self), tensor_cores.Products(self)
        self.state = np.full(self.lanes, _RUNNING, np.int8)
        self.pc = np.zeros(self.lanes, np.int32)
        self.issues = 0
        self.barrier = np.zeros(self.lanes, np.int32)  # which of the block's sixteen a thread waits at
        # All that a program says is looked at once, before it runs; for its next machines only what they execute.
        self._code = [None] * len(program.instructions)
        if not program.compiled_before:
            self._code = [self._compiled(instruction) for instruction in program.instructions]
            program.compiled_before = True
        self.together = [warp.together(instruction) for instruction in program.instructions]

    # What instructions ask for.

    def register(self, register: Register) -> np.ndarray:
        if register not in self._registers:
            if register.bits == 1:
                array = np.zeros(self.lanes, bool)
            else:  # not zeros: what is read before it was written should show
                array = np.full(
                    self.lanes, 0xFFFFFFFFFFFFFFFF >> (64 - register.bits), f"u{register.bits // 8}"
                )
            self._registers[register] = array
        return self._registers[register]

    def symbol(self, name: str):
        """A special register (per thread or constant), an offset in shared memory or among parameters."""
        if name in self.program.parameters:
            return self.program.parameters[name].offset
        if name in self.program.shared:
            return self.program.shared[name]
        index = self.first + self.block.astype(np.int64)
        x, y, _ = self.grid
        special = {
            "%tid.x": lambda: self.everyone % self.threads,
            "%ntid.x": lambda: self.threads,
            "%ctaid.x": lambda: index % x,
            "%ctaid.y": lambda: index // x % y,
            "%ctaid.z": lambda: index // (x * y),
            "%laneid": lambda: self.everyone % WARP,
            "%warpid": lambda: self.everyone % self.threads // WARP,
            **{f"%nctaid.{axis}": (lambda i=i: self.grid[i]) for i, axis in enumerate("xyz")},
            **{f"%tid.{axis}": (lambda: 0) for axis in "yz"},
            **{f"%ntid.{axis}": (lambda: 1) for axis in "yz"},
        }
        if name not in special:
            raise PtxError(f"unknown symbol {name}")
        return special[name]()

    def ids(self, lanes) -> np.ndarray:
        return self.everyone if isinstance(lanes, slice) else lanes

    def size(self, lanes) -> int:
        return self.lanes if isinstance(lanes, slice) else len(lanes)

    def name(self, lane: int) -> str:
        return f"{lane % self.threads} of block {self.first + lane // self.threads}"

    def live_lanes(self) -> np.ndarray:
        """Bits of every warp's lanes that have not ended."""
        bits = np.int64(1) << np.arange(WARP)
        return ((self.state != _DONE).reshape(-1, WARP) * bits).sum(1)

    def count(self, memory, addresses, size, lanes, what) -> None:
        if self.profile is not None:
            self.profile.access(self, memory, addresses, size, lanes, what)

    # Execution.

    def _run(self, at: int):
        if self._code[at] is None:
            self._code[at] = self._compiled(self.program.instructions[at])
        return self._code[at]

    def _compiled(self, instruction):
        try:
            forms.check(instruction)
            if instruction.name in ("bra", "ret", "exit", "trap"):
                return None
            if warp.is_barrier(instruction):
                return self._barrier_of(instruction)
            name = "bar.warp" if instruction.name == "bar" else instruction.name
            run = operands.MAKERS[name](instruction, self)
            mask = warp.member_mask(instruction, self) if warp.together(instruction) else None
            if mask is not None:
                run.mask = mask
            return run
        except (PtxError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            what = str(error) if isinstance(error, PtxError) else repr(error)
            raise PtxError(f"line {instruction.line}: {instruction.text}: {what}") from error

    def _barrier_of(self, instruction):
        """A function of lanes that gives the barrier they arrive at."""
        number, *count = (operands.reader(operand, "u32", self) for operand in instruction.operands)

        def run(lanes):
            if count and (np.asarray(count[0](lanes)) != self.threads).any():
                raise PtxError("a barrier of some of a block's threads is not supported")
            return number(lanes)

        return run

    def _guarded(self, guard, lanes):
        """The lanes whose guard holds: all, some or none."""
        array = self.register(guard.register if isinstance(guard, Not) else guard)[lanes]
        holds = ~array if isinstance(guard, Not) else array
        if holds.all():
            return lanes
        return self.ids(lanes)[holds]

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                running = self.state == _RUNNING
                if not running.any():
                    if (self.state == _DONE).all():
                        break
                    self._stuck()
                pcs = self.pc[running]
                at = int(pcs.min())
                chosen = running & (self.pc == at)
                ahead = pcs[pcs > at]
                limit = int(ahead.min()) if len(ahead) else len(self._code) + 1
                lanes = self.all if chosen.all() else np.flatnonzero(chosen)
                self._straight(at, lanes, limit)
        self.copies.check_finished()
        self.products.check_finished()

    def _straight(self, at: int, lanes, limit: int) -> None:
        """Runs ``lanes`` from instruction ``at`` until they part, wait, end or meet others at ``limit``."""
        instructions = self.program.instructions
        while True:
            if at >= len(instructions):
                raise PtxError(f"{self.program.name}: a thread runs beyond the kernel's end")
            instruction = instructions[at]
            self.at = instruction
            self.issues += 1
            if self.issues > _MOST_ISSUES:
                raise PtxError(
                    f"line {instruction.line} of {self.program.name}: thread {self.name(self.ids(lanes)[0])} is still "
                    f"running after {_MOST_ISSUES:,} instructions"
                )
            if self.profile is not None and not self.together[at]:
                self.profile.issue(self, instruction, lanes)
            active = lanes if instruction.guard is None else self._guarded(instruction.guard, lanes)
            name = instruction.name
            try:
                if name == "bra":
                    to = self.program.labels[instruction.operands[0].name]
                    if active is lanes:
                        at = to
                        if at < limit or isinstance(lanes, slice):
                            continue
                        self.pc[lanes] = at
                        return
                    self.pc[lanes] = at + 1
                    self.pc[active] = to
                    return
                if name in ("ret", "exit"):
                    self._end(active)
                    if active is lanes:
                        return
                    self.pc[lanes] = at + 1
                    return
                if name == "trap":
                    if self.size(active):
                        raise PtxError(f"trap in thread {self.name(self.ids(active)[0])}")
                elif warp.is_barrier(instruction):
                    if self.size(active):
                        self._barrier(at, active)
                    if active is lanes:
                        return
                    rest = np.setdiff1d(self.ids(lanes), self.ids(active))
                    self.pc[rest] = at + 1
                    return
                elif self.together[at]:
                    whole = self._complete(at, active)
                    if self.profile is not None and self.size(whole):
                        self.profile.issue(self, instruction, whole)
                    if whole is not active:
                        # Those whose warps are not complete wait for the others.
                        late = np.setdiff1d(self.ids(active), self.ids(whole))
                        self.pc[late], self.state[late] = at, _WAITING
                        rest = np.setdiff1d(self.ids(lanes), self.ids(active))
                        self.pc[rest] = at + 1
                        if self.size(whole):
                            self.state[whole] = _RUNNING
                            self._run(at)(whole)
                            self.pc[whole] = at + 1
                        return
                    if self.size(active):
                        self._run(at)(active)
                elif self.size(active):
                    self._run(at)(active)
            except PtxError as error:
                raise PtxError(
                    f"line {instruction.line} of {self.program.name}: {instruction.text}: {error}"
                ) from None
            at += 1
            if at >= limit:
                self.pc[lanes] = at
                return

    def _complete(self, at, lanes):
        """``lanes``, and those that wait at the same instruction, as far as all who must take part are there."""
        mask = getattr(self._run(at), "mask", None)
        size = self.together[at]
        if isinstance(lanes, slice) and (mask is None or warp.names_everyone(self.program.instructions[at])):
            if self.threads % size:
                raise PtxError(f"{self.threads} threads are no multiple of {size}")
            return lanes
        here = self.ids(lanes)
        waiting = np.flatnonzero((self.state == _WAITING) & (self.pc == at))
        if len(waiting):
            here = np.union1d(here, waiting)
        if not len(here):
            return lanes
        if mask is None:
            group = here // size
            if (self.state.reshape(-1, size)[group] == _DONE).any():
                raise PtxError("some of the warp's threads have ended")
            complete = np.bincount(group, minlength=self.lanes // size)[group] == size
        else:
            masks, lane = mask(here).astype(np.int64), here % WARP
            if not (masks >> lane & 1).all():
                i = int((masks >> lane & 1).argmin())
                raise PtxError(
                    f"thread {self.name(here[i])} is not in the mask {int(masks[i]):#x} that it names"
                )
            _, row = np.unique(self.warp[here].astype(np.int64) << 32 | masks, return_inverse=True)
            present = np.zeros(row.max() + 1, np.int64)
            np.bitwise_or.at(present, row, np.int64(1) << lane)
            complete = (masks & self.live_lanes()[self.warp[here]] & ~present[row]) == 0
        if complete.all() and len(here) == self.size(lanes):
            return lanes
        return here[complete]

    def _barrier(self, at: int, lanes) -> None:
        self.barrier[lanes] = self._run(at)(lanes)
        self.pc[lanes] = at + 1
        self.state[lanes] = _AT_BARRIER
        self._release(np.unique(self.block[self.ids(lanes)]))

    def _release(self, blocks) -> None:
        """Lets blocks go on all of whose threads wait or have ended."""
        shape = (self.blocks, self.threads)
        state = self.state.reshape(shape)[blocks]
        waits = state == _AT_BARRIER
        arrived = blocks[(waits | (state == _DONE)).all(1) & waits.any(1)]
        for block in arrived:
            threads = np.arange(block * self.threads, (block + 1) * self.threads)
            threads = threads[self.state[threads] == _AT_BARRIER]
            if len(np.unique(self.barrier[threads])) > 1:
                raise PtxError(f"threads of block {self.first + block} wait at different barriers")
            _, first, row = np.unique(self.warp[threads], return_index=True, return_inverse=True)
            apart = self.pc[threads] != self.pc[threads][first][row]
            if apart.any():
                raise PtxError(
                    f"thread {self.name(threads[apart.argmax()])} waits at another barrier instruction than its warp"
                )
            self.state[threads] = _RUNNING
        self.epoch[arrived] += 1

    def _end(self, lanes) -> None:
        ids = self.ids(lanes)
        self.state[lanes] = _DONE
        if not len(ids):
            return
        # Who waited for them waits no longer, or finds that it waits in vain.
        ended = np.isin(self.warp, np.unique(self.warp[ids])) & (self.state == _WAITING)
        self.state[ended] = _RUNNING
        self._release(np.unique(self.block[ids]))

    def _stuck(self) -> None:
        left = np.flatnonzero(self.state != _DONE)
        lane = int(left[self.pc[left].argmin()])  # the others may only wait for this one
        what = "a barrier" if self.state[lane] == _AT_BARRIER else "lanes of its warp"
        at = self.program.instructions[self.pc[lane] - (self.state[lane] == _AT_BARRIER)]
        raise PtxError(
            f"line {at.line} of {self.program.name}: thread {self.name(lane)} waits at {at.text} for {what} that "
            "others never reach"
        )


def launch(
    program: Program,
    grid: Sequence[int],
    threads: int,
    parameters: bytes,
    regions: Sequence[Region],
    shared_bytes: int = 0,
    races: bool = False,
    profile=None,
    approximate: bool = False,
    fences: bool = True,
) -> None:
    """Runs a kernel on host memory; raises PtxError for what a kernel may not do.

    ``approximate``: results of ex2.approx and its like err by as much as they may, else they are the nearest floats.
    ``fences``: what wgmma reads must have been fenced for the asynchronous proxy by the thread that wrote it.
    """
    grid = tuple(grid) + (1,) * (3 - len(grid))
    blocks = grid[0] * grid[1] * grid[2]
    memory = Global(list(regions), accesses.unit(program, "global"), races)
    at_once = max(1, _MOST_LANES // threads)
    for first in range(0, blocks, at_once):
        count = min(at_once, blocks - first)
        Machine(
            program,
            grid,
            threads,
            parameters,
            memory,
            shared_bytes,
            first,
            count,
            races,
            profile,
            approximate,
            fences,
        ).run()
        memory.forget_accesses()
    memory.write_back()
