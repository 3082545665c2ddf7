"""The compiled part: found and loaded at first use, with the reason at hand where it cannot be.

The build writes ``_build.json`` beside this file: what was built, from which commit, with which compiler and torch,
or why it was not. ``python -m depict_kernels`` prints :func:`status`.
"""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_CPU_LIBRARY = _HERE / "_cpu.abi3.so"
_BUILD_RECORD = _HERE / "_build.json"
_REBUILD = "pip install --no-build-isolation -e . in a checkout builds it"


def build_record() -> dict:
    """What the build left behind: versions, compiler, flags, instruction sets, commit. Empty without a build."""
    try:
        return json.loads(_BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        return {"error": f"{_BUILD_RECORD} is not JSON ({error}); build again"}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


@functools.cache
def load_cpu() -> str | None:
    """Loads the C++ kernels once. Returns None where that worked, else the reason in one sentence."""
    record = build_record()
    if not _CPU_LIBRARY.exists():
        reason = record.get("cpu", {}).get("reason")
        return (
            f"the C++ kernels were not built: {reason}"
            if reason
            else f"the C++ kernels are not built; {_REBUILD}"
        )
    machine = record.get("machine", platform.machine())
    if machine != platform.machine():
        return f"the C++ kernels were built for {machine}, this is {platform.machine()}"
    target = record.get("torch_target")
    if target is not None and _version(torch.__version__) < _version(target):
        return f"the C++ kernels were built for torch {target} and later, you have {torch.__version__}"
    try:
        torch.ops.load_library(str(_CPU_LIBRARY))
    except OSError as error:
        built = record.get("torch", "an unknown torch")
        return (
            f"the C++ kernels (built with torch {built}, you have {torch.__version__}) did not load: {error}"
        )
    return None


def cpu_available() -> tuple[bool, str | None]:
    """(True, None) where the C++ kernels run here, else (False, reason)."""
    reason = load_cpu()
    return reason is None, reason


def status() -> dict[str, str]:
    """The compiled part in a few lines of text: state of each module, then the build record."""
    reason = load_cpu()
    if reason is None:
        ops = torch.ops.depict_kernels_cpu
        cpu = f"loaded, uses {ops.use_instruction_set('')} of {ops.instruction_sets().replace(' ', ', ')}"
    else:
        cpu = f"not available: {reason}"
    lines = {"cpu": cpu}
    record = build_record()
    for key in ("error", "date", "commit", "compiler", "torch", "torch_target", "python", "machine"):
        if key in record:
            lines[key.replace("_", " ")] = str(record[key])
    if record.get("cpu", {}).get("flags"):
        lines["flags"] = record["cpu"]["flags"]
    return lines
