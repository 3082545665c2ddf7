"""Launch tables and benchmarks/tune.py, run in Triton's interpreter at a tiny size."""

import json
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from depict_kernels import ops
from depict_kernels.ops.triton_kernels import attention, launch, tuned, tuning
from depict_kernels.ops.triton_kernels.tuning import Config


def launched(architecture="sm_90"):
    """The forward launch's (BLOCK_M, BLOCK_N, warps, stages) for a head_dim of 100 in float16."""
    with launch.recording(architecture) as launches:
        attention.self_attention_forward(torch.empty(1, 40, 2, 100, device="meta", dtype=torch.float16), 0.1)
    one = launches[0]
    return one.arguments["BLOCK_M"], one.arguments["BLOCK_N"], one.num_warps, one.num_stages


KEY = "attention self_forward d128 16"


def test_tables_in_order(tmp_path, monkeypatch):
    default = launched()
    monkeypatch.setattr(tuning, "_shipped", lambda: {("sm_90", KEY): Config(32, 32, 4, 1)})
    assert launched() == (32, 32, 4, 1) != default
    assert launched("sm_100") == default  # of another architecture
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"table": {"sm_90": {KEY: [16, 64, 8, 2]}}}))
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert launched() == (16, 64, 8, 2)
    with tuning.trial({KEY: Config(64, 16, 4, 3)}) as chosen:
        assert launched() == (64, 16, 4, 3)
        assert chosen == {KEY: Config(64, 16, 4, 3)}
    assert launched() == (16, 64, 8, 2)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "not a file of benchmarks/tune.py"),
        ("{", "not a file of benchmarks/tune.py"),
        (
            '{"table": {"sm_90": {"attention forward": [48, 32, 4, 1]}}}',
            r"'attention forward': rows, columns",
        ),
        ('{"table": {"sm_90": {"attention forward": [64, 32]}}}', "'attention forward'"),
    ],
)
def test_a_wrong_table_is_refused_by_name(text, words, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.raises(ValueError, match=words):
        launched()


def test_tune_checks_measures_and_writes(tmp_path, monkeypatch, triton_device, triton_interpreted):
    """The command on one call with two candidates per key, one of which is made to give wrong results."""
    if triton_device == "cpu" and not triton_interpreted:
        pytest.skip("benchmarks/tune.py runs on a GPU or in the interpreter")
    output, table = tmp_path / "tuning.json", tmp_path / "tuned.py"
    table.write_text(Path(tuned.__file__).read_text())
    monkeypatch.setattr(tune, "TABLE", table)
    key = "attention self_backward d64 32"
    default = tuning.attention("self_backward", launch.architecture(torch.device(triton_device)), 16, 4)
    wrong, faster = tune.candidates(key, default)[:2]
    run = ops.subspace_self_attention

    def broken(w, *, backend):
        out = run(w, backend=backend)
        return out * 1.001 if backend == "triton" and tuning._trial.get(key) == wrong else out

    call = next(tune.calls(tiny=True))
    monkeypatch.setattr(tune, "calls", lambda tiny: [tune.Call(call.name, call.inputs, broken, call.batch)])
    seconds = lambda self, key, config, default, rounds: (1.0, 2.0 if config == faster else 1.0)
    monkeypatch.setattr(tune.Bench, "seconds", seconds)
    assert tune.main(["--candidates", "2", "--rounds", "1", "--output", str(output), "--write"]) == 0
    record = json.loads(output.read_text())
    rows = {row["key"]: row for row in record["rows"]}
    assert rows.keys() == {"attention self_forward d64 32", key}
    assert rows[key]["tried"] == 2 and rows[key]["best"] == list(tune.astuple(faster))
    assert list(rows[key]["rejected"]) == [str(tune.astuple(wrong))]
    assert "above the budget" in rows[key]["rejected"][str(tune.astuple(wrong))]
    architecture = record["architecture"]
    assert tuning.load(str(output)) == {(architecture, key): faster}
    written = runpy.run_path(str(table))["TUNED"]
    assert tuning._parse(written, "tuned.py") == {(architecture, key): faster}


def test_what_was_found_before_a_failure_is_written(
    tmp_path, monkeypatch, capsys, triton_device, triton_interpreted
):
    """A call that cannot run, and a candidate that fails only at the full batch, cost neither the rest nor the file."""
    if triton_device == "cpu" and not triton_interpreted:
        pytest.skip("benchmarks/tune.py runs on a GPU or in the interpreter")

    def lost(*tensors, backend):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    call = next(tune.calls(tiny=True))
    monkeypatch.setattr(
        tune, "calls", lambda tiny: [call, tune.Call("lost call", call.inputs, lost, call.batch)]
    )
    monkeypatch.setattr(tune.Bench, "seconds", lambda *a: lost(backend="triton"))
    output = tmp_path / "tuning.json"
    assert tune.main(["--candidates", "1", "--rounds", "1", "--output", str(output)]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 and all("illegal memory access" in str(row["rejected"]) for row in rows)
    assert "lost call: RuntimeError: CUDA error" in capsys.readouterr().out


def test_every_tiny_call_is_tuned(triton_device):
    """All families through the real measurement, one candidate each: what is asked for, checked and timed."""
    if triton_device == "cuda":
        pytest.skip("benchmarks/tune.py itself does it there")
    rows, failed = tune.tune("cpu", 600, most=1, rounds=1, tiny=True)
    assert not failed
    kernels = {" ".join(row["key"].split()[:2]) for row in rows}
    assert kernels == {
        *(f"attention {k}_{w}" for k, w in [("self", "forward"), ("self", "backward"), ("cross", "forward")]),
        *("attention query_backward", "attention key_backward"),
        *("mask_head forward", "mask_head backward", "mask_head product"),
        *(f"upsample {k}" for k in ("series", "careful", "labels", "pack", "gather", "finish")),
    }
    assert all(row["tried"] == 1 and not row["rejected"] for row in rows)


def test_backward_is_not_pipelined_where_triton_miscompiles_it(monkeypatch):
    """Two products into one accumulator per step, on data-centre Blackwell: triton-lang/triton issue 10821."""
    stages = lambda kernel, architecture: tuning.attention(kernel, architecture, 100, 2).num_stages
    monkeypatch.setattr(tuning, "TRITON", (3, 8))
    for kernel in ("self_backward", "query_backward", "key_backward"):
        assert stages(kernel, "sm_100") == stages(kernel, "sm_103") == 1 < stages(kernel, "sm_90")
    assert stages("self_forward", "sm_100") > 1
    monkeypatch.setattr(tuning, "TRITON", (3, 9))
    assert stages("self_backward", "sm_100") > 1
