"""Fixtures shared by the tests: devices, fixed threads, poisoned memory."""

import importlib.util
import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as train/run.py has it

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# Without a GPU Triton's interpreter runs the kernels on the CPU. It must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What the extras bring. Where only the core and pytest are installed, as on a borrowed GPU machine, test modules that
# need more skip; with the extras nothing is skipped, since their packages are found.
EXTRAS = {
    "docstring_parser", "hypothesis", "jsonargparse", "matplotlib", "PIL", "rich", "tensorboard", "torchmetrics",
    "torchvision", "transformers", "yaml",
}  # fmt: skip

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    report = outcome.get_result()
    missing = re.findall(r"No module named '(\w+)", str(report.longrepr)) if report.failed else []
    if missing and missing[-1] in EXTRAS and importlib.util.find_spec(missing[-1]) is None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[-1]} is not installed")


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def triton_device(request) -> str:
    """ "cpu" runs Triton's kernels in its interpreter, "cuda" compiled."""
    pytest.importorskip("triton")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off (TRITON_INTERPRET is not 1)")
    return request.param


@pytest.fixture
def triton_launches(monkeypatch) -> list[str]:
    """The names of the Triton kernels that ran, in order: counted where Triton itself starts them."""
    import triton

    names: list[str] = []
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)
    else:
        run = triton.JITFunction.run

        def counted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(triton.JITFunction, "run", counted)
    return names


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN (and extreme integers): an output element nobody wrote shows itself."""
    filled, deterministic = torch.utils.deterministic.fill_uninitialized_memory, None
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
