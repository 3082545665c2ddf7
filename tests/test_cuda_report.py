"""The report on the CUDA C++ kernels' resources."""

import re
import subprocess
import sys

import pytest

from benchmarks import cuda_report
from tests.ptx import cuda_runs

# What cuobjdump of CUDA 13 prints.
TEXT = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN6depict4cuda12_GLOBAL__N_14testINS0_8Bfloat16ELi5EEEvf:
  REG:120 STACK:16 SHARED:512 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6depict4cuda12_GLOBAL__N_14testIfLi5EEEvf:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_rows_are_read():
    half, single = cuda_report.parse(TEXT)
    assert half["target"] == "sm_90a" and half["registers"] == 120 and half["shared"] == 512
    assert half["spills"] == 16 and not half["may_spill"]
    assert single["spills"] == 0 and single["may_spill"]


def test_names_are_readable():
    names = [row["name"] for row in cuda_report.parse(TEXT)]
    short = cuda_report.readable(names)
    assert short in (names, ["test<Bfloat16, 5>", "test<float, 5>"])  # names: there is no demangler


@pytest.mark.parametrize(("spills", "status"), [(0, 0), (8, 1)])
def test_spills_in_16_bit_kernels_fail(spills, status, monkeypatch, capsys):
    from benchmarks import kernel_report

    row = {
        "name": "k<Float16>",
        "target": "sm_80",
        "registers": 9,
        "shared": 0,
        "spills": spills,
        "may_spill": False,
    }
    monkeypatch.setattr(cuda_report, "why_not", lambda: None)
    monkeypatch.setattr(cuda_report, "rows", lambda: [row])
    monkeypatch.setattr(cuda_report, "wgmma_inputs", lambda: (0, []))  # of the library, below
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--cuda-only"])
    assert kernel_report.main() == status
    assert "k<Float16>" in capsys.readouterr().out


def test_of_the_library():
    reason = cuda_report.why_not()
    if reason is not None:
        pytest.skip(reason)
    script = cuda_report.LIBRARY.parents[1] / "benchmarks" / "kernel_report.py"
    done = subprocess.run(
        [sys.executable, str(script), "--cuda-only"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention" in done.stdout or "mask_forward" in done.stdout
    assert "registers of wgmma overwritten: none" in done.stdout
    if "sm_90a" in done.stdout:  # both kernels, three widths, two types
        assert int(re.search(r"(\d+) of the library's wgmma read registers", done.stdout)[1]) >= 24


def test_no_spills_of_the_mask_head():
    """Whose registers are near their bound; the library may hold sm_90a alone (``make aot`` compiles all files)."""
    if not cuda_runs.nvcc() or not cuda_report.tool("cuobjdump"):
        pytest.skip("nvcc or cuobjdump was not found")
    known = subprocess.run([cuda_runs.nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    architectures = [name for name in ("sm_80", "sm_120") if name in known.stdout.split()]
    rows = cuda_report.compiled(tuple(architectures), "mask_head_*.cu")
    kernels = {(row["target"], row["name"]) for row in rows if not row["may_spill"]}
    # In two dtypes three kernels of two widths and mask_finish.
    assert len(kernels) == 14 * len(architectures) > 0
    assert not cuda_report.spilled(rows)
