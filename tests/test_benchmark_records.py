"""Records of benchmarks and what is made of them: goals, comparison, Markdown, plots."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_rows import made, row

from benchmarks import choose, compare, goals, plots, record, report, tables
from depict_kernels import backends

ROOT = Path(__file__).resolve().parents[1]


# --- records ---


def test_record_replaces_rows_and_survives(tmp_path):
    path = tmp_path / "cpu_1.json"
    first = record.Record(path, "cpu")
    first.add("operators", row("b", 1.23456789))
    again = record.Record(path, "cpu")
    again.add("operators", row("b", 2.0))
    again.add("operators", row("c", 3.0))
    rows = record.load(path)["operators"]
    assert [(r["implementation"], r["median_ms"]) for r in rows] == [("b", 2.0), ("c", 3.0)]
    assert {"date", "commit", "device", "versions", "commands"} <= record.load(path)["environment"].keys()
    assert list(tmp_path.iterdir()) == [path]


def test_noting_how_a_part_ended_runs_no_kernel(tmp_path, monkeypatch):
    """On a GPU without a table what auto takes is found out by running kernels, of which one may hang."""
    path = tmp_path / "cpu_1.json"
    known = record.Record(path, "cpu").data["environment"]["auto"]
    record.Record(path, "cpu").set("parts", {})

    def hangs(*arguments):
        raise AssertionError("a kernel was run")

    monkeypatch.setattr(backends, "auto_choices", hangs)
    record.Record(path, "cpu", auto=False).set("parts", {"test": {"status": 0}})
    assert record.load(path)["environment"]["auto"] == known
    record.Record(tmp_path / "new.json", "cpu", auto=False).set("parts", {})
    assert "auto" not in record.load(tmp_path / "new.json")["environment"]


def test_record_of_another_commit_gets_a_letter(tmp_path):
    path = record.path_for("cpu", tmp_path)
    assert path.name.startswith("cpu_2") and record.path_for("cpu", tmp_path) == path
    path.write_text(json.dumps(made([])))
    assert record.path_for("cpu", tmp_path).name == path.stem + "a.json"
    assert record.where(tmp_path / "x.json", "cpu") == tmp_path / "x.json"


@pytest.mark.parametrize(
    "text, words",
    [
        (b"{}", "is not a record"),
        (b'{"schema": 1}', "is not a record"),
        (b"", "is not JSON"),
        (b'{"schema": 1, "envir', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_file_that_is_no_record(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"a.json {words}"):
        record.load(path)
    with pytest.raises(ValueError, match=f"a.json {words}"):
        report.records(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"environment": None}, "its environment names no versions"),
        ({"environment": {}}, "its environment names no versions"),
        ({"environment": {"versions": {}, "date": "", "commit": ""}}, "its environment lacks device"),
        ({"operators": None}, "its operators are no list of rows"),
        ({"operators": {}}, "its operators are no list of rows"),
        ({"operators": ["row"]}, "its operators are no list of rows"),
        ({"operators": [{"case": "a", "device": "cpu"}]}, "row 0 of its operators lacks implementation"),
        (
            {"operators": [row("cpp", 1.0), row("cuda", 1.0, min_ms="1")]},
            "row 1 of its operators has '1' as min_ms",
        ),
        ({"operators": [row("cpp", 1.0, ratio=float("nan"))]}, "row 0 of its operators has nan as ratio"),
        ({"operators": [row("cpp", 1.0, ratio=0.0)]}, "row 0 of its operators has 0.0 as ratio"),
        ({"operators": [row("cpp", 1.0, q1_ms=None)]}, "row 0 of its operators lacks q1_ms"),
        ({"operators": [row("cpp", 1.0, sizes={"B": 1})]}, "row 0 of its operators lacks size C, size h"),
        ({"operators": [row("cpp", 1.0, sizes=[8])]}, "row 0 of its operators lacks size B"),
        ({"models": [{"model": "a"}]}, "row 0 of its models lacks mode, way"),
    ],
)
def test_record_that_is_not_whole(tmp_path, capsys, change, words):
    """A figure that cannot be compared must not pass for one that did not change."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made([]) | change))
    with pytest.raises(ValueError, match=f"a.json is no whole record: {words}"):
        record.load(path)
    assert choose.main([str(path)]) == 2 and words in capsys.readouterr().err


def test_a_file_that_is_no_record_is_reported_without_a_traceback(tmp_path):
    command = [
        sys.executable,
        "benchmarks/report.py",
        "--compare",
        tmp_path / "no.json",
        tmp_path / "no.json",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "no.json" in ended.stderr


def test_tuning_tables_beside_the_records_are_no_records(tmp_path):
    """tune.py, count_instructions.py and the benchmarks write to benchmarks/results/."""
    (tmp_path / "counts_sm_90.json").write_text(json.dumps({"architecture": "sm_90", "rows": []}))
    (tmp_path / "tuning_NVIDIA_H100.json").write_text(json.dumps({"device": "NVIDIA H100", "rows": []}))
    (tmp_path / "a.json").write_text(json.dumps(made([])))
    assert list(report.records(tmp_path)) == ["a"]


# --- goals, comparison, Markdown ---


def verdict_of(rows, part):
    return next(v for v in goals.verdicts(made(rows)) if part in v.goal)


def test_goals_are_met_and_missed():
    rows = [
        row("eager", 20.0, peak_bytes=1000),
        row("compile(torch)", 6.0),
        row("triton", 0.9, peak_bytes=20),
    ]
    assert verdict_of(rows, "triton at least 20 times eager").met
    assert verdict_of(rows, "triton at least 5 times torch.compile").met
    assert verdict_of(rows, "memory of triton").met
    assert verdict_of(rows, "cuda at least 40").met is None
    slow = [row("eager", 20.0, peak_bytes=1000), row("triton", 1.1, peak_bytes=21)]
    assert verdict_of(slow, "triton at least 20").met is False
    assert verdict_of(slow, "memory of triton").met is False


def test_a_decoder_may_be_compiled_as_its_peer_is():
    sizes = {"operator": "depict_sa_decoder", "case": goals._DECODER}
    times = {"eager": 3.0, "compile(torch)": 1.0, "auto": 1.1, "compile(auto)": 0.5}
    rows = [{**row(name, time), **sizes} for name, time in times.items()]
    verdict = verdict_of(rows, "1.5 times torch.compile")
    assert verdict.met and verdict.found == "2.00 against compile(torch), by compile(auto)"
    assert verdict_of(rows[:3], "1.5 times torch.compile").met is False


def test_auto_is_slower_only_beyond_the_spread():
    assert verdict_of([row("torch", 1.0), row("auto", 1.03)], "never slower").met
    missed = verdict_of([row("torch", 1.0), row("auto", 1.2)], "never slower")
    assert missed.met is False and "0.83 of torch" in missed.found
    assert verdict_of([row("torch", 1.0)], "never slower").met is None


def test_auto_is_judged_as_it_was_run():
    times = {"eager": 2.0, "torch": 1.8, "compile(torch)": 1.5, "auto": 1.7, "compile(auto)": 1.0}
    verdict = lambda **other: verdict_of(
        [row(name, time) for name, time in (times | other).items()], "never slower"
    )
    assert verdict().met
    slow = verdict(auto=3.0)
    assert slow.met is False and "(0.60 of torch)" in slow.found
    slow = verdict(**{"compile(auto)": 1.9})
    assert slow.met is False and "(compiled, 0.79 of compile(torch))" in slow.found


def test_share_of_bandwidth_and_rate():
    able = {"copy_bytes_per_s": 1e12, "flop_per_s": {"float32": 5e13, "bfloat16": 1e15}}
    loss = row("triton", 1.0, bytes=5e8, flops=1e10)
    assert tables.shares(loss, able) == pytest.approx(
        (0.5, 0.2)
    )  # computed in float32 whatever the logits are
    core = loss | {"operator": "subspace_self_attention"}
    assert tables.shares(core, able) == pytest.approx((0.5, 0.01))
    assert tables.shares(loss, None) is None


def test_compare_finds_a_regression():
    before = made([row("triton", 1.0), row("eager", 10.0)], commit="old")
    after = made([row("triton", 1.3), row("eager", 10.1), row("cuda", 1.0)], commit="new")
    text, bad = compare.compare(before, after)
    assert bad == 1 and "| 0.77 | slower | 1.0 ms | 1.3 ms |" in text and "old, then new" in text
    assert "Only after" in text
    assert compare.compare(after, before)[1] == 0
    assert (
        compare.compare(before, made([{**row("triton", 1.0), "median_ms": None, "wrong": "error 1"}]))[1] == 1
    )
    gone, bad = compare.compare(
        before, made([{**row("triton", 1.0), "median_ms": None, "skipped": "no time"}])
    )
    assert bad == 0 and f"Only before: {goals._LOSS} eager, {goals._LOSS} triton" in gone
    wide = {"q1_ms": 0.5, "q3_ms": 2.0}
    assert compare.compare(made([row("cuda", 1.0, **wide)]), made([row("cuda", 1.3, **wide)]))[1] == 0


def on_cpu(name, ratio, median_ratio=None, time=1.0):
    return row(name, time, device="cpu", ratio=ratio, median_ratio=median_ratio or ratio)


@pytest.mark.parametrize(
    "before, after, word",
    [
        (on_cpu("cpp", 50.0), on_cpu("cpp", 34.0), "slower"),
        (on_cpu("cpp", 50.0), on_cpu("cpp", 36.0), ""),
        (on_cpu("cpp", 50.0), on_cpu("cpp", 34.0, 49.0), ""),  # the quiet rounds alone
        (on_cpu("cpp", 50.0), on_cpu("cpp", 74.0), "faster"),
        (
            on_cpu("cpp", 50.0),
            on_cpu("cpp", 50.0, time=2.0),
            "",
        ),  # the machine is busy: eager took longer too
        (on_cpu("cpp", 50.0), on_cpu("cpp", 30.0, time=0.5), "slower"),
        (on_cpu("auto", 1.0), on_cpu("auto", 0.6), "slower"),
    ],
)
def test_compare_goes_by_the_ratio_on_the_cpu(before, after, word):
    text, bad = compare.compare(made([before]), made([after]))
    assert bad == (word == "slower")
    name = f"{goals._LOSS} {before['implementation']}"
    factor = after["ratio"] / before["ratio"]
    assert f"| {name} | {before['ratio']:.3g} | {after['ratio']:.3g} | {factor:.2f} | {word} |" in text


def test_compare_has_no_verdict_on_stock_implementations():
    stock = ("eager", "torch", "sdpa flash", "compile(torch)")
    before, after = (made([row(n, t, ratio=r) for n in stock]) for t, r in ((1.0, 2.0), (9.0, 0.1)))
    text, bad = compare.compare(before, after)
    assert bad == 0 and "| 0.11 |  |" in text and "The 4 stock figures" in text


def test_compare_counts_a_model_s_shared_code_once():
    def model(way, backbone, loss):
        row = {"model": "depict_sa_vit_tiny", "mode": "training", "size": 64, "batch": 1, "classes": 5}
        parts = {"backbone_ms": backbone, "decoder_ms": 1.0, "loss_ms": loss, "optimizer_ms": 1.0}
        return row | {"device": "cpu", "way": way, **parts, "total_ms": sum(parts.values())}

    def record_of(*rows):
        return made([]) | {"models": list(rows)}

    quiet = record_of(model("eager", 100.0, 100.0), model("auto", 100.0, 1.0))
    # The same code took longer in one way: not a change. The loss itself did: one.
    noisy = record_of(model("eager", 100.0, 100.0), model("auto", 160.0, 1.0))
    slow = record_of(model("eager", 100.0, 100.0), model("auto", 100.0, 60.0))
    assert [compare.compare(quiet, other)[1] for other in (noisy, slow)] == [0, 1]


def test_compare_ends_with_1_where_ours_became_slower_on_the_same_device(tmp_path, monkeypatch):
    paths = []
    for name, ratio, device in (("a", 50.0, "X"), ("b", 30.0, "X"), ("c", 30.0, "Y")):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(
            json.dumps(made([on_cpu("cpp", ratio), on_cpu("torch", 1 / ratio)], device=device))
        )

    def status(before, after):
        monkeypatch.setattr(sys, "argv", ["report.py", "--compare", str(before), str(after)])
        return report.main()

    a, b, c = paths
    assert [status(a, b), status(b, a), status(a, a), status(a, c)] == [1, 0, 0, 0]
    command = [sys.executable, "benchmarks/report.py", "--compare", a, b]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1


def core(name, operator, passes, median, ratio=None):
    more = {"operator": operator, "passes": passes, "case": f"{operator}-{passes}", "dtype": "float32"}
    return row(name, median, device="cpu", **more, **({"ratio": ratio} if ratio else {}))


CORES = [
    core("eager", "subspace_self_attention", "fwd", 60.0),
    core("torch", "subspace_self_attention", "fwd", 26.0, 1.42),
    core("sdpa flash", "subspace_self_attention", "fwd", 35.0, 1.63),  # its minute was a busier one
    core("cpp", "subspace_self_attention", "fwd", 30.0, 2.1),
    core("eager", "mask_logits", "fwd+bwd", 10.0),
    core("torch", "mask_logits", "fwd+bwd", 11.0, 0.71),
    core("eager", "depict_ca_decoder", "fwd+bwd", 320.0),
    core("auto", "depict_ca_decoder", "fwd+bwd", 330.0, 0.98),
]


def test_table_and_plot_of_the_cores_take_the_same_best_stock():
    text = tables.page(made(CORES), "x")
    assert "| 60 ms | 1.63 (sdpa flash) | 2.10 | 1.42 |" in text
    assert "| 320 ms | eager alone was timed | no kernel | 0.98 |" in text
    assert text.count(tables.RATIO) == 1
    bars = {name.split()[0]: (stock, ours) for name, stock, ours in plots.speedups(made(CORES))}
    assert bars == {
        "self_attention": (1.63, 2.1),
        "mask_logits": (0.71, None),
        "depict_ca_decoder": (1.0, 0.98),
    }


def test_what_is_slower_than_eager_is_said():
    found = tables.slower_than_eager(made(CORES))
    assert found == ["mask_logits fwd+bwd (0.71)", "depict_ca_decoder fwd+bwd (0.98)"]
    named = core("cpp", "mask_logits", "fwd+bwd", 1.0, 9.0)
    assert tables.slower_than_eager(made([*CORES, named])) == found
    taken = core("auto", "mask_logits", "fwd+bwd", 1.0, 9.0)
    assert tables.slower_than_eager(made([*CORES, taken])) == found[1:]


def test_cpu_kernels_stand_beside_stock_torchs_fastest():
    lines = tables.cpu_cores(made(CORES))
    assert "sdpa flash" in lines[2] and lines[2].endswith("| 1.29 |")  # 2.1 / 1.63
    assert tables.cpu_cores(made(CORES[:3])) == []
    head = core("cpp", "mask_logits", "fwd+bwd", 9.0, 1.42)
    assert tables.cpu_cores(made([*CORES, head]))[3].startswith("| mask head (")
    assert tables.cpu_cores(made([*CORES, head]))[3].endswith("| 0.71 (torch) | 1.42 | 2.00 |")


def test_session_s_table_has_eager_and_the_ratio():
    loss = {**row("cpp", 12.0, ratio=78.0), "quiet_ms": 11.7, "baseline_ms": 913.0}
    alone = {**row("eager", 100.0), "case": "alone"}
    skipped = {**row("triton", 1.0), "median_ms": None, "skipped": "no"}
    gpu = [{**row(name, t), "case": "on a GPU"} for name, t in (("eager", 20.0), ("cuda", 0.5))]
    model = {
        "model": "depict_sa_vit_tiny",
        "mode": "training",
        "size": 64,
        "batch": 1,
        "classes": 5,
        "device": "cpu",
    }
    models = [model | {"way": way, "total_ms": t} for way, t in (("eager", 300.0), ("auto", 200.0))]
    lines = tables.session([row("eager", 950.0), loss, alone, skipped, *gpu], models)
    assert [line.split("  ")[-1].strip() for line in lines] == ["times eager", "78", "1", "40", "1.5"]
    assert lines[1].split()[1:] == ["cpp", "11.7", "ms", "913", "ms", "78"]
    assert tables.session([skipped], []) == []


def test_page_holds_what_was_skipped_and_what_was_wrong():
    rows = [row("eager", 2.0), row("triton", 0.1), {**row("sdpa cudnn", 1.0), "skipped": "no such kernel"}]
    rows.append({**row("cuda", 1.0), "wrong": "output: error 1"})
    text = tables.page(made(rows), "x")
    assert "no such kernel" in text and "output: error 1" in text and "20.00" in text
    assert "sdpa cudnn | 1.0 ms" not in text


def test_table_and_units():
    assert tables.table(["a"], []) == []
    assert tables.table(["a", "b"], [["1", "2"]])[:3] == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert [tables.ms(v) for v in (0.1234, 1.26, 250.4, 12345.0, None)] == [
        "0.123 ms",
        "1.3 ms",
        "250 ms",
        "12.3 s",
        "",
    ]


def test_readme_keeps_what_is_outside_the_markers(tmp_path):
    (tmp_path / "a_1.json").write_text(json.dumps(made([row("eager", 20.0), row("triton", 1.0)])))
    text = report.with_speed(f"before\n{report.BEGIN}\nout of date\n{report.END}\nafter\n", tmp_path)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "out of date" not in text
    assert "20.00 against eager" in text and report.with_speed(text, tmp_path) == text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    work = {"bytes": 1e6, "flops": 1e9}
    grown = [row(n, 1.0, growth=True, peak_bytes=2**20, **work) for n in ("eager", "triton")]
    larger = [{**r, "case": "other", "sizes": {**r["sizes"], "H": 1024}} for r in grown]
    data = made([*grown, *larger]) | {"machine": {"copy_bytes_per_s": 1e12, "flop_per_s": {"float32": 1e13}}}
    assert {p.name for p in plots.draw(data, "x", tmp_path)} == {
        "x_speedup.png",
        "x_roofline.png",
        "x_memory.png",
    }
    assert plots.draw(made([]), "x", tmp_path) == []


def test_same_code_has_one_time():
    parts = {"decoder_ms": 10.0, "optimizer_ms": 1.0, "batch": 2, "model": "m"}
    eager = parts | {"way": "eager", "backbone_ms": 100.0, "loss_ms": 50.0, "total_ms": 161.0}
    ours = parts | {"way": "auto", "backbone_ms": 150.0, "loss_ms": 1.0, "total_ms": 162.0}
    found = tables.same_code({"eager": eager, "auto": ours}, "training")
    assert found["eager"]["total_ms"] == 161 and found["auto"]["total_ms"] == 112
    assert found["auto"]["images_per_s"] == pytest.approx(2 / 0.112)
