"""What needs a process of its own on the CPU: peak memory, and times with an allocator that keeps freed memory.

    python -m benchmarks.own_process peak|kept CASE IMPLEMENTATION THREADS    # prints JSON

By default glibc maps large arrays afresh each time, and on many machines half of eager torch's time at large arrays is
page faults. "kept" repeats the interleaved timing with those thresholds raised, which is eager torch at its best.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

# glibc reads them at its start.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 35)}
ROUNDS = 5


def peak(case, name: str) -> int | None:
    """Bytes above what stood before, forward and backward."""
    from benchmarks import implementations, timing

    # A tiny run first: libraries that are loaded at first use are not the operator's memory.
    tiny = dataclasses.replace(case.rehearsal(), dtype=case.dtype)
    timing.Runner(tiny, implementations.build(tiny, name))()
    return timing.host_peak(timing.Runner(case, implementations.build(case, name)))


def kept(case, name: str) -> dict[str, float]:
    """The interleaved times of eager torch and ``name``, as :func:`benchmarks.timing.quietest` gives them."""
    from benchmarks import implementations, timing

    eager, candidate = (timing.Runner(case, implementations.build(case, n)) for n in ("eager", name))
    pairs = []
    for _ in range(ROUNDS + 2):
        base = timing.timed(eager, timing.host_clock)
        runs = sorted(timing.timed(candidate, timing.host_clock) for _ in range(3))
        pairs.append((base, runs[1]))
    return timing.quietest(pairs[2:])  # the first two fill the allocator


def run(what: str, case_id: str, name: str, threads: int):
    """``peak`` or ``kept`` in another process; None for a peak that cannot be measured (not Linux)."""
    command = [sys.executable, "-m", "benchmarks.own_process", what, case_id, name, str(threads)]
    environment = os.environ | (KEEP if what == "kept" else {})
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    import torch

    from benchmarks.cases import BY_ID

    function, case, name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"peak": peak, "kept": kept}[function](BY_ID[case], name)))
