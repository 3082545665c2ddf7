"""Peak memory of one implementation of one CPU case, in a process of its own: prints bytes.

python -m benchmarks.peak CASE IMPLEMENTATION [THREADS]
"""

import dataclasses
import subprocess
import sys
from pathlib import Path


def measure(case_id: str, name: str, threads: int) -> int:
    import torch

    from benchmarks import cases, implementations, timing

    torch.set_num_threads(threads)
    case = cases.BY_ID[case_id]
    function = implementations.build(case, name)
    # A tiny run first: libraries that are loaded at first use are not the operator's memory.
    tiny = dataclasses.replace(case.rehearsal(), dtype=case.dtype)
    timing.Runner(tiny, implementations.build(tiny, name))()
    runner = timing.Runner(case, function)
    return timing.host_peak(runner)


def in_own_process(case_id: str, name: str, threads: int) -> int | None:
    """The same from another process; None where it cannot be measured (not Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", "benchmarks.peak", case_id, name, str(threads)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1))
