"""Builds the compiled parts. Metadata is in pyproject.toml.

``depict_kernels/_cpu.abi3.so`` holds the C++ kernels. It uses torch's stable interface alone, so one binary serves
every torch from TORCH_TARGET on and every Python from 3.10. What was built, with what, or why not, is written to
``depict_kernels/_build.json``; ``python -m depict_kernels`` shows it. Without a C++ compiler (or with
DEPICT_KERNELS_NO_EXTENSIONS=1) the package installs without it and the operators run on stock torch.

MAX_JOBS bounds the parallel compilations. DEPICT_KERNELS_SANITIZE=1 builds with AddressSanitizer and UBSan
(see ``make asan``).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = ROOT / "depict_kernels" / "_build.json"
TORCH_TARGET = (2, 11)
PYTHON_TARGET = (3, 10)
MEMORY_PER_JOB = 2 << 30  # bytes that one compilation may need

CPU_SOURCES = [
    "csrc/bindings_cpu.cpp",
    "csrc/cpu/upsample.cpp",
    "csrc/cpu/upsample_avx512.cpp",
    "csrc/cpu/upsample_avx2.cpp",
    "csrc/cpu/upsample_baseline.cpp",
]
# Contraction to FMA stays on (it is the same for any number of threads); nothing here may assume finite numbers
# or reorder sums. Psabi: vectors are only passed to functions that are inlined.
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-g0",
]
SANITIZE_FLAGS = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
]


def compiler() -> str | None:
    """The C++ compiler's command, or None where there is none."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(command)[0]):
        return command
    return None


def output_of(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def why_not() -> str | None:
    """What keeps the CPU part from being built, or None."""
    if os.environ.get("DEPICT_KERNELS_NO_EXTENSIONS", "0") not in ("", "0"):
        return "DEPICT_KERNELS_NO_EXTENSIONS was set when the package was built"
    if sys.platform == "win32":
        return "the C++ part is built on Linux and macOS only"
    if compiler() is None:
        return (
            f"there was no C++ compiler (looked for {os.environ.get('CXX', 'c++')!r}); install g++ or set CXX"
        )
    try:
        import torch
    except ImportError:
        return "torch was not installed in the build environment (needed with --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        return f"the build environment has torch {torch.__version__}, at least {version_text(TORCH_TARGET)} is needed"
    return None


def version_text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def bound_jobs() -> None:
    """At most one compilation per core and per MEMORY_PER_JOB of memory, unless MAX_JOBS says otherwise."""
    if "MAX_JOBS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ["MAX_JOBS"] = str(max(1, min(cores, memory // MEMORY_PER_JOB)))


def build_record(reason: str | None, flags: list[str]) -> dict:
    record = {
        "version": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": {"built": reason is None, "reason": reason},
    }
    if reason is None:
        import torch

        command = compiler()
        record["torch"] = torch.__version__
        record["torch_target"] = version_text(TORCH_TARGET)
        record["compiler"] = output_of(*shlex.split(command), "--version").partition("\n")[0] or command
        record["cpu"]["flags"] = " ".join(flags)
        record["cpu"]["instruction_sets"] = (
            ["avx512", "avx2", "baseline"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
        )
    return record


reason = why_not()
flags = CXX_FLAGS + (
    SANITIZE_FLAGS if os.environ.get("DEPICT_KERNELS_SANITIZE", "0") not in ("", "0") else []
)
extensions, commands = [], {}
if reason is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    bound_jobs()
    major, minor = TORCH_TARGET
    extensions.append(
        CppExtension(
            "depict_kernels._cpu",
            CPU_SOURCES,
            extra_compile_args={
                "cxx": [*flags, f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
            },
            extra_link_args=["-fsanitize=address,undefined"]
            if "-fsanitize=address,undefined" in flags
            else [],
            depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
            py_limited_api=True,
        )
    )
    commands["build_ext"] = BuildExtension


class BuildPython(build_py):
    """Writes the build record beside the modules, before they are copied."""

    def run(self) -> None:
        write_record()
        super().run()
        if reason is not None and not self.editable_mode:  # a library left by an earlier build in this tree
            (Path(self.build_lib) / "depict_kernels" / "_cpu.abi3.so").unlink(missing_ok=True)


def write_record() -> None:
    RECORD.write_text(json.dumps(build_record(reason, flags), indent=2) + "\n")
    if reason is not None:
        print(f"depict_kernels: the C++ kernels are not built: {reason}", file=sys.stderr)


commands["build_py"] = BuildPython
if extensions:
    build_extension = commands["build_ext"]

    class BuildCpp(build_extension):
        def run(self) -> None:
            write_record()
            super().run()

    commands["build_ext"] = BuildCpp

setup(
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": f"cp{PYTHON_TARGET[0]}{PYTHON_TARGET[1]}"}}
    if extensions
    else {},
)
