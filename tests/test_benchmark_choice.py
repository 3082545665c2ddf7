"""benchmarks/choose.py: what auto takes on a GPU, from a record."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_rows import made, row

from benchmarks import choose, compare_attention_variants, record
from benchmarks.cases import CASES, SIZES
from depict_kernels import backends, measured, ops

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY, QUARTER = (
    "up to 32 classes, factor over 8",
    "33 to 256 classes, factor over 8",
    "33 to 256 classes, factor 2 to 8",
)


def timed(operator, times, dtype="bfloat16"):
    """Rows of all registered GPU cases of an operator; ``times(case)`` gives {implementation: milliseconds}."""
    rows = []
    for case in CASES:
        name = str(case.dtype).removeprefix("torch.")
        if case.device == "cuda" and case.operator == operator and name == dtype and not case.full:
            fixed = {
                "case": case.id,
                "operator": operator,
                "sizes": dict(zip(SIZES[operator], case.sizes)),
                "dtype": name,
                "passes": case.passes,
            }
            rows += [row(which, median, **fixed) for which, median in times(case).items()]
    return rows


def test_choice_is_per_class_the_fastest_that_is_nowhere_slower():
    def times(case):
        ours = {"triton": 4.0, "cuda": 2.0}
        if case.C == 19:  # cuda is the faster one, but slower than stock once
            ours["cuda"] = 11.0 if case.h == 40 else 0.1
        if case.C == 1000:
            ours = {"triton": 10.5, "cuda": 12.0}
        if case.h == 128 and case.H == 512:
            ours["triton"] = 1.0
        return {"eager": 10.0, "torch": 8.0, **ours}

    chosen, lines = choose.choose(made(timed("upsample_cross_entropy", times)))
    assert chosen == {
        "upsample_cross_entropy": {
            "bfloat16": {
                FEW: ("triton",),
                MANY: ("cuda", "triton"),
                QUARTER: ("triton", "cuda"),
                "over 256 classes, factor over 8": (),
            }
        }
    }
    lines = {line.split(": ")[0].removeprefix("upsample_cross_entropy, bfloat16, "): line for line in lines}
    assert "triton (triton 2.00 times the best stock; cuda slower than stock at" in lines[FEW]
    assert "8x19x40x40x640x640" in lines[FEW] and "8x19x32x32x512x512" not in lines[FEW]
    assert "cuda, triton (cuda 4.00 times the best stock; triton 2.00" in lines[MANY]
    assert "over 256 classes, factor over 8" in lines
    assert lines["over 256 classes, factor over 8"].split(": ")[1].startswith("torch (")


@pytest.mark.parametrize("backward", [True, False])
def test_training_and_inference_both_count(backward):
    slow = lambda case: case.backward == backward and case.N == 1750
    times = lambda case: {"sdpa flash": 3.0, "torch": 3.2, "triton": 2.0, "cuda": 3.5 if slow(case) else 1.0}
    chosen, _ = choose.choose(made(timed("subspace_self_attention", times)))
    expected = {"head_dim 100, over 512 tokens": ("triton",)}
    assert chosen == {"subspace_self_attention": {"bfloat16": expected}}


def test_dtypes_and_widths_are_apart():
    def times(case):
        return {"eager": 2.0, "cuda": 3.0 if case.D > 512 or case.dtype == torch.float16 else 1.0}

    rows = timed("mask_logits", times) + timed("mask_logits", times, "float16")
    rows += timed("mask_logits", times, "float32")
    chosen, _ = choose.choose(made(rows))
    assert set(chosen["mask_logits"]["float16"].values()) == {()} and chosen["mask_logits"]["float32"]
    narrow = {
        f"{classes} classes, width up to 512, {patches} 1000 patches": ("cuda",)
        for classes, patches in (
            ("33 to 256", "up to"),
            ("33 to 256", "over"),
            ("over 256", "over"),
            ("up to 32", "over"),
        )
    }
    wide = {"33 to 256 classes, width over 512, over 1000 patches": ()}
    assert chosen["mask_logits"]["bfloat16"] == narrow | wide


def test_choice_needs_every_registered_case_of_the_class():
    rows = timed("upsample_argmax", lambda case: {"eager": 10, "cuda": 1})
    cut_off = [r for r in rows if r["sizes"]["h"] != 40 or r["sizes"]["C"] != 150]
    chosen, lines = choose.choose(made(cut_off))
    assert MANY not in chosen["upsample_argmax"]["bfloat16"] and FEW in chosen["upsample_argmax"]["bfloat16"]
    assert any("cuda not measured at 1 of 2 cases" in line for line in lines)
    failed = [dict(r) for r in rows]
    for r in failed:
        if r["implementation"] == "cuda" and r["sizes"]["C"] == 19:
            del r["median_ms"]
            r["skipped"] = "no such kernel"
    chosen, _ = choose.choose(made(failed))
    assert (
        chosen["upsample_argmax"]["bfloat16"].keys() >= {MANY}
        and FEW not in chosen["upsample_argmax"]["bfloat16"]
    )


@pytest.mark.parametrize("verdict", ["wrong", "failed"])
def test_a_kernel_that_failed_once_is_not_taken_in_its_class(verdict):
    """Nor left to the small example of its own check: stock torch is the choice."""
    rows = timed("upsample_argmax", lambda case: {"eager": 10, "cuda": 1})
    for r in rows:
        if r["implementation"] == "cuda" and r["sizes"]["C"] == 19 and r["sizes"]["h"] == 40:
            del r["median_ms"]
            r[verdict] = "labels differ"
    chosen, lines = choose.choose(made(rows))
    assert chosen["upsample_argmax"]["bfloat16"][FEW] == ()
    assert chosen["upsample_argmax"]["bfloat16"][MANY] == ("cuda",)
    (line,) = (line for line in lines if f"bfloat16, {FEW}: torch (" in line)
    assert "cuda failed at upsample_argmax-8x19x40x40" in line


def test_a_shape_outside_of_every_class_decides_nothing():
    sizes = dict(zip(SIZES["subspace_self_attention"], (8, 1174, 3, 64)))
    fixed = {"case": "x", "operator": "subspace_self_attention", "sizes": sizes}
    chosen, lines = choose.choose(made([row("eager", 10, **fixed), row("cuda", 1, **fixed)]))
    assert chosen == {} and "cuda outside of every class" in lines[0]


def test_a_record_of_a_cpu_or_an_amd_gpu_is_refused():
    cpu = [dict(r, device="cpu") for r in (row("eager", 10), row("cuda", 1))]
    assert choose.choose(made(cpu)) == ({}, [])
    others = ({}, {"capability": "gfx942"}, {"capability": "9.4", "cuda": None})
    for environment in others:
        with pytest.raises(ValueError, match="not one of an NVIDIA GPU"):
            choose.architecture(made(cpu, **environment))
    assert choose.architecture(made(cpu, capability="9.0", cuda="13.0")) == "sm_90"


def test_choice_is_written_as_python_and_taken_by_auto(tmp_path, monkeypatch, capsys):
    path, table = tmp_path / "x.json", tmp_path / "measured.py"
    rows = timed(
        "upsample_argmax", lambda case: {"eager": 10, "cuda": 4, "triton": 1 if case.C == 150 else 20}
    )
    variants = {"rows": [], "wgmma_from": {"forward": 64}}
    path.write_text(json.dumps(made(rows, capability="9.0") | {"attention_variants": variants}))
    monkeypatch.setattr(choose, "TABLE", table)
    monkeypatch.setattr(measured, "WGMMA_FROM_HEAD_DIM", {})
    monkeypatch.setattr(measured, "AUTO", {"sm_80": {"mask_logits": {"float16": {"a class": ("cuda",)}}}})
    monkeypatch.setattr(measured, "SOURCES", {"sm_80": "old.json"})
    assert choose.main([str(path), "--write"]) == 0
    written = {}
    exec(table.read_text(), written)
    assert written["AUTO"]["sm_80"] == measured.AUTO["sm_80"]  # another architecture's stays
    assert written["AUTO"]["sm_90"]["upsample_argmax"]["bfloat16"][MANY] == ("triton", "cuda")
    assert written["AUTO"]["sm_90"]["upsample_argmax"]["bfloat16"][FEW] == ("cuda",)
    assert written["SOURCES"] == {"sm_80": "old.json", "sm_90": "x.json"}
    assert written["WGMMA_FROM_HEAD_DIM"] == {"sm_90": {"forward": 64}}
    assert choose.main([str(tmp_path / "absent.json")]) == 2 and "absent.json" in capsys.readouterr().err

    monkeypatch.setattr(measured, "AUTO", written["AUTO"])
    monkeypatch.setattr(measured, "SOURCES", written["SOURCES"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = torch.device("cuda", 0)
    taken = lambda dtype, shape: backends._candidates("upsample_argmax", device, dtype, shape)[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert taken(torch.bfloat16, MANY) == ("triton", "cuda") and taken(torch.bfloat16, FEW) == ("cuda",)
    assert taken(torch.float32, MANY) == backends._AUTO_CHECKED and taken(torch.bfloat16, None) == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert taken(torch.bfloat16, MANY) == backends._AUTO_CHECKED  # what was not measured checks itself
    assert backends._candidates("mask_logits", device, torch.float16, "a class") == (("cuda",), False)
    assert backends._candidates("mask_logits", device, torch.float16, "another") == ((), True)


def test_wgmma_is_taken_where_it_never_lost():
    rows = lambda direction, times: [
        {"direction": direction, "sizes": (8, 1174, 3, dim), "mma": 1.0, "wgmma": t} for dim, t in times
    ]
    forward = rows("forward", [(50, 0.9), (64, 1.1), (100, 0.8), (100, 0.9), (128, 0.5)])
    backward = rows("self_backward", [(64, 0.5), (128, 1.0)])
    assert compare_attention_variants.wgmma_from(forward + backward) == {"forward": 100}


def test_written_table_is_formatted(tmp_path):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists() and shutil.which("ruff") is None:
        pytest.skip("ruff is not installed")
    shapes = {MANY: ("triton", "cuda"), FEW: ("cuda",)}
    auto = {"sm_90": {"upsample_cross_entropy": {"bfloat16": shapes}, "mask_logits": {}}}
    path = tmp_path / "measured.py"
    for content in (
        choose.text(auto, {"sm_90": "x.json"}, {"sm_90": {"forward": 64}}),
        choose.text({}, {}, {}),
    ):
        path.write_text(content)
        command = [
            ruff if ruff.exists() else "ruff",
            "format",
            "--check",
            "--config",
            ROOT / "pyproject.toml",
        ]
        done = subprocess.run([*command, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_choice_holds_the_promise_at_every_registered_case():
    """auto is never slower than stock where the record was made, whatever the times are."""
    generator = torch.Generator().manual_seed(0)
    random = lambda: float(torch.rand((), generator=generator)) + 0.5
    times, held = {}, 0

    def draw(case):
        times[case.id] = {name: random() for name in ("eager", "triton", "cuda")}
        return times[case.id]

    operators = ("upsample_cross_entropy", "subspace_cross_attention", "mask_logits")
    for _ in range(20):
        chosen, _ = choose.choose(made([r for o in operators for r in timed(o, draw)]))
        for case in (c for c in CASES if c.id in times):
            names = chosen.get(case.operator, {}).get("bfloat16", {}).get(choose._key(case)[2], ())
            for name in names:  # rows have quartiles 2 % around the median
                assert 0.98 * times[case.id][name] <= 1.02 * times[case.id]["eager"]
                held += 1
    assert held > 20


def test_shipped_choice_names_records_that_exist():
    assert set(measured.AUTO) == set(measured.SOURCES)
    for name in measured.SOURCES.values():
        assert (record.RESULTS / name).exists()
    for operator, dtypes in ((o, d) for choice in measured.AUTO.values() for o, d in choice.items()):
        assert operator in backends.OPERATORS and hasattr(ops, operator)
        classes = {choose._key(case)[2] for case in CASES if case.operator == operator}
        for shapes in dtypes.values():
            assert shapes.keys() <= classes
            assert all(set(names) <= set(choose.OURS) and names for names in shapes.values())
