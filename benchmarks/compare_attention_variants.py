"""Times the variants of the CUDA attention kernels against each other on this GPU, at the models' sizes.

    python benchmarks/compare_attention_variants.py [--repeats 50] [--record FILE-OR-FOLDER] [--tiny]

Each result is first held to the float64 error budget. Times are medians of CUDA events, the variants interleaved, with
L2 overwritten before every call. Prints a table, and for every direction the head_dim from which on wgmma was faster at
all sizes in both types; ``--record`` notes both. pytest benchmarks with that record goes by it, and choose.py ships it.
``--tiny`` is a run in the emulator (DEPICT_KERNELS_EMULATE_CUDA=1), whose times mean nothing. Without a GPU of compute
capability 9.0 there is one variant and nothing to compare: it says so and gives 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.timing import clock, timed
from depict_kernels import backends, ops
from depict_kernels.ops.cuda_kernels import attention
from depict_kernels.testing import assert_within_budget, value_and_gradients

VARIANTS = {"mma": attention.MMA, "wgmma": attention.WGMMA}
# batch, patches, heads, head_dim: ViT at 512 and 640 pixels with the classes appended, and other head dimensions.
SIZES = [
    (8, 1174, 3, 100),
    (8, 1750, 3, 100),
    (1, 1750, 3, 100),
    (8, 1174, 3, 50),
    (8, 1174, 3, 64),
    (8, 1174, 3, 128),
]


def calls(w: Tensor, grad: Tensor, scale: float) -> dict[str, tuple[Callable[[], object], int]]:
    """Direction -> what to time, products of N x N x head_dim in it."""
    out, lse = attention.self_attention_forward(w, scale)
    return {
        "forward": (lambda: attention.self_attention_forward(w, scale), 2),
        "self_backward": (lambda: attention.self_attention_backward(grad, w, out, lse, scale), 5),
    }


def check(w: Tensor, grad: Tensor) -> None:
    run = lambda backend: lambda w: ops.subspace_self_attention(w, backend=backend)
    truth = value_and_gradients(run("torch"), [w.double()], grad.double())
    peer = value_and_gradients(run("torch"), [w], grad)
    actual = value_and_gradients(run("cuda"), [w], grad)
    assert_within_budget(actual[0], peer[0], truth[0], what="output")
    largest = grad.abs().max().item()
    assert_within_budget(actual[1][0], peer[1][0], truth[1][0], scale=largest, what="gradient")


def wgmma_from(rows: list[dict]) -> dict[str, int]:
    """Direction -> the least head_dim at which, and at all larger ones, every row has wgmma as the faster one."""
    result = {}
    for direction in {row["direction"] for row in rows}:
        of_it = [row for row in rows if row["direction"] == direction]
        lost = [row["sizes"][-1] for row in of_it if row["wgmma"] >= row["mma"]]
        won = [row["sizes"][-1] for row in of_it if row["sizes"][-1] > max(lost, default=0)]
        if won:
            result[direction] = min(won)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=50, metavar="N")
    parser.add_argument("--record", metavar="PATH")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    if not arguments.tiny and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    ):
        print("skipped: wgmma needs a GPU of compute capability 9.0")
        return 0
    if reason := backends.why_unavailable("cuda", "subspace_self_attention", device, torch.bfloat16):
        parser.error(f"{reason}; DEPICT_KERNELS_EMULATE_CUDA=1 and --tiny run the emulator")
    print("emulator" if arguments.tiny else torch.cuda.get_device_name(), "torch", torch.__version__)
    flush = torch.empty(1 if arguments.tiny else 64 << 20, dtype=torch.int32, device=device)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for sizes in [(1, 70, 1, 100)] if arguments.tiny else SIZES:
            batch, length, heads, dim = sizes
            w, grad = (torch.randn(sizes, device=device).to(dtype) for _ in range(2))
            for variant in VARIANTS.values():
                with attention.force_variant(variant):
                    check(w[:1], grad[:1])
            times: dict[tuple[str, str], list[float]] = {}
            for repeat in range(arguments.repeats + 3):  # the first ones warm up
                for name, variant in VARIANTS.items():
                    with attention.force_variant(variant):
                        for direction, (call, _) in calls(w, grad, dim**-0.5).items():
                            flush.zero_()
                            spent = 1e3 * timed(call, clock(device))
                            if repeat >= 3:
                                times.setdefault((direction, name), []).append(spent)
            for direction, (_, products) in calls(w, grad, dim**-0.5).items():
                medians = {name: statistics.median(times[direction, name]) for name in VARIANTS}
                rows.append({"dtype": str(dtype)[6:], "sizes": sizes, "direction": direction, **medians})
                rate = 2 * products * batch * heads * length**2 * dim / 1e9
                shown = ", ".join(f"{n} {ms:.4f} ms ({rate / ms:.0f} TFLOP/s)" for n, ms in medians.items())
                print(f"{str(dtype)[6:]} {sizes} {direction}: {shown}", flush=True)
    table = wgmma_from(rows)
    print("the head_dim from which on wgmma was faster:", table or "none")
    if arguments.record and not arguments.tiny:
        written = record.Record(record.where(arguments.record, "cuda"), "cuda", auto=False)
        written.set("attention_variants", {"rows": rows, "wgmma_from": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
