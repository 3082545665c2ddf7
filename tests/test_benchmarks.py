"""The benchmarks themselves: registry, implementations and their gate, timing, whole runs."""

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    cases,
    end_to_end,
    first_call,
    gate,
    goals,
    implementations,
    machine,
    own_process,
    record,
    sanitize,
    tables,
    timing,
)
from benchmarks.harness import Harness
from depict_kernels import ops

ROOT = Path(__file__).resolve().parents[1]


def case(operator="upsample_cross_entropy", sizes=(2, 19, 4, 6, 32, 48), **options):
    return cases.Case(operator, sizes, **options)


# --- the registry ---


def test_sizes_are_read_by_name():
    c = case()
    assert (c.B, c.C, c.h, c.w, c.H, c.W) == (2, 19, 4, 6, 32, 48)
    with pytest.raises(AttributeError):
        _ = c.D
    assert c.id == "upsample_cross_entropy-2x19x4x6x32x48-float32-fwd+bwd-cpu"
    assert case(smooth=True, sharpness=5).id.endswith("-cpu-smooth-x5")


def test_bytes_of_the_loss():
    # logits and their gradient once each, an int64 target, the loss and its gradient
    logits, target = 4 * 2 * 19 * 4 * 6, 8 * 2 * 32 * 48
    assert case().bytes_moved() == 2 * logits + target + 2 * 4
    assert case(backward=False).bytes_moved() == logits + target + 4


def test_bytes_of_attention_in_16_bits():
    c = case("subspace_cross_attention", (2, 5, 7, 3, 8), dtype=torch.bfloat16)
    q, w = 2 * 2 * 5 * 3 * 8, 2 * 2 * 7 * 3 * 8
    assert c.bytes_moved() == 2 * (q + w) + 2 * q


@pytest.mark.parametrize(
    "c",
    [
        case("subspace_self_attention", (2, 7, 3, 8)),
        case("subspace_cross_attention", (2, 5, 7, 3, 8)),
        case("subspace_self_attention", (2, 7, 3, 8), backward=False),
        case("mask_logits", (2, 5, 3, 4, 16), backward=False),
        case("upsample_cross_entropy"),
        case("depict_sa_decoder", (2, 5, 3, 4, 16), backward=False),
        case("depict_ca_decoder", (2, 5, 3, 4, 16), backward=False),
    ],
    ids=lambda c: c.id,
)
def test_flops_are_the_registered_operators(c):
    function = implementations.build(c, "reference")
    with FlopCounterMode(display=False) as counter:
        timing.Runner(c, function)()
    assert c.flops() == counter.get_total_flops()


def test_every_gpu_case_has_a_rehearsal_that_runs_here():
    for c in cases.CASES:
        small = c.rehearsal()
        assert small.device == "cpu" and small.flops() < 1e7 and small.eager_bytes() < 1e6
    assert {c.operator for c in cases.CASES if c.device == "cuda"} == set(cases.SIZES)


def test_goals_name_registered_cases():
    assert {name for name, *_ in goals._RATIOS} <= set(cases.BY_ID)
    assert {goals._LOSS, goals._LABELS} <= set(cases.BY_ID)


# --- implementations and their gate ---


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="unknown implementation 'fast'.*eager"):
        implementations.build(case(), "fast")


def test_unavailable_says_why():
    with pytest.raises(implementations.Unavailable, match="interpreter"):
        implementations.build(case(), "triton")
    with pytest.raises(implementations.Unavailable, match="flash_attn is not installed"):
        if implementations.importlib.util.find_spec("flash_attn"):
            pytest.skip("it is installed")
        implementations.build(case("subspace_self_attention", (1, 4, 1, 8)), "flash_attn 2")


@pytest.mark.parametrize("name", ["torch", "reference", "sdpa math", "sdpa flash"])
def test_gate_passes_right_implementations(name):
    c = case("subspace_cross_attention", (2, 5, 37, 2, 50))  # 50: padded for some kernels
    found = gate.check(c, name, implementations.build(c, name))
    assert len(found["error"]) == 3 and max(found["error"]) < 1e-5


@pytest.mark.parametrize(
    "c",
    [
        case("subspace_self_attention", (1, 20, 2, 12)),
        case("mask_logits", (1, 5, 3, 4, 16)),
        case("upsample_cross_entropy", (2, 5, 4, 4, 16, 16)),
        case("upsample_argmax", (2, 5, 4, 4, 16, 16), backward=False),
        case("depict_sa_decoder", (1, 5, 3, 4, 16)),
    ],
    ids=lambda c: c.operator,
)
@pytest.mark.parametrize("name", ["compile(eager)", "compile(torch)", "compile(auto)"])
def test_compiled_implementations_are_whole_graphs(c, name, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f=None, **options: compiler(f, backend="aot_eager", **options)
    )
    gate.check(c, name, implementations.build(c, name))


def test_gate_refuses_a_wrong_scale():
    c = case("subspace_self_attention", (2, 37, 2, 8))
    with pytest.raises(AssertionError, match="output: error .* above the budget"):
        gate.check(c, "torch", lambda w: ops.subspace_self_attention(w, 8**-0.5 * 1.001))


def test_gate_refuses_a_wrong_gradient():
    c = case("mask_logits", (2, 5, 3, 4, 16))
    right = implementations.build(c, "eager")

    def wrong(patches, classes, weight, bias):
        return right(patches, classes, weight, bias) + (0.01 * bias - 0.01 * bias.detach())[:, None, None]

    with pytest.raises(AssertionError, match="gradient 3"):
        gate.check(c, "torch", wrong)


@pytest.mark.parametrize("operator", ["upsample_argmax", "upsample_confusion"])
def test_gate_refuses_a_wrong_label(operator):
    c = case(operator, (2, 5, 4, 6, 32, 48), backward=False)
    right = implementations.build(c, "eager")
    assert gate.check(c, "eager", right) == {"checked": gate.compared(c).shape, "mismatches": 0}
    with pytest.raises(AssertionError, match="labels differ"):
        gate.check(c, "auto", lambda *inputs: right(*inputs).roll(1, -1))


def test_gate_compares_what_fits():
    huge = case(sizes=(8, 1000, 40, 40, 640, 640), device="cuda")
    small = gate.compared(huge)
    assert small.B == 2 and 2 * small.eager_bytes() <= gate.LARGEST_TRUTH["cuda"]
    assert small.C == 1000 and small.H / small.h == huge.H / huge.h


def test_eager_operators_are_put_back():
    before = ops.mask_logits
    with pytest.raises(KeyError), implementations.eager_operators():
        assert ops.mask_logits is not before
        raise KeyError
    assert ops.mask_logits is before


# --- timing ---


def test_spread():
    assert timing.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "median_ms": 3000, "q1_ms": 2000, "q3_ms": 4000, "min_ms": 1000, "rounds": 5,
    }  # fmt: skip
    assert timing.spread([2.0])["q1_ms"] == 2000
    with pytest.raises(ValueError, match="no rounds"):
        timing.spread([])


def test_quietest_rounds_decide():
    # Two of six rounds are quiet (ratio 10); in the others the baseline alone was disturbed.
    pairs = [(1.0, 0.1), (1.1, 0.11), *[(4.0, 0.1)] * 4]
    found = timing.quietest(pairs)
    assert found["ratio"] == pytest.approx(10) and found["median_ratio"] == pytest.approx(40)
    assert found["baseline_ms"] == pytest.approx(1050) and found["quiet_ms"] == pytest.approx(105)


def test_device_marks_are_seconds(monkeypatch):
    class Event:
        clock = 10.0  # milliseconds, as CUDA's events count

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at, Event.clock = Event.clock, Event.clock + 4.0

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.timed(lambda: None, timing.clock("cuda")) == pytest.approx(0.004)


def test_a_failing_way_fails_after_the_others_were_timed(monkeypatch, tmp_path):
    model = end_to_end.Model("depict_sa_vit_tiny", "evaluation").rehearsal()
    step = end_to_end.Step.__call__

    def broken(self, name):
        if name == "eager":
            raise RuntimeError("no such kernel")
        return step(self, name)

    class Benchmark:
        def pedantic(self, target, setup, rounds):
            for _ in range(rounds):
                setup()
                target()

    monkeypatch.setattr(end_to_end.Step, "__call__", broken)
    kept = Harness(record.Record(tmp_path / "r.json", "cpu"), rounds=2, threads=1, budget=None)
    with pytest.raises(pytest.fail.Exception, match="eager: no such kernel"):
        end_to_end.measure(kept, Benchmark(), model)
    rows = {row["way"]: row for row in record.load(tmp_path / "r.json")["models"]}
    assert rows["eager"]["failed"] == "no such kernel" and rows["auto"]["total_ms"] > 0


def test_rounds_within():
    assert timing.rounds_within(10, 3, 1, 9) == 3
    assert timing.rounds_within(10, 30, 2, 9) == 2
    assert timing.rounds_within(10, 0, 2, 9) == 9


def test_runner_rotates_inputs_and_differentiates():
    c = case("subspace_self_attention", (1, 5, 1, 8))
    runner = timing.Runner(c, implementations.build(c, "eager"), sets=2)
    (first,) = runner()
    runner.rotate()
    (second,) = runner()
    runner.rotate()
    assert not torch.equal(first, second) and torch.equal(runner()[0], first)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_this_process():
    # Mapped by itself: malloc may serve an array from memory that earlier tests left it.
    touched = lambda: torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.uint8).fill_(1)
    assert timing.host_peak(touched) > 0.9 * 2**26  # other threads may give some back meanwhile
    chosen = next(c for c in cases.CASES if c.device == "cpu" and c.growth and c.H == 256)
    assert own_process.peak(chosen, "eager") > 4 * chosen.C * chosen.H * chosen.W


# --- whole runs, tiny ---


def test_step_is_the_models_own_loss():
    """Cutting the step into parts changes no gradient."""
    setup = end_to_end.Model("depict_sa_vit_tiny", "training").rehearsal()
    step = end_to_end.Step(setup)
    step.optimizer.step = lambda: None
    marks = step("auto")
    cut = {name: p.grad.clone() for name, p in step.module.named_parameters()}
    step.module.zero_grad()
    step.module.loss(step.images, step.target).backward()
    for name, p in step.module.named_parameters():
        torch.testing.assert_close(cut[name], p.grad, msg=name)
    seconds = step.seconds(marks)
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in end_to_end.TRAINING))
    assert step.seconds([0, 1, 10, 100, 1100, 11100, 111100, 112100]) == {
        "backbone": 100001, "decoder": 10009, "loss": 1090, "optimizer": 1000, "total": 112100,
    }  # fmt: skip


@pytest.mark.slow
def test_rehearsal_writes_a_record(tmp_path):
    """What a GPU run does, on the CPU: parameters, gate, timing, record, report."""
    path = tmp_path / "rehearsal.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--rehearse", "--record", str(path), "-q", "-x"]
    command += [
        "-p",
        "no:cacheprovider",
        "-k",
        "(mask_head and fwd+bwd) or ((evaluation and sa_vit_large) or (prediction and sa_vit_small))",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "against eager torch" in done.stdout and "times eager" in done.stdout
    data = record.load(path)
    timed = {r["implementation"] for r in data["operators"] if "median_ms" in r}
    assert {"eager", "torch", "reference", "auto"} <= timed
    assert any("interpreter" in r.get("skipped", "") for r in data["operators"])
    assert {"eager", "auto"} <= {r["way"] for r in data["models"]}
    assert "mask_logits" in tables.page(data, "rehearsal")


def test_predictions_table_takes_the_fastest_of_ours():
    times = {"eager": 8.0, "torch": 6.0, "torch (CUDA graph)": 3.0, "auto": 5.0, "auto (CUDA graph)": 2.0}
    model = end_to_end.Model("depict_sa_vit_small", "prediction", "cuda", batch=1)
    rows = [end_to_end._row(model, way) | {"total_ms": t} for way, t in times.items()]
    failed = end_to_end._row(model, "cuda (CUDA graph)") | {"failed": "no"}
    (_, _, line, _) = tables.predictions({"models": [*rows, failed]}, "cuda")
    assert line.count("|") == 7 and "| 8.0 ms | 5.0 ms (`auto`) | 2.0 ms (`auto`) | 1.60 | 4.00 |" in line
    assert tables.predictions({"models": rows[:2]}, "cuda") == []


@pytest.mark.slow
def test_gpu_cases_skip_with_a_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_mask_head.py", "-m", "gpu", "-q", "-rs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "needs a CUDA GPU" in done.stdout, done.stdout + done.stderr


def test_sanitizer_subset_runs():
    assert sanitize.launch("cpu", "cpp") == 13


@pytest.mark.parametrize(
    "status, text, clean",
    [
        (0, "24 launches of operators, all finite\n========= ERROR SUMMARY: 0 errors", True),
        (99, "24 launches of operators, all finite\n========= ERROR SUMMARY: 3 errors", False),
        (0, "0 launches of operators, all finite\n========= ERROR SUMMARY: 0 errors", False),
        (1, "Traceback", False),
        (None, "24 launches of operators", False),
    ],
)
def test_sanitizer_verdict(status, text, clean):
    assert sanitize.verdict(status, text, 130)[0] is clean


def test_sanitizer_launches_end_themselves():
    """Killing compute-sanitizer leaves the process that it watches on the GPU."""
    command = [sys.executable, "benchmarks/sanitize.py", "--launch", "--device", "cpu", "--limit", "0.01"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == -signal.SIGALRM


def test_tools_watch_a_kernel_that_fails_without_them(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    watched = []
    monkeypatch.setattr(sanitize, "launch", broken)
    monkeypatch.setattr(
        sanitize, "check", lambda tool, limit: watched.append((tool, limit)) or (False, "4 errors")
    )
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 1
    assert sorted(watched) == [(tool, None) for tool in sorted(sanitize.TOOLS)]
    assert "illegal memory access" in capsys.readouterr().out


def test_a_first_call_that_fails_does_not_hide_the_others(monkeypatch, capsys):
    def run(command, **options):
        if "label map" in command[3]:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nOutOfResources: shared memory")
        return subprocess.CompletedProcess(command, 0, stdout="0.5\n")

    monkeypatch.setattr(first_call.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["first_call.py"])
    assert first_call.main() == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    failed = [line for line in lines if "failed: OutOfResources: shared memory" in line]
    assert len(failed) == 1 and len(lines) > 3 and sum("0.50" in line for line in lines) == len(lines) - 1


def test_slug_and_commit(monkeypatch):
    assert machine.slug("cpu") == "cpu"
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.slug("cuda") == "nvidia_h100_80gb_hbm3"
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert machine.commit() == "abc"
