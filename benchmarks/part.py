"""Runs one part of ``make gpu`` within a time limit and notes how it ended in the GPU's record.

    python benchmarks/part.py NAME [--limit SECONDS] [--record FILE-OR-FOLDER] -- COMMAND ...

The command's output passes through. Without a GPU it runs all the same, so that a part can be rehearsed, and
nothing is recorded. Exit status: the command's; 124 where the limit ended it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(command: list[str], limit: float) -> tuple[int, float, str]:
    """(exit status, seconds, last line of output that says something)."""
    begin, last = time.monotonic(), ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # with the children, which may hold the GPU

    timer = threading.Timer(limit, stop)
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip(" =\n") or last
    status = process.wait()
    timer.cancel()
    if late.is_set():
        status, last = 124, f"stopped after {limit:g} s; last line: {last}"
    return status, time.monotonic() - begin, last[-300:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--limit", type=float, default=570.0)
    parser.add_argument("--record", default=str(ROOT / "benchmarks" / "results"))
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    args, command = parser.parse_args(own[:cut]), own[cut + 1 :]
    if not command:
        parser.error("give the command after --")
    status, seconds, last = run(command, args.limit)

    import torch

    if not torch.cuda.is_available():
        print(f"{args.name}: exit status {status} after {seconds:.0f} s; not recorded: there is no CUDA GPU")
        return status
    from benchmarks.record import Record, where

    # Without auto's choices, for which kernels run: one that hangs shall not hang this too.
    record = Record(where(args.record, "cuda"), "cuda", auto=False)
    part = {"command": " ".join(command), "status": status, "seconds": round(seconds, 1), "summary": last}
    record.set("parts", record.data.get("parts", {}) | {args.name: part})
    print(f"{args.name}: exit status {status} after {seconds:.0f} s; noted in {record.path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
