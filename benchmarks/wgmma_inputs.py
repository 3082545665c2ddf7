"""Registers that wgmma still reads, overwritten: a fault of some assemblers that the source cannot show.

ptxas before CUDA 13.3 may give a register with wgmma's first matrix to another value before the product, which is
asynchronous, has been waited for (CUDA 13.3 release notes; https://github.com/triton-lang/triton/pull/11781). Machine
code tells: no instruction between an HGMMA and the wait for its group may write what it reads.
"""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FUNCTION = re.compile(r"\s*(?:Function : |\.text\.)([\w$]+)")
_INPUTS = 4  # registers with a warp's 16 rows of the first matrix
_NO_RESULT = ("ST", "RED", "BAR", "BRA", "LDGSTS", "WARPGROUP", "MEMBAR", "FENCE")


def _written(name: str, operands: str) -> range:
    found = re.match(r"R(\d+)\b", operands)
    if not found or name.startswith(_NO_RESULT):
        return range(0)
    if shape := re.match(r"HGMMA\.\d+x(\d+)x", name):
        count = int(shape[1]) // 2
    else:
        count = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return range(int(found[1]), int(found[1]) + count)


def overwritten(sass: str) -> tuple[int, list[str]]:
    """How many wgmma read registers, and those whose registers are written too early, a line each.

    ``sass``: what ``cuobjdump -sass`` or ``nvdisasm -c`` prints. Code is followed in the order of its addresses.
    """
    functions: dict[str, list[tuple[str, str]]] = {}
    code: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if found := _FUNCTION.match(line):
            code = functions.setdefault(found[1], [])
        elif found := _INSTRUCTION.match(line):
            code.append((found[1], found[2]))
    count, faults = 0, []
    for function, code in functions.items():
        for i, (name, operands) in enumerate(code):
            read = re.match(r"R\d+, R(\d+), gdesc", operands) if name.startswith("HGMMA") else None
            if not read:
                continue
            count += 1
            inputs = range(int(read[1]), int(read[1]) + _INPUTS)
            groups = int("gsb0" in operands)  # committed since, its own among them
            for later, (other, others) in enumerate(code[i + 1 :], i + 1):
                groups += other.startswith("HGMMA") and "gsb0" in others
                if other.startswith("WARPGROUP.DEPBAR"):
                    left = int(re.search(r"(0x[0-9a-f]+)$", others)[1], 16)
                    if groups > left:
                        break
                elif set(inputs) & set(_written(other, others)):
                    faults.append(f"{function}: {name} {operands} and {later - i} later {other} {others}")
                    break
    return count, faults
