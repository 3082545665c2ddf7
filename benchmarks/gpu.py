"""What a machine with a GPU is for, within a time: build, tests and compute-sanitizer, benchmarks, what ``auto`` takes.

    python benchmarks/gpu.py [--seconds 2400] [--parts build check bench auto] [--record FILE-OR-FOLDER]

Each part gets a share of the time that is left, in which it does what it can, the most telling first; one that fails
does not keep the next from running. How each ended is noted in the record, where there is a GPU; without one every part
runs and skips what needs one. Nothing is installed. Exit status 1 where a part failed.

build   the extension, for the GPU that is here unless TORCH_CUDA_ARCH_LIST says otherwise, and what works then
check   every test for a GPU, a process per file (a kernel that reads where it must not leaves no GPU to the rest of its
        process), several at a time, compute-sanitizer beside them
bench   the variants of the CUDA attention, then pytest benchmarks
auto    choose.py writes into depict_kernels/measured.py what the record says; ``auto`` is timed with that
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Of the time that is left when a part begins. A part that ends earlier leaves the rest to the next ones.
SHARES = {"build": 0.4, "check": 0.5, "bench": 0.8, "auto": 1.0}
# Those that compile most begin first and in three processes each, so that nothing waits for them in the end.
LONGEST = ("test_decoder_kernels", "test_attention_kernels", "test_triton_upsample")
THIRDS = ("bfloat16", "float16 and not bfloat16", "not float16")
BENCHES = {"upsample": 0.3, "attention": 0.27, "end_to_end": 0.3, "mask_head": 0.13}
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
NO_TESTS = 5  # pytest's status where it found none
GRACE = 10.0  # seconds between the request to end and the end


@dataclass
class Job:
    """A command with its output, once it has ended."""

    name: str
    command: list[str]
    status: int | None = None  # 124: stopped
    seconds: float = 0.0
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in (0, NO_TESTS)

    @property
    def summary(self) -> str:
        """The last line that says something."""
        lines = [line.strip(" =\n") for line in self.output.splitlines()]
        last = next((line for line in reversed(lines) if line), "no output")[-200:]
        return f"stopped after {self.seconds:.0f} s: {last}" if self.status == 124 else last


def _heed_interrupts() -> None:
    """A job in the background starts with SIGINT ignored, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Process:
    """A job that runs; its output goes to a file, since a pipe that nobody reads would stop it."""

    def __init__(self, job: Job) -> None:
        self.job, self.begin, self.asked = job, time.monotonic(), False
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            job.command, stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, preexec_fn=_heed_interrupts,
        )  # fmt: skip

    def done(self, end: float) -> bool:
        """Whether the job has ended; past ``end`` it is asked to, as by Ctrl-C (pytest then reports), then made to."""
        now = time.monotonic()
        status = self.process.poll()
        if status is None:
            if now > end and not self.asked:
                self.asked = True
                self.process.send_signal(signal.SIGINT)
            elif now > end + GRACE:
                self.process.kill()
                status = self.process.wait()
            if status is None:
                return False
        if self.asked:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its children, which may hold the GPU
        self.log.seek(0)
        self.job.output, self.job.seconds = self.log.read(), now - self.begin
        self.job.status = 124 if self.asked else status
        self.log.close()
        return True


def run(jobs: list[Job], end: float, at_once: int = 1) -> list[Job]:
    """Runs the jobs in their order, ``at_once`` at a time; prints each as it ends. None begins after ``end``."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            if time.monotonic() < end:
                if at_once == 1:
                    print(f"--- {job.name} begins", flush=True)
                running.append(_Process(job))
            else:
                job.status, job.output = 124, "not begun"
        ended = [process for process in running if process.done(end)]
        running = [process for process in running if process not in ended]
        for process in ended:
            job = process.job
            if job.failed or at_once == 1:
                print(f"--- {job.name}\n{job.output.rstrip()[-8000:]}")
            print(f"--- {job.name}: {job.summary} ({job.seconds:.0f} s)", flush=True)
        if running and not ended:
            time.sleep(0.1)
    return jobs


def gpu_tests() -> list[Job]:
    """The files with tests for a GPU, the longest first."""
    devices = (
        "device|cuda_device|triton_device|triton_case|kernels|kernels32"  # fixtures of tests/conftest.py
    )
    known = re.compile(rf"mark\.gpu|def test\w*\([^)]*\b({devices})\b")
    files = [f.stem for f in sorted((ROOT / "tests").glob("test_*.py")) if known.search(f.read_text())]
    command = lambda name: [*PYTEST, "--tb=short", f"tests/{name}.py"]
    return [
        *(Job(f"{name}, {third}", [*command(name), "-k", third]) for third in THIRDS for name in LONGEST),
        *(Job(name, command(name)) for name in files if name not in LONGEST),
    ]


def script(name: str, *arguments: str) -> Job:
    return Job(name, [sys.executable, f"benchmarks/{name}", *arguments])


def jobs_of(part: str, seconds: float, record: str | None) -> tuple[list[Job], int]:
    """A part's jobs, and how many of them run at a time. Without a GPU there is no record."""
    if part == "build":
        build = Job("setup.py build_ext", [sys.executable, "setup.py", "build_ext", "--inplace"])
        return [build, Job("python -m depict_kernels", [sys.executable, "-m", "depict_kernels"])], 1
    if part == "check":
        tools = script("sanitize.py", "--limit", f"{0.9 * seconds:.0f}")
        # Half of the cores: Triton's and torch's compilers start processes of their own.
        at_once = min(8, max(2, (os.cpu_count() or 2) // 2))
        return [tools, *gpu_tests()], at_once + 1
    recorded = ["--record", record] if record else []
    timed = [*PYTEST, "--benchmark-columns=median,iqr,rounds", *recorded]
    seconds -= 30  # what has begun when the budget is spent goes on
    if part == "bench":
        benches = [
            Job(name, [*timed, "--budget", f"{share * seconds:.0f}", f"benchmarks/bench_{name}.py"])
            for name, share in BENCHES.items()
        ]
        return [script("compare_attention_variants.py", *recorded), *benches], 1
    files = [f"benchmarks/bench_{name}.py" for name in ("upsample", "attention", "mask_head")]
    jobs = [Job("auto as chosen", [*timed, "--budget", f"{seconds:.0f}", "-k", "auto", *files])]
    if record:
        jobs.insert(0, script("choose.py", record, "--write"))
        jobs.append(script("report.py", "--no-readme", str(Path(record).parent)))
    return jobs, 1


def note(record: str, part: str, jobs: list[Job], seconds: float) -> None:
    from benchmarks.record import Record

    # Without auto's choices, for which kernels run: one that hangs shall not hang this too.
    written = Record(Path(record), "cuda", auto=False)
    ended = {
        "status": int(any(job.failed for job in jobs)),
        "seconds": round(seconds, 1),
        "jobs": {job.name: {"status": job.status, "summary": job.summary} for job in jobs},
    }
    written.set("parts", written.data.get("parts", {}) | {part: ended})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2400.0)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART")
    parser.add_argument("--record", default=str(ROOT / "benchmarks" / "results"))
    args = parser.parse_args()
    end = time.monotonic() + args.seconds

    import torch

    from benchmarks.record import where

    # One file from here on: what auto takes changes the tree, after which its commit would have another name.
    record = str(where(args.record, "cuda")) if torch.cuda.is_available() else None
    if record:
        major, minor = torch.cuda.get_device_capability()
        native = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")  # wgmma needs 9.0a
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", native)
    lines = []
    for part in args.parts:
        begin = time.monotonic()
        last = part == args.parts[-1]
        share = (1.0 if last else SHARES[part]) * max(end - begin, 0.0)
        jobs, at_once = jobs_of(part, share, record)
        print(f"=== {part}: at most {share:.0f} s", flush=True)
        run(jobs, begin + share, at_once)
        spent = time.monotonic() - begin
        if record:
            note(record, part, jobs, spent)
        bad = [job for job in jobs if job.failed]
        lines.append(f"{part}: {len(jobs) - len(bad)} of {len(jobs)} well in {spent:.0f} s")
        lines += [f"    {job.name}: {job.summary}" for job in bad]
    print(
        "=== in short", *lines, f"record: {record}" if record else "no record: there is no CUDA GPU", sep="\n"
    )
    return int(any(line.startswith(" ") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
