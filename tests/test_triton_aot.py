"""Every Triton kernel compiles without a GPU for sm_80, sm_90 and gfx942, and 16-bit kernels do not spill.

The compiler runs in a process of its own: in this one Triton's interpreter may have replaced it.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import cuda_report, triton_variants
from depict_kernels.ops.triton_kernels import attention, launch, tuning

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The rows of ``benchmarks/kernel_report.py --triton-only --core``."""
    out = tmp_path_factory.mktemp("aot") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernel_report.py", "--triton-only", "--core", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert out.exists(), done.stdout + done.stderr
    found = json.loads(out.read_text())
    bad = cuda_report.spilled(found) or any(r["overwritten"] for r in found)
    assert done.returncode == (1 if bad else 0), done.stderr
    return found


def test_core_set_is_small_and_covers_every_target(rows):
    assert len(rows) <= 40
    for target in triton_variants.TARGETS:
        kernels = {row["name"].rsplit(": ")[-1] for row in rows if row["target"] == target}
        assert {name.split()[0] for name in kernels} == {
            *("attention_forward", "attention_delta", "attention_backward"),
            *("mask_forward", "mask_backward", "mask_product"),
            *(["mask_peak"] if target == "gfx942" else []),
            *(
                "pack_logits",
                "loss_series",
                "gradient_series",
                "loss_careful",
                "finish_loss",
                "gather_gradient",
            ),
            "label_tiles",
        }


def test_resources_fit_the_machine(rows):
    for row in rows:
        nvidia = row["target"].startswith("sm_")
        assert 0 < row["registers"] <= (255 if nvidia else 512)
        limit = {"sm_80": 99, "sm_90": 227}.get(
            row["target"], 64
        ) * 1024  # 99: sm_86, sm_89 and sm_120 take these too
        assert row["shared"] <= limit
        assert row["registers"] * 32 * row["num_warps"] <= 65536 or not nvidia


def test_no_spills_in_16_bit(rows):
    assert not cuda_report.spilled(rows)


def test_no_register_is_overwritten_while_wgmma_reads_it(rows):
    assert not [fault for row in rows for fault in row["overwritten"]]


def test_recording_launches_nothing_and_ends(ptx_executor):
    """The registry's calls must not reach a device, and code after them must."""
    w = torch.empty(1, 40, 2, 100, device="meta", dtype=torch.float16)
    with launch.recording("sm_90") as launches:
        attention.self_attention_forward(w, 0.1)
        assert launch.architecture(w.device) == "sm_90"
    assert [recorded.kernel.__name__ for recorded in launches] == ["attention_forward"]
    arguments = launches[0].arguments
    assert arguments["WIDTHS"] == (128,) and arguments["UNIT"] == 4
    expected = "interpreter" if ptx_executor is None else ptx_executor.architecture
    assert launch.architecture(torch.device("cpu")) == expected


def test_recording_sees_other_threads():
    """Autograd runs a GPU's backward kernels in a thread of its own: launched there, they would run on garbage."""
    w = torch.empty(1, 40, 2, 100, device="meta", dtype=torch.float16)
    with launch.recording("sm_90") as launches:
        thread = threading.Thread(target=attention.self_attention_forward, args=(w, 0.1))
        thread.start()
        thread.join()
    assert [recorded.kernel.__name__ for recorded in launches] == ["attention_forward"]


def test_launch_table_has_every_class():
    for architecture in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx90a", "interpreter"):
        for size in (2, 4):
            for dim in (1, 50, 64, 65, 100, 128, 129, 256):
                for kernel in (
                    "self_forward",
                    "cross_forward",
                    "self_backward",
                    "query_backward",
                    "key_backward",
                ):
                    config = tuning.attention(kernel, architecture, dim, size)
                    assert config.rows & (config.rows - 1) == 0 and config.rows >= 16 <= config.columns
            for kernel in ("forward", "backward", "product"):
                assert tuning.mask_head(kernel, architecture, 150, size).rows >= 16
