"""Small kernels in hand-written PTX on arrays of numpy: what tests of the machine are made of.

Registers: %p predicates, %h 16 bits, %r 32, %d 64, %f float32, %e float64; %a0, %a1, ... hold the arrays'
addresses, %t the thread's index in its block, %c the block's, %g the thread's in the grid, %l its lane.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest

from tests.ptx import machine, program

ARCHITECTURE = "sm_90a"
HEAD = f".version 8.0\n.target {ARCHITECTURE}\n.address_size 64\n.extern .shared .align 1024 .b8 dynamic[];\n"
seen: list[str] = []  # every kernel that ran, so that ptxas can be asked about them

_CLASSES = {
    "f4": ("f", "f32"),
    "f8": ("e", "f64"),
    "u4": ("r", "u32"),
    "i4": ("r", "s32"),
    "u8": ("d", "u64"),
}
_CLASSES |= {
    "i8": ("d", "s64"),
    "u2": ("h", "u16"),
    "i2": ("h", "s16"),
    "f2": ("h", "b16"),
    "u1": ("h", "u8"),
}
_CLASSES |= {"i1": ("h", "s8"), "b1": ("h", "u8")}


def entry(name: str, body: str, arrays: int) -> str:
    parameters = ", ".join(f".param .u64 p{i}" for i in range(arrays))
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(arrays))
    return f"""
.visible .entry {name}({parameters})
{{
.reg .pred %p<40>;
.reg .b16 %h<40>;
.reg .b32 %r<200>;
.reg .b64 %d<40>;
.reg .f32 %f<200>;
.reg .f64 %e<40>;
.reg .b64 %a<{max(arrays, 1)}>;
.reg .b32 %t, %c, %g, %l;
{loads}
mov.u32 %t, %tid.x;
mov.u32 %c, %ctaid.x;
mov.u32 %g, %ntid.x;
mad.lo.s32 %g, %c, %g, %t;
mov.u32 %l, %laneid;
{body}
ret;
}}
"""


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    grid: Sequence[int] = (1,),
    shared: int = 0,
    races: bool = True,
    profile=None,
) -> None:
    """Runs ``body`` on ``arrays``, which it may change."""
    text = HEAD + entry("small", body, len(arrays))
    if body not in seen:
        seen.append(body)
    execute(program.parse(text), arrays, threads, grid, shared, races, profile)


def execute(parsed, arrays, threads=32, grid=(1,), shared=0, races=True, profile=None) -> None:
    regions = [machine.Region(array.ctypes.data, array.nbytes) for array in arrays]
    parameters = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays)
    machine.launch(parsed, grid, threads, parameters, regions, shared, races=races, profile=profile)


def at(register: str, array: int, size: int, index: str = "%g") -> str:
    """Puts the address of element ``index`` of an array into a 64-bit register."""
    return f"mad.wide.u32 {register}, {index}, {size}, %a{array};\n"


def elementwise(instruction: str, out: np.dtype | str, *inputs: np.ndarray) -> np.ndarray:
    """``instruction`` with {d} for its result and {a}, {b}, {c} for the inputs; a bool is a predicate."""
    size = max(len(x) for x in inputs)
    padded = -(-size // 32) * 32
    arrays, body, names = [], "", {}
    for i, values in enumerate(inputs):
        values = np.resize(np.asarray(values), padded).copy()
        letter, kind = _CLASSES[values.dtype.str[1:]]
        name = f"%{letter}{10 + i}"
        body += at("%d30", i + 1, values.itemsize) + f"ld.global.{kind} {name}, [%d30];\n"
        if values.dtype == bool:
            body += f"setp.ne.u16 %p{10 + i}, {name}, 0;\n"
            name = f"%p{10 + i}"
        names["abc"[i]] = name
        arrays.append(values)
    out = np.dtype(out)
    letter, kind = _CLASSES[out.str[1:]]
    result = "%p1" if out.kind == "b" else f"%{letter}1"
    body += instruction.format(d=result, **names) + ";\n"
    if out.kind == "b":
        body += "selp.u16 %h1, 1, 0, %p1;\n"
    body += at("%d30", 0, out.itemsize) + f"st.global.{kind.replace('s', 'u')} [%d30], %{letter}1;\n"
    results = np.zeros(padded, out)
    run(body, results, *arrays, threads=padded)
    return results[:size]


def check_with_ptxas(folder) -> None:
    """Every kernel that ran so far is one that ptxas takes."""
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is missing")
    if not seen:
        pytest.skip("no kernel ran before")
    file = folder / "all.ptx"
    file.write_text(HEAD + "".join(entry(f"k{i}", body, 12) for i, body in enumerate(seen)))
    command = ["ptxas", f"-arch={ARCHITECTURE}", "-O0", str(file), "-o", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen.clear()
    assert done.returncode == 0, done.stderr[:3000]
