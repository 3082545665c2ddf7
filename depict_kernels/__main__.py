"""``python -m depict_kernels``: which backends work here, why the others do not, versions, auto's choices."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess

import torch

import depict_kernels
from depict_kernels import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found"
    out = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return next((line.split("release ")[-1] for line in out.splitlines() if "release" in line), "unknown")


def status() -> dict:
    """What the page shows, as a dictionary that json can write."""
    from depict_kernels import extension

    device = "cuda" if torch.cuda.is_available() else "cpu"
    page = {
        "versions": {
            "depict_kernels": depict_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "timm": _version("timm"),
            "numpy": _version("numpy"),
            "nvcc": _nvcc(),
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "compiled part": extension.status(),
        "auto from": backends.auto_source(device),
        "operators": {},
    }
    for operator in backends.OPERATORS:
        reasons = {
            name: backends.why_unavailable(name, operator, device, torch.float32)
            for name in backends.BACKENDS
        }
        page["operators"][operator] = {
            "auto": backends.auto_choices(operator, device),
            "available": [name for name, reason in reasons.items() if reason is None],
            "unavailable": {name: reason for name, reason in reasons.items() if reason is not None},
        }
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m depict_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the page as JSON")
    page = status()
    if parser.parse_args().json:
        print(json.dumps(page, indent=2))
        return
    print("  ".join(f"{name} {version}" for name, version in page["versions"].items()))
    print(f"device: {page['device']}")
    print("compiled part:")
    for key, value in page["compiled part"].items():
        print(f"  {key}: {value}")
    print("operators (float32):")
    for operator, row in page["operators"].items():
        print(f"  {operator:26} available: {', '.join(row['available'])}")
    print(f"auto takes ({page['auto from']}):")
    for operator, row in page["operators"].items():
        *shapes, (_, default) = row["auto"].items()
        print(f"  {operator:26} {'otherwise ' if shapes else ''}{default}")
        for shape, name in shapes:
            print(f"    {shape:64} {name}")
    seen = {}
    for operator, row in page["operators"].items():
        for name, reason in row["unavailable"].items():
            seen.setdefault((name, reason.replace(operator, "these")), []).append(operator)
    print("not available:")
    for (name, reason), operators in seen.items():
        print(f"  {name:10} {reason}  [{', '.join(operators)}]")


if __name__ == "__main__":
    main()
