"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time, and of the CUDA C++ kernels
in the compiled library or, with --architectures, compiled for these: no GPU needed.

    python benchmarks/kernel_report.py [--core] [--targets sm_80 sm_90 gfx942] [--match TEXT] [--json FILE]
    python benchmarks/kernel_report.py --cuda-only [--architectures sm_80 sm_120] [--match TEXT] [--json FILE]

NVIDIA: registers per thread, dynamic shared memory, bytes of stack per thread (spills) from
``cuobjdump --dump-resource-usage``. AMD: vector registers, shared memory, spilled vector registers. Exits with 1
where a kernel spills that must not (16 bit, head_dim <= 128) or the assembler overwrote what wgmma reads
(wgmma_inputs.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cuda_report
from benchmarks.wgmma_inputs import overwritten


def report(targets: tuple[str, ...], core: bool, match: str, workers: int) -> list[dict]:
    """One row per compiled variant; prints each as it is done."""
    from benchmarks import triton_variants
    from depict_kernels.ops.triton_kernels import launch

    def build(variant) -> dict:
        start = time.perf_counter()
        row = {
            "name": variant.name,
            "target": variant.target,
            "num_warps": variant.launch.num_warps,
            "num_stages": variant.launch.num_stages,
            "may_spill": variant.may_spill,
        }
        compiled = launch.compile_ahead(variant.launch, variant.target)
        row.update(resources(compiled), seconds=round(time.perf_counter() - start, 2))
        row["overwritten"] = (
            overwritten(_dumped(compiled, "nvdisasm", "-c"))[1]
            if "wgmma" in compiled.asm.get("ptx", "")
            else []
        )
        return row

    chosen = [v for v in triton_variants.variants(targets, core=core) if match in v.name]
    rows = []
    print(f"{'kernel':58} {'target':7} warps stages registers  shared spills seconds")
    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(build, chosen):
            rows.append(row)
            print(
                f"{row['name']:58} {row['target']:7} {row['num_warps']:5} {row['num_stages']:6} "
                f"{row['registers']:9} {row['shared']:7} {row['spills']:6} {row['seconds']:7.2f}",
                flush=True,
            )
    return rows


def resources(compiled) -> dict[str, int]:
    """Registers, shared memory (bytes) and spills of a kernel that ``launch.compile_ahead`` gave."""
    if "amdgcn" in compiled.asm:
        field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))
        registers, spills = field("vgpr_count"), field("vgpr_spill_count")
    else:
        text = _dumped(compiled, "cuobjdump", "--dump-resource-usage")
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
    return {"registers": registers, "shared": compiled.metadata.shared, "spills": spills}


def _dumped(compiled, tool: str, option: str) -> str:
    """What a tool that Triton brings along says of the machine code."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--core", action="store_true", help="only the variants that CI compiles")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=[],
        help="compile the CUDA C++ kernels for these (sm_80, sm_90a)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cuda-only", action="store_true", help="only the CUDA C++ kernels of the library")
    only.add_argument("--triton-only", action="store_true", help="only the Triton kernels")
    args = parser.parse_args()
    rows = [] if args.cuda_only else report(tuple(args.targets), args.core, args.match, args.workers)
    rows += [] if args.triton_only else cuda_report.report(args.match, tuple(args.architectures))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    spilled = cuda_report.spilled(rows)
    print(f"{len(rows)} kernels; spills where there must be none: {', '.join(spilled) or 'none'}")
    faults = [fault for r in rows for fault in r.get("overwritten", [])]
    if not args.triton_only and cuda_report.why_not() is None:
        count, more = cuda_report.wgmma_inputs()
        print(f"{count} of the library's wgmma read registers")
        faults += more
    print(f"registers of wgmma overwritten: {', '.join(faults) or 'none'}")
    return 1 if spilled or faults else 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None) == "1":  # before the kernels are defined
        print("TRITON_INTERPRET is ignored here", file=sys.stderr)
    sys.exit(main())
