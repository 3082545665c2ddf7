"""The README's speed tables, from the records in benchmarks/results/.

python benchmarks/report.py      # rewrites the README between its markers
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: begin (benchmarks/report.py) -->", "<!-- speed: end -->"


def _load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def speed() -> str:
    """The tables as Markdown."""
    upsample, step, loader = (
        _load(f"{name}.json") for name in ("upsample_cpu", "training_step_cpu", "loader_cpu")
    )
    where = upsample["environment"]
    lines = [
        f"CPU, {where['threads']} threads, torch {where['torch']}, float32, interleaved with stock torch in one "
        "process (medians of the quietest third of the rounds; the ratio over all rounds in brackets).",
        "",
        "| against `F.interpolate` and `F.cross_entropy`, forward + backward | stock | `cpp` | ratio | gradient error "
        "(stock's) |",
        "|---|---|---|---|---|",
    ]
    for name, row in upsample["loss"].items():
        lines.append(
            f"| {name}: {row['shape'].replace('->', 'to')} | {row['stock_ms']:.0f} ms | {row['kernel_ms']:.1f} ms | "
            f"{row['ratio']:.0f} ({row['median_ratio']:.0f}) | {row['gradient_error']:.1e} "
            f"({row['stock_gradient_error']:.1e}) |"
        )
    lines += [
        "",
        "| against `F.interpolate` and `argmax` | stock | `cpp` | ratio | different labels |",
        "|---|---|---|---|---|",
    ]
    for name, row in upsample["labels"].items():
        lines.append(
            f"| {name} logits, (2, 150, 32, 32) to (512, 512) | {row['stock_ms']:.0f} ms | {row['kernel_ms']:.1f} ms | "
            f"{row['ratio']:.0f} ({row['median_ratio']:.0f}) | {row['mismatches']} |"
        )
    memory = upsample["memory_mib"]
    lines += [
        "",
        f"Extra peak memory of the loss at 512 x 512: {memory['kernel_512']:.0f} MiB against {memory['stock_512']:.0f} "
        f"MiB; at 2048 x 2048 it is {memory['kernel_2048']:.0f} MiB.",
        "",
        f"| whole training step, batch {step['batch']}, {step['size']} x {step['size']}, {step['threads']} threads | "
        "stock loss | `cpp` loss | backbone alone | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, row in step["models"].items():
        lines.append(
            f"| {name} | {row['torch_s']:.2f} s | {row['auto_s']:.2f} s | {row['backbone_s']:.2f} s | "
            f"{row['ratio']:.2f} |"
        )
    ms = loader["ms_per_image"]
    lines += [
        "",
        "| loader, one thread, 512 x 512 crops of real ADE20K images | ms per image | ratio |",
        "|---|---|---|",
        f"| decode, resize, crop, distort, normalise in the worker (torchvision v2) | {ms['plain']:.1f} | 1 |",
        f"| ours, in the worker, from JPEG | {ms['jpeg']:.1f} | {ms['plain'] / ms['jpeg']:.1f} |",
        f"| ours, in the worker, from the decoded cache | {ms['cache']:.1f} | {ms['plain'] / ms['cache']:.1f} |",
        f"| ours, what moves to the device, if that is this CPU | {ms['device']:.1f} | |",
    ]
    return "\n".join(lines)


def with_speed(readme: str) -> str:
    """The README's text with the tables between the markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{speed()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_speed(path.read_text()))
