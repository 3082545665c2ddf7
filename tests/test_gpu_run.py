"""benchmarks/gpu.py: everything for a GPU within a time, rehearsed with commands that need none."""

import signal
import sys
import time

import pytest
import torch
from conftest import GPU_FILES

from benchmarks import gpu

PATIENT = """
import signal, sys, time
def end(*_):
    print("3 passed, 1 failed")
    sys.exit(2)
signal.signal(signal.SIGINT, end)
print("begun", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""


def python(name: str, code: str) -> gpu.Job:
    return gpu.Job(name, [sys.executable, "-c", code])


def test_each_job_says_how_it_ended(capsys):
    jobs = [
        python("good", "print('12 passed in 3 s')"),
        python("bad", "print('E   wrong\\n=== 1 failed ==='); raise SystemExit(1)"),
        python("empty", "raise SystemExit(5)"),
        python("last", "print('after those')"),
    ]
    good, bad, empty, last = gpu.run(jobs, time.monotonic() + 60, at_once=2)
    assert (good.failed, good.summary) == (False, "12 passed in 3 s")
    assert (bad.failed, bad.status, bad.summary) == (True, 1, "1 failed")
    assert not empty.failed and not last.failed
    printed = capsys.readouterr().out
    assert "E   wrong" in printed and "--- good: 12 passed in 3 s" in printed


def test_time_that_is_spent_ends_a_job_and_keeps_what_it_found(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    begin = time.monotonic()
    jobs = [python("patient", PATIENT), python("stubborn", STUBBORN), python("waiting", "print('never')")]
    patient, stubborn, waiting = gpu.run(jobs, begin + 3, at_once=2)
    assert time.monotonic() - begin < 40
    assert patient.status == stubborn.status == waiting.status == 124
    assert patient.summary.endswith("3 passed, 1 failed") and "stopped after" in patient.summary
    assert stubborn.summary.endswith("deaf") and "not begun" in waiting.summary


def test_jobs_of_a_job_in_the_background_can_be_asked_to_end():
    """Which shells start with SIGINT ignored: pytest would hear nothing and take its report with it."""
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('1 failed, 2 passed')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (job,) = gpu.run([python("sleeps", code)], time.monotonic() + 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert job.status == 124 and job.summary.endswith("1 failed, 2 passed")


def test_children_end_with_their_job(monkeypatch, tmp_path):
    """A test that is stopped may leave a compiler or a watched process on the GPU."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    late = tmp_path / "late"
    child = f"import time; time.sleep(5); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    gpu.run([python("parent", parent)], time.monotonic() + 1)
    time.sleep(6)
    assert not late.exists()


def test_every_test_for_a_gpu_is_found(request):
    """Of those that are collected with this one: in the whole suite all of them."""
    files = {argument for job in gpu.gpu_tests() for argument in job.command if argument.startswith("tests/")}
    collected = request.config.stash[GPU_FILES]
    assert collected <= files
    if request.session.testscollected > 1000:
        assert len(collected) > 15
    assert {f"tests/{name}.py" for name in gpu.LONGEST} <= files


@pytest.mark.slow
def test_rehearsal_without_a_gpu(monkeypatch):
    """Every part's jobs take their arguments, and skip."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(gpu, "BENCHES", {"mask_head": 1.0})
    (tools, *tests), _ = gpu.jobs_of("check", 100, None)
    jobs = [tools, next(job for job in tests if job.name == "test_graphs_gpu")]
    jobs += [job for part in ("bench", "auto") for job in gpu.jobs_of(part, 100, None)[0]]
    gpu.run(jobs, time.monotonic() + 300, at_once=2)
    assert {job.name: job.status for job in jobs} == {
        "sanitize.py": 0,
        "test_graphs_gpu": 0,
        "compare_attention_variants.py": 0,
        "mask_head": 0,
        "auto as chosen": 0,
    }, "\n".join(job.output for job in jobs)
    assert all("skipped" in job.summary for job in jobs)
