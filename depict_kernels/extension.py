"""The compiled parts: found and loaded at first use, with the reason at hand where it cannot be.

The build writes ``_build.json`` beside this file: what was built, from which commit, with which compiler and torch,
or why it was not. ``python -m depict_kernels`` prints :func:`status`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_BUILD_RECORD = _HERE / "_build.json"
EMULATE = "DEPICT_KERNELS_EMULATE_CUDA"
_REBUILD = "pip install --no-build-isolation -e . in a checkout builds it"


def build_record() -> dict:
    """What the build left behind: versions, compiler, flags, instruction sets, commit. Empty without a build."""
    try:
        return _read(_BUILD_RECORD, _BUILD_RECORD.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@functools.lru_cache(maxsize=4)  # every call of an operator on a GPU asks for it
def _read(path: Path, changed: int) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        return {"error": f"{path} is not JSON ({error}); build again"}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


_WHAT = {
    "cpu": "C++ kernels",
    "cuda": "CUDA kernels",
    "cuda_emulated": "CUDA kernels for the emulator",
}


def _library(part: str) -> Path:
    return _HERE / f"_{part}.abi3.so"


@functools.cache
def load(part: str) -> str | None:
    """Loads ``part`` ("cpu", "cuda" or "cuda_emulated") once. Returns None where that worked, else the reason."""
    what, library, record = _WHAT[part], _library(part), build_record()
    # A library that the build record disowns is an earlier build's, left in the tree: of other sources, other flags.
    if not library.exists() or record.get(part, {}).get("built") is False:
        reason = record.get(part, {}).get("reason")
        if part == "cuda_emulated":
            return f"the {what} are not built; {EMULATE}=1 {_REBUILD}"
        return f"the {what} were not built: {reason}" if reason else f"the {what} are not built; {_REBUILD}"
    machine = record.get("machine", platform.machine())
    if machine != platform.machine():
        return f"the {what} were built for {machine}, this is {platform.machine()}"
    target = record.get("torch_target")
    if target is not None and _version(torch.__version__) < _version(target):
        return f"the {what} were built for torch {target} and later, you have {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built = record.get("torch", "an unknown torch")
        return f"the {what} (built with torch {built}, you have {torch.__version__}) did not load: {error}"
    return None


@functools.cache
def why_not_on_driver() -> str | None:
    """None where the driver can run the CUDA kernels' runtime, else the reason. Needs ``load("cuda")``."""
    return torch.ops.depict_kernels_cuda.why_no_runtime() or None


def why_not_on_gpu(capability: tuple[int, int]) -> str | None:
    """None where the CUDA kernels were compiled for a GPU of this compute capability, else the reason."""
    built = build_record().get("cuda", {}).get("architectures", [])
    for entry in built:
        exact = entry.removesuffix("+PTX")
        major, minor = (int(part) for part in exact.rstrip("abcdefghijklmnopqrstuvwxyz").split("."))
        same_family = major == capability[0] and minor <= capability[1]
        if exact[-1].isalpha() and not exact.endswith("f"):  # "9.0a" runs on 9.0 alone
            same_family = (major, minor) == capability
        # PTX of "9.0a" or "10.0f" runs where their machine code does and nowhere else.
        later = entry.endswith("+PTX") and not exact[-1].isalpha() and (major, minor) <= capability
        if same_family or later:
            return None
    own = f"{capability[0]}.{capability[1]}"
    build_for = "9.0a" if own == "9.0" else own  # with Hopper's own products
    return (
        f"the CUDA kernels were built for compute capability {', '.join(built)} and this GPU has {own}; "
        f"TORCH_CUDA_ARCH_LIST={build_for} {_REBUILD}"
    )


def emulated() -> bool:
    """Whether backend ``cuda`` takes CPU tensors and runs its kernels in the emulator (a test's way)."""
    return os.environ.get(EMULATE, "").lower() not in ("", "0", "false", "no", "off")


def status() -> dict[str, str]:
    """The compiled parts in a few lines of text: state of each module, then the build record."""
    record = build_record()
    lines = {part: f"not available: {load(part)}" for part in ("cpu", "cuda")}
    if load("cpu") is None:
        ops = torch.ops.depict_kernels_cpu
        sets = ops.instruction_sets().replace(" ", ", ")
        lines["cpu"] = f"loaded, uses {ops.use_instruction_set('')} of {sets}"
    if load("cuda") is None:
        cuda = record.get("cuda", {})
        built = ", ".join(cuda.get("architectures", ["?"]))
        lines["cuda"] = f"loaded, CUDA {cuda.get('nvcc', 'unknown')} for {built}"
    if emulated():
        lines["cuda emulator"] = load("cuda_emulated") or "loaded"
    for key in ("error", "date", "commit", "compiler", "torch", "torch_target", "python", "machine"):
        if key in record:
            lines[key.replace("_", " ")] = str(record[key])
    if record.get("cpu", {}).get("flags"):
        lines["flags"] = record["cpu"]["flags"]
    return lines
