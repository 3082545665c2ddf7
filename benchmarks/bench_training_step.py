"""A whole training step (forward, loss, backward) with the loss on the C++ backend and on stock torch, interleaved.

    python benchmarks/bench_training_step.py [--rounds 5] [--threads 2] [--output FILE.json]

Everything but the three upsample operators is the same code: the ratio is what the loss is worth end to end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from depict_kernels import use_backend
from depict_kernels.models import create_model

MODELS = ("depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny")
BATCH, SIZE = 2, 512


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median seconds per step: "torch", "auto" (C++ for the loss), "backbone" (forward and backward alone)."""
    torch.manual_seed(0)
    model = create_model(name, img_size=SIZE).train()
    images, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 150, (BATCH, SIZE, SIZE))

    def step(backend: str) -> float:
        model.zero_grad()
        start = time.perf_counter()
        if backend == "backbone":
            model.backbone(images).sum().backward()
        else:
            with use_backend(backend):
                model.loss(images, target).backward()
        return time.perf_counter() - start

    ways = ("torch", "auto", "backbone")
    times = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            seconds = step(way)
            if turn:  # the first turn warms up
                times[way].append(seconds)
    result = {f"{way}_s": statistics.median(values) for way, values in times.items()}
    result["ratio"] = statistics.median(a / b for a, b in zip(times["torch"], times["auto"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_step_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {"torch": torch.__version__, "threads": args.threads, "batch": BATCH, "size": SIZE, "models": {}}
    for name in MODELS:
        row = record["models"][name] = measure(name, args.rounds)
        print(f"{name:26}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
