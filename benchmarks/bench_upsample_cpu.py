"""The CPU upsample operators against stock torch: time, accuracy and memory, interleaved in one process.

    python benchmarks/bench_upsample_cpu.py [--rounds 9] [--threads 2] [--output FILE.json]
    python -m pytest benchmarks/bench_upsample_cpu.py        # the same figures, asserted against the goals

Every round runs stock torch and the kernel one after the other, so that both see the same machine. "ratio" is the
median over the third of the rounds in which stock torch was fastest, that is in which the machine was least busy
with other things; "all" is the median over all rounds. Correctness comes first: a case
whose gradient error exceeds torch's own is reported as wrong and fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from depict_kernels import extension, ops

IGNORE = 255


def _noise(batch, classes, h, w, sharpness=1.0):
    return torch.randn(batch, classes, h, w, generator=torch.Generator().manual_seed(0)) * sharpness


def _smooth(batch, classes, h, w, sharpness=1.0):
    coarse = _noise(batch, classes, 4, 4, 4.0 * sharpness)
    return F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)


# name: (logits, target size, least ratio asked for)
LOSS_CASES = {
    "random": (lambda: _noise(2, 150, 32, 32), (512, 512), 60),
    "smooth": (lambda: _smooth(2, 150, 32, 32), (512, 512), 60),
    "smooth x 5": (lambda: _smooth(2, 150, 32, 32, 5), (512, 512), 60),
    "smooth x 30": (lambda: _smooth(2, 150, 32, 32, 30), (512, 512), 12),
    "x 5": (lambda: _noise(2, 150, 32, 32, 5), (512, 512), 60),
    "x 30 (careful path)": (lambda: _noise(2, 150, 32, 32, 30), (512, 512), 12),
    "x 200 (careful path)": (lambda: _noise(2, 150, 32, 32, 200), (512, 512), 12),
    "Cityscapes, C = 19": (lambda: _noise(1, 19, 48, 96), (768, 1536), 20),
    "scale 13.5 and 12.9": (lambda: _noise(1, 150, 37, 53), (500, 683), 20),
    "scale 4": (lambda: _noise(1, 150, 128, 128), (512, 512), 20),
}
LABEL_CASES = {
    "random": (lambda: _noise(2, 150, 32, 32), (512, 512), 80),
    "smooth": (lambda: _smooth(2, 150, 32, 32), (512, 512), 300),
}


def interleave(stock: Callable, kernel: Callable, rounds: int) -> dict[str, float]:
    stock(), kernel()
    pairs = []
    for _ in range(rounds):
        begin = time.perf_counter()
        stock()
        middle = time.perf_counter()
        # Three runs, the middle one: a single interruption weighs more on a run this short.
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            kernel()
            runs.append(time.perf_counter() - start)
        pairs.append((middle - begin, statistics.median(runs)))
    pairs.sort()
    quiet = pairs[: (len(pairs) + 2) // 3]
    return {
        "stock_ms": 1e3 * statistics.median(a for a, _ in quiet),
        "kernel_ms": 1e3 * statistics.median(b for _, b in quiet),
        "ratio": statistics.median(a / b for a, b in quiet),
        "median_ratio": statistics.median(a / b for a, b in pairs),
    }


def _differentiate(loss: Callable, logits: torch.Tensor, target: torch.Tensor):
    x = logits.detach().requires_grad_()
    value = loss(x, target)
    return value.detach(), torch.autograd.grad(value, x)[0]


def stock_loss(x, target):
    high = F.interpolate(x, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(high, target, ignore_index=IGNORE)


def kernel_loss(x, target):
    return ops.upsample_cross_entropy(x, target, ignore_index=IGNORE, backend="cpp")


def bench_loss(name: str, rounds: int) -> dict:
    make, size, goal = LOSS_CASES[name]
    logits = make()
    target = torch.randint(
        0, logits.shape[1], (len(logits), *size), generator=torch.Generator().manual_seed(1)
    )
    loss64, grad64 = _differentiate(stock_loss, logits.double(), target)
    loss32, grad32 = _differentiate(stock_loss, logits, target)
    loss, grad = _differentiate(kernel_loss, logits, target)
    largest = grad64.abs().max()
    ulp = math.ulp(loss64.float().item()) * 2**29
    row = {
        "shape": f"{tuple(logits.shape)} -> {size}",
        "goal": goal,
        "gradient_error": ((grad.double() - grad64).abs().max() / largest).item(),
        "stock_gradient_error": ((grad32.double() - grad64).abs().max() / largest).item(),
        "loss_ulps": ((loss.double() - loss64).abs() / ulp).item(),
        "stock_loss_ulps": ((loss32.double() - loss64).abs() / ulp).item(),
    }
    del loss64, grad64, loss32, grad32
    row |= interleave(
        lambda: _differentiate(stock_loss, logits, target),
        lambda: _differentiate(kernel_loss, logits, target),
        rounds,
    )
    row["right"] = row["gradient_error"] <= row["stock_gradient_error"] and row["loss_ulps"] <= 1
    return row


def bench_labels(name: str, rounds: int) -> dict:
    make, size, goal = LABEL_CASES[name]
    logits = make()

    def stock(x=logits):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False).argmax(1)

    def kernel():
        return ops.upsample_argmax(logits, size, backend="cpp")

    wrong = stock() != kernel()
    best = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False).topk(2, 1).values
    gap = (best[:, 0] - best[:, 1])[wrong]
    row = {"shape": f"{tuple(logits.shape)} -> {size}", "goal": goal, "mismatches": int(wrong.sum())}
    row["right"] = bool((gap <= 4e-7 * logits.abs().max()).all())  # nothing but ties within rounding
    return row | interleave(stock, kernel, rounds)


_PEAK = """
import os, sys, torch
from depict_kernels import ops
import torch.nn.functional as F
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
def run(kind, logits, target):
    if kind == "kernel":
        loss = ops.upsample_cross_entropy(logits, target, backend="cpp")
    else:
        loss = F.cross_entropy(F.interpolate(logits, size=target.shape[1:], mode="bilinear"), target)
    return torch.autograd.grad(loss, logits)[0]
kind, size = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
run(kind, torch.randn(1, 5, 2, 2, requires_grad=True), torch.zeros(1, 9, 9, dtype=torch.int64))
logits = torch.randn(2, 150, 32, 32, requires_grad=True)
target = torch.randint(0, 150, (2, size, size))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
gradient = run(kind, logits, target)
print(status("VmHWM") - before)
"""


def bench_memory(threads: int) -> dict[str, float]:
    """Peak memory of forward + backward above what stood before, MiB, each in a fresh process."""

    def peak(kind: str, size: int) -> float:
        command = [sys.executable, "-c", _PEAK, kind, str(size), str(threads)]
        root = Path(__file__).resolve().parents[1]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)

    return {
        "kernel_512": peak("kernel", 512),
        "kernel_2048": peak("kernel", 2048),
        "stock_512": peak("stock", 512),
    }


def bench_growth(rounds: int) -> dict[str, float]:
    """Milliseconds of forward + backward for 256^2 to 2048^2 pixels, and per megapixel."""
    logits, row = _noise(1, 150, 32, 32), {}
    for size in (256, 512, 1024, 2048):
        target = torch.randint(0, 150, (1, size, size), generator=torch.Generator().manual_seed(1))
        times = []
        for _ in range(max(3, rounds)):
            begin = time.perf_counter()
            _differentiate(kernel_loss, logits, target)
            times.append(time.perf_counter() - begin)
        row[f"{size}_ms"] = 1e3 * min(times)
        row[f"{size}_ms_per_megapixel"] = 1e3 * min(times) / (size * size / 2**20)
    return row


def environment(threads: int) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": next(
            (
                l.split(":", 1)[1].strip()
                for l in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in l
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor(),
        "threads": threads,
        "extension": extension.status(),
    }


def run(rounds: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    result = {"environment": environment(threads), "loss": {}, "labels": {}}
    print(
        f"{'forward + backward':22} {'stock ms':>9} {'ms':>8} {'ratio':>7} {'all':>7} {'goal':>5}"
        f" {'grad error':>11} {'of stock':>9} {'loss ulp':>8}"
    )
    for name in LOSS_CASES:
        row = result["loss"][name] = bench_loss(name, rounds)
        print(
            f"{name:22} {row['stock_ms']:9.1f} {row['kernel_ms']:8.2f} {row['ratio']:7.1f} {row['median_ratio']:7.1f}"
            f" {row['goal']:5} {row['gradient_error']:11.2e} {row['stock_gradient_error']:9.2e}"
            f" {row['loss_ulps']:8.2f}{'' if row['right'] else '  WRONG'}",
            flush=True,
        )
    for name in LABEL_CASES:
        row = result["labels"][name] = bench_labels(name, rounds)
        print(
            f"{'argmax, ' + name:22} {row['stock_ms']:9.1f} {row['kernel_ms']:8.2f} {row['ratio']:7.1f}"
            f" {row['median_ratio']:7.1f} {row['goal']:5} {row['mismatches']:7} mismatches"
            f"{'' if row['right'] else '  WRONG'}",
            flush=True,
        )
    result["growth"] = bench_growth(rounds)
    print("time by size:", ", ".join(f"{k} {v:.2f}" for k, v in result["growth"].items()))
    if sys.platform.startswith("linux"):
        result["memory_mib"] = bench_memory(threads)
        print("peak memory, MiB:", ", ".join(f"{k} {v:.1f}" for k, v in result["memory_mib"].items()))
    return result


def test_goals():
    result = run(rounds=5, threads=2)
    for name, row in (result["loss"] | {f"argmax {k}": v for k, v in result["labels"].items()}).items():
        assert row["right"], name
        assert row["ratio"] >= row["goal"], (name, row["ratio"])
    assert result["memory_mib"]["kernel_512"] < 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/upsample_cpu.json"))
    arguments = parser.parse_args()
    result = run(arguments.rounds, arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
