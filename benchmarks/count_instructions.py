"""Instructions, accesses and lower bounds of time of the CUDA and Triton kernels, counted without a GPU.

    python benchmarks/count_instructions.py [--backend cuda|triton] [--match TEXT] [--arch sm_90] [--lines]
        [--json FILE]

tests/ptx executes the kernels' PTX and counts; ptxas and nvdisasm tell which machine instructions (SASS) each PTX
instruction became (tests/ptx/machine_code.py). The problem is a training step's at 512 x 512: B = 8, 3 heads, 1174
tokens, 150 classes, width 384, bfloat16. Run are one image and one head, all of whose tokens are there, times 24 in
attention and times 8 in the mask head: blocks do the same for every head and image. Of the upsample operators the upper
8 of 32 rows of cells are run (--rows), times the tiles, 8 * 33 * 33 / (9 * 33), or the cells where a kernel walks them:
tiles at the border, which do less, are 27 % of the strip's, 12 % of the whole's. Random: logits and labels are
noise; smooth: as a trained model's, with labels in regions.

Counts, not timings. Microseconds are lower bounds, at the full rate of an H100 SXM (or A100): one warp instruction per
clock and scheduler; one wavefront of shared memory per clock and SM ("ideal": without bank conflicts); 4 sectors of 32
bytes per clock and SM through L1; 16 lanes per clock and SM of exponentials, logarithms and reciprocals (MUFU); tensor
cores. The largest is the floor. Nothing here knows of latency, occupancy, the last wave, L2 or device memory, or that
mma.sync (HMMA) does not reach the rate of wgmma (HGMMA) on Hopper. What wgmma reads from shared memory itself is not
counted. Sectors' ideal: the fewest that hold the bytes of a warp's access.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import cuda_report
from benchmarks.cases import Case

BACKENDS = ("cuda", "triton")
PER_CELL = ("pack", "gather")  # upsample kernels that walk cells, not tiles between cells
TILE = 16  # pixels of a tile of the upsample kernels, which is a cell at scale 16


@dataclass(frozen=True)
class Card:
    """Rates of a GPU: multiprocessors, GHz, dense 16-bit operations of tensor cores per clock and multiprocessor."""

    name: str
    multiprocessors: int
    ghz: float
    tensor_flops: int

    def microseconds(self, amount: float, per_clock: float) -> float:
        return amount / (per_clock * self.multiprocessors * self.ghz * 1e3)


CARDS = {"sm_90": Card("H100 SXM", 132, 1.755, 4096), "sm_80": Card("A100 SXM", 108, 1.41, 2048)}


@dataclass(frozen=True)
class Counted:
    """A problem that is run and how often the whole contains it."""

    name: str
    case: Case
    times: float
    wgmma: bool = False  # the variant of the CUDA attention that is off by default
    rows: int | None = None  # only so many rows of cells are run


def problems(rows: int = 8) -> list[Counted]:
    size = {"dtype": torch.bfloat16}
    tiles = 8 * 33 / (rows + 1)
    labels = (1, 150, 32, 32, 32 * TILE, 32 * TILE)
    own = Case("subspace_self_attention", (1, 1174, 1, 100), **size)
    return [
        Counted("self attention, d = 100", own, 24),
        Counted("self attention, d = 100, wgmma", own, 24, wgmma=True),
        Counted(
            "cross attention, d = 50", Case("subspace_cross_attention", (1, 150, 1024, 1, 50), **size), 24
        ),
        Counted("mask head", Case("mask_logits", (1, 150, 32, 32, 384), **size), 8),
        *(
            Counted(
                f"{text}, {'smooth' if smooth else 'random'}",
                Case(operator, labels, smooth=smooth, backward=backward, **size),
                tiles,
                rows=rows,
            )
            for text, operator, backward in (
                ("loss with gradient", "upsample_cross_entropy", True),
                ("label map", "upsample_argmax", False),
            )
            for smooth in (False, True)
        ),
    ]


def why_not(backend: str) -> str | None:
    """What keeps the kernels of ``backend`` from being counted, or None."""
    from tests.ptx import machine_code

    if reason := machine_code.why_not():
        return reason
    if backend == "cuda":
        from tests.ptx import cuda_runs

        return cuda_runs.why_not()
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@contextlib.contextmanager
def _executing(backend: str, architecture: str, profile) -> Iterator[None]:
    """Within the context the backend takes CPU tensors and executes PTX."""
    from depict_kernels import backends, extension

    why, emulate = backends.why_unavailable, os.environ.get(extension.EMULATE)
    if backend == "cuda":
        from tests.ptx import cuda_runs as runs

        os.environ[extension.EMULATE] = "1"
    else:
        from tests.ptx import triton_runs as runs

        backends.why_unavailable = lambda name, operator, device, dtype: why(name, operator, "cuda", dtype)
    try:
        with runs.executing(architecture, profile=profile):
            yield
    finally:
        backends.why_unavailable = why
        os.environ.pop(extension.EMULATE, None)
        if emulate is not None:
            os.environ[extension.EMULATE] = emulate


def _call(problem: Counted, backend: str) -> None:
    """The operator once, forward and backward."""
    from depict_kernels import ops

    case = problem.case
    function = getattr(ops, case.operator)
    inputs = list(case.inputs())
    if rows := problem.rows:
        if case.smooth and case.differentiable:  # smooth labels too, as ground truth is
            inputs[1] = F.interpolate(inputs[0].float(), inputs[1].shape[1:], mode="bilinear").argmax(1)
        inputs[0] = inputs[0][..., :rows, :].contiguous()
    for i in case.differentiable:
        inputs[i].requires_grad_()
    if case.family == "attention":
        out = function(*inputs, backend=backend)
    elif case.family == "mask_head":
        out = function(*inputs, (case.h, case.w), backend=backend)
    elif case.operator == "upsample_cross_entropy":
        target = inputs[1][:, : TILE * rows].to(torch.uint8)
        out = function(inputs[0], target, backend=backend)
    else:
        out = function(inputs[0], (TILE * rows, case.W), torch.uint8, backend=backend)
    if case.differentiable:
        out.backward(torch.ones_like(out))


def count(problem: Counted, backend: str, architecture: str) -> list[dict]:
    """One row for each kernel that the problem starts, in the order of the launches; counts of the whole problem."""
    from tests.ptx.profile import ByProgram

    profile = ByProgram()
    with contextlib.ExitStack() as stack:
        if problem.wgmma:
            from depict_kernels.ops.cuda_kernels import attention

            stack.enter_context(attention.force_variant(attention.WGMMA))
        # wgmma belongs to compute_90a; Triton adds the letter by itself
        letter = "a" if architecture == "sm_90" else ""
        own = architecture + letter if backend == "cuda" else architecture
        stack.enter_context(_executing(backend, own, profile))
        _call(problem, backend)
    rows = []
    for program, counts in profile.profiles():
        (name,) = cuda_report.readable([program.name])
        times = problem.times
        if problem.rows and name.startswith(PER_CELL):
            times = 8 * problem.case.h / problem.rows
        row = {"backend": backend, "problem": problem.name, "times": times, "kernel": name}
        rows.append(row | kernel_row(program, counts, architecture + letter, CARDS[architecture], times))
    return rows


def kernel_row(program, profile, architecture: str, card: Card, times: float) -> dict:
    """Counts of one kernel, ``times`` those of ``profile``, and the time that each takes at least."""
    from tests.ptx import machine_code

    code = machine_code.disassembled(program, architecture)
    opcodes = machine_code.issued(program, code, profile)
    names: Counter[str] = Counter()
    for opcode, issued in opcodes.items():
        names[opcode.partition(".")[0]] += issued
    total = profile.total()
    flops = {"HMMA": 0, "HGMMA": 0}
    for counts in profile.lines.values():
        flops["HGMMA" if "wgmma" in counts.text else "HMMA"] += counts.flops
    microseconds = {
        "issue": card.microseconds(times * names.total(), 4),
        "shared": card.microseconds(times * total.wavefronts, 1),
        "sectors": card.microseconds(times * total.sectors, 4),
        "mufu": card.microseconds(times * names["MUFU"], 0.5),
        "tensor": card.microseconds(times * sum(flops.values()), card.tensor_flops),
    }
    bound = max(microseconds, key=microseconds.get)
    return {
        "instructions": round(times * names.total()),
        "ptx_instructions": round(times * total.issued),
        "by_opcode": {name: round(times * n) for name, n in names.most_common(16)},
        "wavefronts": round(times * total.wavefronts),
        "ideal_wavefronts": round(times * total.ideal_wavefronts),
        "sectors": round(times * total.sectors),
        "ideal_sectors": round(times * total.ideal_sectors),
        "global_bytes": round(times * total.bytes),
        "tensor_flops": {name: round(times * n) for name, n in flops.items()},
        "mufu": round(times * names["MUFU"]),
        "microseconds": {name: round(value, 2) for name, value in microseconds.items()},
        "ideal_shared_microseconds": round(card.microseconds(times * total.ideal_wavefronts, 1), 2),
        "floor": round(microseconds[bound], 2),
        "bound": bound,
        "copied": machine_code.copied(program, code),
        "lines": [
            {
                "what": what,
                "line": line,
                "text": c.text,
                "issued": round(times * c.issued),
                **_excess(c, what, times),
            }
            for what in ("conflicts", "sectors")
            for _, line, c in profile.worst(what, 10)
        ],
    }


def _excess(counts, what: str, times: float) -> dict[str, int]:
    of = "wavefronts" if what == "conflicts" else "sectors"
    taken, ideal = getattr(counts, of), getattr(counts, f"ideal_{of}")
    return {"taken": round(times * taken), "ideal": round(times * ideal)}


HEAD = (
    f"{'kernel':42}{'M instr.':>9}{'us':>7}{'M wavefr.':>10}{'us':>7}{'ideal':>7}{'M sect.':>8}{'ideal':>7}{'MB':>7}"
    f"{'us':>6}{'HMMA':>7}{'HGMMA':>7}{'us':>6}{'M MUFU':>7}{'us':>6}{'floor':>7}  bound"
)


def print_row(row: dict, lines: bool) -> None:
    us, million = row["microseconds"], lambda name: row[name] / 1e6
    print(
        f"{row['kernel'][:41]:42}{million('instructions'):9.2f}{us['issue']:7.1f}{million('wavefronts'):10.2f}"
        f"{us['shared']:7.1f}{row['ideal_shared_microseconds']:7.1f}{million('sectors'):8.2f}"
        f"{million('ideal_sectors'):7.2f}{million('global_bytes'):7.0f}{us['sectors']:6.1f}"
        f"{row['tensor_flops']['HMMA'] / 1e9:7.1f}{row['tensor_flops']['HGMMA'] / 1e9:7.1f}{us['tensor']:6.1f}"
        f"{million('mufu'):7.2f}{us['mufu']:6.1f}{row['floor']:7.1f}  {row['bound']}",
        flush=True,
    )
    if row["copied"]:
        print(
            f"    {row['copied']} blocks of PTX stand several times in the machine code: their counts are estimates"
        )
    if lines:
        for line in row["lines"]:
            print(
                f"    {line['what']}: {line['taken']:,}, ideally {line['ideal']:,}, in {line['issued']:,} issues of "
                f"line {line['line']}: {line['text'][:100]}"
            )


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def versions() -> dict:
    from tests.ptx import cuda_runs

    found = {"commit": _said(["git", "rev-parse", "HEAD"]), "torch": torch.__version__}
    for name, path in (
        ("nvcc", cuda_runs.nvcc()),
        ("ptxas", cuda_report.tool("ptxas")),
        ("ptxas-blackwell", cuda_report.tool("ptxas-blackwell")),
        ("nvdisasm", cuda_report.tool("nvdisasm")),
    ):
        found[name] = _said([path, "--version"]).splitlines()[-1] if path else None
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS, help="only this one")
    parser.add_argument("--match", default="", help="only problems whose name contains this")
    parser.add_argument("--arch", choices=sorted(CARDS), default="sm_90")
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of cells that are run of the upsample operators"
    )
    parser.add_argument(
        "--lines", action="store_true", help="also the PTX lines with most conflicts and sectors"
    )
    parser.add_argument(
        "--json", type=Path, help="also write the rows to this file, beside those of the same commit"
    )
    args = parser.parse_args()
    card, rows = CARDS[args.arch], []
    print(
        f"{args.arch}: lower bounds in us for {card.name}, counted, not timed; GFLOP of tensor cores by instruction"
    )
    for backend in [args.backend] if args.backend else BACKENDS:
        if reason := why_not(backend):
            print(f"{backend}: {reason}")
            if args.backend:
                return 1
            continue
        for problem in problems(args.rows):
            if args.match not in problem.name or (
                problem.wgmma and (backend, args.arch) != ("cuda", "sm_90")
            ):
                continue
            print(f"\n{backend}, {problem.name} (x {problem.times:.4g})\n{HEAD}")
            found = count(problem, backend, args.arch)
            for row in found:
                print_row(row, args.lines)
            rows += found
    if args.json:
        record = {"architecture": args.arch, "card": vars(card), "versions": versions(), "rows": rows}
        if args.json.exists():  # what another call counted of the same sources stays
            before = json.loads(args.json.read_text())
            counted = {(row["backend"], row["problem"]) for row in rows}
            if {**before, "rows": rows} == record:
                rows[:0] = [row for row in before["rows"] if (row["backend"], row["problem"]) not in counted]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None) == "1":  # before the kernels are defined
        print("TRITON_INTERPRET is ignored here", file=sys.stderr)
    sys.exit(main())
