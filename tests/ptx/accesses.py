"""Loads, stores and atomic operations of single threads, and what orders them."""

from __future__ import annotations

import numpy as np

from tests.ptx import rounding
from tests.ptx.errors import PtxError
from tests.ptx.operands import DTYPES, address, bits_of, kind_of, maker, parts, reader, writer


def _memory(words, machine):
    return machine.shared if "shared" in words else machine.memory


def _strong(words) -> bool:
    """Whether accesses of several threads at once are no race, as with atomic ones."""
    return not {"volatile", "relaxed", "acquire", "release"}.isdisjoint(words)


def unit(program, space: str) -> int:
    """The size of the smallest accesses to "shared" or "global" memory in a program: 1 to 16 bytes."""
    sizes = [16]
    for instruction in program.instructions:
        words = instruction.words
        if instruction.name in ("ld", "st", "atom", "red") and "param" not in words:
            if ("shared" in words) == (space == "shared") and words[-1] in DTYPES:
                sizes.append(DTYPES[words[-1]].itemsize * _count(words))
        elif instruction.name == "cp" and space == "shared" and len(instruction.operands) > 2:
            # Of global memory it may read a part of what it writes, and nobody else writes less than a unit there.
            sizes.append(getattr(instruction.operands[2], "value", 1))
    return max(1, min(sizes))


@maker("ld")
def _load(instruction, machine):
    words, kind = instruction.words, kind_of(instruction)
    to, place = parts(instruction.operands[0]), address(instruction.operands[1], machine)
    size, dtype = DTYPES[kind].itemsize, DTYPES[kind]
    _count_parts(words, to)
    writes = [writer(operand, kind, machine) for operand in to]
    if words[0] == "param":
        blob = np.frombuffer(machine.parameters, np.uint8)

        def run(lanes):
            at = place(lanes).astype(np.int64)
            if (at % (size * len(writes))).any() or (at + size * len(writes) > len(blob)).any():
                raise PtxError(f"parameters at {at[0]}: misaligned, or beyond their {len(blob)} bytes")
            for i, write in enumerate(writes):
                write(lanes, blob[at[:, None] + np.arange(i * size, (i + 1) * size)].view(dtype)[:, 0])

        return run
    memory, strong = _memory(words, machine), _strong(words)

    def run(lanes):
        values = memory.load(place(lanes), size, len(writes), machine.ids(lanes), machine, strong)
        for write, value in zip(writes, values):
            write(lanes, value.view(dtype))

    return run


def _count(words) -> int:
    (count,) = [int(word[1:]) for word in words if word in ("v2", "v4", "v8")] or [1]
    return count


def _count_parts(words, operands) -> None:
    if len(operands) != _count(words):
        raise PtxError(f"{len(operands)} registers, not {_count(words)}")


@maker("st")
def _store(instruction, machine):
    words, kind = instruction.words, kind_of(instruction)
    place, values = address(instruction.operands[0], machine), parts(instruction.operands[1])
    size, dtype = DTYPES[kind].itemsize, DTYPES[kind]
    _count_parts(words, values)
    reads = [reader(operand, kind, machine) for operand in values]
    memory, strong = _memory(words, machine), _strong(words)

    def run(lanes):
        count = machine.size(lanes)
        bits = [np.broadcast_to(bits_of(np.asarray(read(lanes), dtype)), (count,)) for read in reads]
        memory.store(place(lanes), bits, size, machine.ids(lanes), machine, strong)

    return run


@maker("atom", "red")
def _atomic(instruction, machine):
    words, kind = instruction.words, kind_of(instruction)
    memory, dtype = _memory(words, machine), DTYPES[kind]
    operands = instruction.operands if instruction.name == "atom" else [None, *instruction.operands]
    write, place = writer(operands[0], kind, machine), address(operands[1], machine)
    reads = [reader(operand, kind, machine) for operand in operands[2:]]
    add = lambda old, new: old + new
    if kind == "f32" and "shared" not in words:  # as on global memory
        add = lambda old, new: rounding.flush(rounding.flush(old) + rounding.flush(new))
    combine = {
        "add": add, "min": min, "max": max, "exch": lambda old, new: new,
        "or": lambda old, new: old | new, "and": lambda old, new: old & new, "xor": lambda old, new: old ^ new,
    }  # fmt: skip
    (name,) = [word for word in words if word in combine or word == "cas"]

    def run(lanes):
        ids, addresses = machine.ids(lanes), place(lanes)
        at = memory.locate(addresses, dtype.itemsize, 1, ids, machine)
        machine.count(memory, addresses, dtype.itemsize, ids, "atomic")
        memory.note_atomic(at, dtype.itemsize, ids, machine)
        at = at // dtype.itemsize
        view = memory.bytes.view(dtype)
        values = [np.broadcast_to(read(lanes), ids.shape) for read in reads]
        old = np.zeros(len(ids), dtype)
        for i in range(len(ids)):
            old[i] = view[at[i]]
            if name == "cas":
                if old[i] == values[0][i]:
                    view[at[i]] = values[1][i]
            else:
                view[at[i]] = combine[name](old[i], values[0][i])
        write(lanes, old)

    return run


@maker("fence", "membar", "nanosleep", "prefetch", "griddepcontrol")
def _nothing(instruction, machine):
    if instruction.words[:2] == ("proxy", "async") and "global" not in instruction.words:

        def run(lanes):
            machine.fences[lanes] += 1

        return run
    return lambda lanes: None
