"""Fixtures shared by the tests: devices, fixed threads, poisoned memory."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as train/run.py has it

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# Without a GPU Triton's interpreter runs the kernels on the CPU. It must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DEPICT_KERNELS_EMULATE_CUDA", "1")  # the same for the CUDA kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


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


@pytest.fixture(params=DEVICES)
def cuda_device(request) -> str:
    """ "cpu" runs the CUDA kernels in the emulator (csrc/cuda/emulator.h), "cuda" on the GPU."""
    from depict_kernels import extension

    reason = extension.load("cuda" if request.param == "cuda" else "cuda_emulated")
    if reason is not None:
        pytest.skip(reason)
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
