"""Registers, shared memory and spills of the CUDA C++ kernels: in a compiled library, for every architecture in it, or
compiled for the purpose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.wgmma_inputs import overwritten

LIBRARY = Path(__file__).resolve().parents[1] / "depict_kernels" / "_cuda.abi3.so"


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or the one that Triton brings along."""
    if shutil.which(name):
        return shutil.which(name)
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def why_not(library: Path = LIBRARY) -> str | None:
    """What keeps :func:`rows` from reading the library, or None."""
    if not library.exists():
        return f"the CUDA kernels are not built: there is no {library.name}"
    return (
        None
        if tool("cuobjdump")
        else "cuobjdump was not found (it comes with the CUDA toolkit and with Triton)"
    )


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and arguments: mask_forward<Bfloat16, 5>. Without a demangler as they are."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if demangler is None or not names:
        return names
    text = subprocess.run(
        [demangler], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = [
        re.sub(r"\(anonymous namespace\)::|[A-Za-z_]\w*::|^void ", "", line) for line in text.splitlines()
    ]
    return [name.partition("(")[0] for name in short]


def parse(text: str) -> list[dict]:
    """Rows of what ``cuobjdump --dump-resource-usage`` prints. Shared memory is the static part alone."""
    rows, target, name = [], None, None
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line.strip()):
            target = found[1]
        elif found := re.match(r"\s*Function (.+):", line):
            name = found[1]
        elif name is not None and "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            spills = usage["STACK"] + usage["LOCAL"]
            rows.append({"name": name, "target": target, "registers": usage["REG"], "spills": spills})
            rows[-1].update(shared=usage["SHARED"], may_spill="loat16" not in name)
            name = None
    return rows


def rows(library: Path = LIBRARY) -> list[dict]:
    """One row per kernel and architecture: name, target, registers, shared, spills (bytes of stack per thread)."""
    command = [tool("cuobjdump"), "--dump-resource-usage", str(library)]
    found = parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for row, name in zip(found, readable([row["name"] for row in found])):
        row["name"] = name
    return sorted(found, key=lambda row: (row["target"], row["name"]))


def compiled(architectures: tuple[str, ...], sources: str = "*.cu") -> list[dict]:
    """The rows that a library for ``architectures`` ("sm_80") would give, of the files in csrc/cuda that match.

    Raises RuntimeError with what nvcc said where a file does not compile.
    """
    from tests.ptx import cuda_runs

    def build(job: tuple[str, Path]) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernels.cubin"
            command = [cuda_runs.nvcc(), *cuda_runs.FLAGS, f"-arch={job[0]}", "-cubin", str(job[1])]
            command += ["-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{job[1].name} for {job[0]}: {done.stdout + done.stderr}")
            return [{**row, "target": job[0]} for row in rows(out)]

    jobs = [
        (target, source) for target in architectures for source in sorted(cuda_runs.SOURCES.glob(sources))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [row for some in pool.map(build, jobs) for row in some]
    return sorted(found, key=lambda row: (row["target"], row["name"]))


def spilled(rows: list[dict]) -> list[str]:
    """The kernels that spill and must not."""
    return [f"{row['name']} {row['target']}" for row in rows if row["spills"] and not row["may_spill"]]


def wgmma_inputs() -> tuple[int, list[str]]:
    """What :func:`benchmarks.wgmma_inputs.overwritten` finds in the library."""
    command = [tool("cuobjdump"), "-sass", str(LIBRARY)]
    return overwritten(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(match: str = "", architectures: tuple[str, ...] = ()) -> list[dict]:
    """Prints the rows whose name contains ``match`` and returns them, compiled for ``architectures`` if there are any.

    Without them they are the library's; says so where there is none to read.
    """
    reason = None if architectures else why_not()
    if reason is not None:
        print(f"CUDA C++ kernels: {reason}")
        return []
    found = compiled(architectures) if architectures else rows()
    chosen = [row for row in found if match in row["name"]]
    print(f"{'CUDA C++ kernel':58} {'target':8} registers  static shared spills")
    for row in chosen:
        print(f"{row['name']:58} {row['target']:8} {row['registers']:9} {row['shared']:14} {row['spills']:6}")
    return chosen
