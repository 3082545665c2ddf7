"""How often a GPU issues each instruction of a kernel's machine code (SASS), from the profile of its PTX.

ptxas keeps line numbers: every PTX instruction is given its own line's as the source's, so that nvdisasm names, for
each machine instruction, the PTX line it comes from. It is issued as often as that line is.

Where this is not exact: what ptxas moves out of a loop, or to another place, keeps its line's count (too large);
branches inside one PTX instruction (a division's rare cases) count as executed, out-of-line subroutines not at all;
of a block of PTX that stands k times in the machine code (a loop unrolled by ptxas, a tail that two branches got) each
copy counts as a k-th, which is right for all copies together. :func:`copied` says how many such blocks there are.
"""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_report import tool
from tests.ptx.profile import Counts, Profile
from tests.ptx.program import Program

_ASSEMBLERS = ("ptxas", "ptxas-blackwell")  # the second, of Triton's, takes newer PTX
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# One PTX instruction of these is one machine instruction of these: several are copies.
_SINGLE = {"mma": "HMMA", "shfl": "SHFL", "ldmatrix": "LDSM"}
_SINGLE |= {"ld global": "LDG", "st global": "STG", "ld shared": "LDS", "st shared": "STS"}


@dataclass(frozen=True)
class Machine:
    """One machine instruction: its opcode with modifiers and the PTX line it stands for."""

    opcode: str
    line: int

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


def why_not() -> str | None:
    """What keeps :func:`disassembled` from working, or None."""
    missing = [name for name in ("ptxas", "nvdisasm") if tool(name) is None]
    return f"{' and '.join(missing)} not found (the CUDA toolkit and Triton have them)" if missing else None


def with_lines(program: Program) -> str:
    """The kernel's PTX with every instruction's line as its source line; line numbers stay."""
    lines = re.sub(r"\.(?:loc|file)\b[^\n]*", "", program.text).split("\n")
    for line in {instruction.line for instruction in program.instructions}:
        lines[line - 1] = f".loc 1 {line} 0 {lines[line - 1]}"
    size = next(i for i, line in enumerate(lines) if ".address_size" in line)
    lines[size] += ' .file 1 "kernel.ptx"'
    return "\n".join(lines)


def parse(text: str, kernel: str) -> list[Machine]:
    """``kernel``'s instructions in what nvdisasm prints, without the padding behind them and subroutines.

    Behind the last exit ptxas puts copies of warp operations for warps that have parted (WARPSYNC.COLLECTIVE): the
    machine's operations take place with all lanes together, so they are left out too.
    """
    found, line, inside, end, apart = [], None, False, 0, None
    for row in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", row.strip()):
            inside, line = section[1] == kernel, None
        elif row.startswith("$__internal"):
            inside = False
        elif source := re.search(r'//## File ".*?", line (\d+)', row):
            line = int(source[1])
        elif inside and (instruction := _INSTRUCTION.match(row)):
            found.append(Machine(instruction[1], line))
            if re.search(r"\*/\s+EXIT\b", row):  # without a guard
                end = len(found)
            if instruction[1] == "WARPSYNC.COLLECTIVE" and apart is None:
                apart = end
    found = found[:apart] if apart else found
    while found and found[-1].name == "NOP":
        found.pop()
    if found and found[-1].name == "BRA":  # to itself, behind the end
        found.pop()
    if not found:
        raise ValueError(f"no machine code of {kernel}")
    first = next(m.line for m in found if m.line is not None)
    return [Machine(m.opcode, first if m.line is None else m.line) for m in found]


def disassembled(program: Program, architecture: str) -> list[Machine]:
    """The machine code that ptxas makes of a kernel for ``architecture`` ("sm_90a")."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(with_lines(program))
        for name in filter(None, map(tool, _ASSEMBLERS)):
            command = [name, f"-arch={architecture}", "-lineinfo", str(source), "-o", str(binary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"{program.name}: {(done.stdout + done.stderr)[:2000]}")
        command = [tool("nvdisasm"), "-c", "--print-line-info", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text, program.name)


def issued(program: Program, code: list[Machine], profile: Profile) -> Counter[str]:
    """Warp instructions by opcode."""
    on_line = Counter(instruction.line for instruction in program.instructions)
    copies = {line: count for lines, count in _blocks(program, code) for line in lines}
    counts: Counter[str] = Counter()
    for instruction in code:
        executed = profile.lines.get((program.name, instruction.line), Counts()).issued
        counts[instruction.opcode] += executed / on_line[instruction.line] / copies[instruction.line]
    return Counter({opcode: round(count) for opcode, count in counts.items()})


def copied(program: Program, code: list[Machine]) -> int:
    """How many blocks of PTX stand several times in the machine code."""
    return sum(count > 1 for _, count in _blocks(program, code))


def _single(instruction) -> str | None:
    space = next((word for word in instruction.words if word in ("global", "shared")), None)
    return _SINGLE.get(instruction.name) or _SINGLE.get(f"{instruction.name} {space}")


def _blocks(program: Program, code: list[Machine]) -> list[tuple[list[int], int]]:
    """The lines between labels and branches, and how often they stand in ``code``."""
    found: Counter[tuple[int, str]] = Counter((m.line, m.name) for m in code)
    starts = {0, len(program.instructions), *program.labels.values()}
    starts |= {i + 1 for i, instruction in enumerate(program.instructions) if instruction.name == "bra"}
    cuts = sorted(starts)
    blocks = []
    for start, end in itertools.pairwise(cuts):
        block = program.instructions[start:end]
        counts = [found[i.line, name] for i in block if (name := _single(i)) and found[i.line, name]]
        blocks.append(([i.line for i in block], statistics.median_low(counts) if counts else 1))
    return blocks
