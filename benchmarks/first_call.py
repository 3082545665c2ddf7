"""Seconds of every Triton operator's first forward and backward call in a process, without and with compiled kernels.

    python benchmarks/first_call.py [--match TEXT]

Each operator runs in two new processes that share a kernel cache, empty at first: the first compiles, the second loads.
Without a GPU TRITON_INTERPRET=1 runs a tiny example, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def first_call(name: str, device: str) -> float:
    """Seconds of the call of tune.py with this name, the first thing that this process runs on Triton."""
    import torch

    from benchmarks import tune

    (call,) = (c for c in tune.calls(tiny=device == "cpu") if c.name == name)
    inputs = [t.detach().to(device).requires_grad_(t.requires_grad) for t in call.inputs(call.batch)]
    call.outputs(inputs, "torch")  # the device's context and libraries are not what is measured
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    call.outputs(inputs, "triton")
    finish()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only calls whose name contains this")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "DEVICE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(first_call(*args.child))
        return 0
    import torch

    from benchmarks import tune

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("no GPU here; TRITON_INTERPRET=1 runs a tiny example in Triton's interpreter", file=sys.stderr)
        return 2
    print(f"{'call':44} compiling  cached   (seconds)")
    failed = False
    for call in tune.calls(tiny=device == "cpu"):
        if args.match not in call.name:
            continue
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--child", call.name, device]
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            run = lambda: subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            try:
                empty, warm = (float(run().stdout.split()[-1]) for _ in range(2))
            except subprocess.CalledProcessError as error:
                failed, last = True, error.stderr.strip().splitlines()[-1:]
                print(
                    f"{call.name:44} failed: {' '.join(last) or f'exit status {error.returncode}'}",
                    flush=True,
                )
                continue
        print(f"{call.name:44} {empty:9.2f} {warm:7.2f}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
