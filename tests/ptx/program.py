"""PTX text as instructions: enough of the language for what nvcc and Triton write."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

# Registers' bits by the letters of their declared type; predicates are kept as booleans.
_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}
_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}


@dataclass(frozen=True)
class Register:
    name: str
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Not:
    """A predicate operand written as !%p."""

    register: Register


@dataclass(frozen=True)
class Integer:
    value: int


@dataclass(frozen=True)
class Float:
    bits: int
    width: int


@dataclass(frozen=True)
class Symbol:
    """A special register (%tid.x), a parameter, shared memory or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Integer
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple


@dataclass(frozen=True)
class Pair:
    """Two results: %r1|%p2."""

    first: Register | None
    second: Register | None


@dataclass
class Instruction:
    """``name`` is the opcode up to its first dot, ``words`` what follows the dots."""

    name: str
    words: tuple[str, ...]
    operands: list
    guard: Register | Not | None
    text: str
    line: int


@dataclass
class Parameter:
    offset: int
    size: int


@dataclass
class Program:
    """One kernel."""

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: dict[str, int] = field(default_factory=dict)  # symbols' offsets in shared memory
    static_shared_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    dynamic_shared: int | None = None  # where dynamic shared memory starts, if the kernel names it
    most_threads: int | None = None  # of a block, as the kernel was compiled for
    exactly: bool = False
    compiled_before: bool = False  # a machine has found nothing in it that it does not execute
    text: str = ""  # this kernel and what stands before all kernels, in the lines where they stood

    def shared_bytes(self, dynamic: int) -> int:
        return (self.static_shared_bytes if self.dynamic_shared is None else self.dynamic_shared) + dynamic


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _body(text: str, start: int) -> int:
    """The index of the brace that closes the one at ``start``."""
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise ValueError("a kernel's braces do not match")


def _parameters(program: Program, text: str) -> None:
    offset = 0
    for declared in filter(str.strip, text.split(",")):
        found = re.search(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^%\w]*(?:\.\w+\s+|\d+\s+)*)?\s*"
            r"([\w$]+)(?:\[(\d+)\])?\s*$",
            declared.strip(),
        )
        if not found:
            raise ValueError(f"parameter not understood: {declared.strip()!r}")
        size = _SIZES[found[2]]
        align = int(found[1] or size)
        size *= int(found[4] or 1)
        offset = -(-offset // align) * align
        program.parameters[found[3]] = Parameter(offset, size)
        offset += size
    program.parameter_bytes = offset


class _Scopes:
    """Registers declared inside braces are others than those of the same name outside."""

    def __init__(self):
        self.stack: list[dict[str, Register]] = [{}]
        self.ranges: list[list[tuple[str, int, int]]] = [[]]  # prefix, how many, bits
        self.count = 0
        # By the names that were looked for since a scope or declaration last changed.
        self.found: dict[str, Register | None] = {}

    def open(self) -> None:
        self.found.clear()
        self.stack.append({})
        self.ranges.append([])

    def close(self) -> None:
        self.found.clear()
        self.stack.pop()
        self.ranges.pop()

    def declare(self, kind: str, names: str) -> None:
        self.found.clear()
        bits = 1 if kind == "pred" else 8 * _SIZES[kind]
        for name in (part.strip() for part in names.split(",")):
            if found := re.fullmatch(r"(%[\w$]*)<(\d+)>", name):
                self.ranges[-1].append((found[1], int(found[2]), bits))
            else:
                self._add(len(self.stack) - 1, name, bits)

    def _add(self, depth: int, name: str, bits: int) -> Register:
        self.count += 1
        register = Register(f"{name}@{self.count}" if depth else name, bits)
        self.stack[depth][name] = register
        return register

    def find(self, name: str) -> Register | None:
        if name not in self.found:
            self.found[name] = self._find(name)
        return self.found[name]

    def _find(self, name: str) -> Register | None:
        found = re.fullmatch(r"(%[\w$]*?)(\d+)", name)
        for depth in reversed(range(len(self.stack))):
            if name in self.stack[depth]:
                return self.stack[depth][name]
            for prefix, count, bits in self.ranges[depth] if found else ():
                if (
                    name.startswith(prefix)
                    and name[len(prefix) :] == str(int(found[2]))
                    and int(found[2]) < count
                ):
                    return self._add(depth, name, bits)
        return None


def _integer(text: str) -> int | None:
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return None


def _operand(text: str, scopes: _Scopes):
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1])))
    if text.startswith("["):
        inner = re.sub(r"\s", "", text[1:-1])
        found = re.fullmatch(r"([%\w$.]+?)(?:\+(-?\w+))?", inner)
        if not found:
            raise ValueError(f"address not understood: {text!r}")
        return Address(_operand(found[1], scopes), int(found[2] or "0", 0))
    if text.startswith("!"):
        return Not(_operand(text[1:], scopes))
    if text.startswith("-") and scopes.find(text[1:]):
        raise ValueError(f"operand not understood: {text!r}")
    if "|" in text:
        first, second = (part.strip() for part in text.split("|"))
        return Pair(*(None if part == "_" else scopes.find(part) for part in (first, second)))
    if text == "_":
        return None
    if register := scopes.find(text):
        return register
    if (value := _integer(text)) is not None:
        return Integer(value)
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Float(int(found[1], 16), 32)
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Float(int(found[1], 16), 64)
    return Symbol(text)


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    rest = text[start:].strip()
    return parts + [rest] if rest else parts


_STATEMENT = re.compile(
    r"\s*(?:"
    r"(?P<loc>\.loc\b[^\n]*\n)"
    r"|(?P<label>[$\w]+):(?!:)"
    r"|(?P<open>\{)|(?P<close>\})"
    r"|(?P<statement>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);"
    r")"
)
_OPCODE = re.compile(r"(?:@(!?[%\w$]+)\s+)?([a-z][a-z0-9]*)((?:[.:]+\w+)*)\s*(.*)", re.S)


def _instructions(program: Program, text: str, first_line: int) -> None:
    scopes, at, end = _Scopes(), 0, len(text.rstrip())
    line, counted = first_line, 0  # of the text up to there
    while at < end:
        found = _STATEMENT.match(text, at)
        if not found:
            raise ValueError(f"not understood: {text[at : at + 80]!r}")
        start = found.start(found.lastgroup)
        line, counted = line + text.count("\n", counted, start), start
        at = found.end()
        if found["label"]:
            if found["label"] in program.labels:
                raise ValueError(f"line {line}: the label {found['label']} stands twice")
            program.labels[found["label"]] = len(program.instructions)
        elif found["open"]:
            scopes.open()
        elif found["close"]:
            scopes.close()
        elif statement := (found["statement"] or "").strip():
            # .loc may stand between the braces of inline assembly and its instruction
            statement = re.sub(r"\.loc\b[^\n]*\n", "", statement).strip()
            if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S):
                scopes.declare(declared[1], declared[2])
            elif declared := re.fullmatch(_SHARED, statement):
                _shared(program, declared)
            elif not statement.startswith("."):
                _add(program, statement, scopes, line)
            elif not re.match(r"\.(?:pragma|loc)\b", statement):
                raise ValueError(f"line {line}: not understood: {statement!r}")


def _add(program: Program, statement: str, scopes: _Scopes, line: int) -> None:
    found = _OPCODE.fullmatch(statement)
    if not found:
        raise ValueError(f"line {line}: not understood: {statement!r}")
    words = tuple(word for word in re.split(r"[.:]+", found[3]) if word)
    text = " ".join(statement.split())
    try:
        operands = [_operand(part, scopes) for part in _split(found[4])]
        guard = _operand(found[1], scopes) if found[1] else None
    except ValueError as error:
        raise ValueError(f"line {line}: {error} in {text!r}") from None
    program.instructions.append(Instruction(found[2], words, operands, guard, text, line))


_SHARED = r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d+)\]"


def _shared(program: Program, declared: re.Match) -> None:
    align, size = int(declared[1]), _SIZES[declared[2]] * int(declared[4])
    offset = -(-program.static_shared_bytes // align) * align
    program.shared[declared[3]] = offset
    program.static_shared_bytes = offset + size


def _outside(text: str) -> str:
    """What stands in no braces."""
    pieces, at = [], 0
    while (start := text.find("{", at)) >= 0:
        pieces.append(text[at:start])
        at = _body(text, start) + 1
    return "".join([*pieces, text[at:]])


def kernel_names(text: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", without_comments(text))


def _alone(text: str, start: int, end: int) -> str:
    """The kernel at ``start`` without the others; linkage (.visible) stands before it."""
    first = text.rfind("\n", 0, text.index(".entry")) + 1
    start = text.rfind("\n", 0, start) + 1
    return text[:first] + "\n" * text.count("\n", first, start) + text[start:end] + "\n"


def parse(text: str, name: str | None = None) -> Program:
    """The kernel called ``name``, or the only one."""
    text = without_comments(text)
    names = re.findall(r"\.entry\s+([\w$]+)", text)
    if name is None:
        (name,) = names
    if name not in names:
        raise ValueError(f"no kernel {name} in {', '.join(names)}")
    program = Program(name)
    dynamic = re.findall(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)\[\]", text)
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*(?:\((.*?)\))?", text, re.S)
    _parameters(program, entry[1] or "")
    start = text.index("{", entry.end())
    for kind, threads in re.findall(r"\.(maxntid|reqntid)\s+([\d,\s]+)", text[entry.end() : start]):
        program.most_threads = math.prod(int(axis) for axis in threads.split(","))
        program.exactly = kind == "reqntid"
    end = _body(text, start)
    body = text[start + 1 : end]
    program.text = _alone(text, entry.start(), end + 1)
    # Declared outside of every kernel; one that the kernel does not name takes no memory in it.
    for declared in re.finditer(_SHARED, _outside(text)):
        if re.search(rf"(?<![\w$]){re.escape(declared[3])}(?![\w$])", body):
            _shared(program, declared)
    _instructions(program, body, text.count("\n", 0, start) + 1)
    if dynamic:  # behind what is declared with a size; all such symbols name the same place
        align = max(16, *(int(align) for align, _ in dynamic))
        program.dynamic_shared = -(-program.static_shared_bytes // align) * align
        program.shared.update({symbol: program.dynamic_shared for _, symbol in dynamic})
    return program
