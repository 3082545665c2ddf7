"""What a record says of its machine: device, driver, versions, commit, and what the device can do at best."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.timing import clock, timed

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "timm", "numpy", "pytest-benchmark", "flash-attn", "liger-kernel")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The tree's commit, "-dirty" where files outside the results differ; BENCH_COMMIT where there is no git."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return os.environ.get("BENCH_COMMIT") or "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    paths = [line[3:] for line in changed.splitlines()]
    ours = [p for p in paths if not p.startswith("benchmarks/results/") and not p.endswith("README.md")]
    return found + ("-dirty" if ours else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def slug(device: str) -> str:
    """The device in a file's name: "cpu", "nvidia_h100_80gb_hbm3"."""
    return "cpu" if device == "cpu" else re.sub(r"\W+", "_", device_name(device).lower()).strip("_")


def _program() -> str:
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def environment(device: str, *, auto: bool = True) -> dict:
    """With ``auto``, what that takes here: on a GPU without a measured table its kernels run for it, once."""
    from depict_kernels import backends, extension

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "extension": extension.status(),
    }
    if auto:
        result["auto"] = {name: backends.auto_choices(name, device) for name in backends.OPERATORS}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
        result |= {
            "driver": query or "unknown",
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return result


def abilities(device: str, seconds: float = 3.0) -> dict:
    """Measured best: bytes per second of a copy (read and written), FLOP per second of square products."""
    now, large = clock(device), device == "cuda"
    source = torch.empty(2**30 if large else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    best = _best(functools.partial(target.copy_, source), now, seconds / 4)
    result = {"copy_bytes_per_s": 2 * source.nbytes / best, "flop_per_s": {}}
    kinds = {"float32": torch.float32}
    if large:
        kinds |= {"tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    side = 8192 if large else 1536
    for name, dtype in kinds.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        try:
            best = _best(lambda: a @ b, now, seconds / 4)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        result["flop_per_s"][name] = 2 * side**3 / best
    return result


def _best(call, now, seconds: float) -> float:
    call()
    times, spent = [], 0.0
    while len(times) < 5 or (spent < seconds and len(times) < 200):
        times.append(timed(call, now))
        spent += times[-1]
    return min(times)
