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


def pytest_generate_tests(metafunc):
    """A test of ``triton_device`` runs in the interpreter and compiled; with ``triton_dtype`` compiled in every dtype.

    The interpreter is slow and gets bfloat16 products wrong: float32 alone there.
    """
    if "triton_device" in metafunc.fixturenames:
        dtypes = [torch.float32]
        if "triton_dtype" in metafunc.fixturenames:
            dtypes += [torch.float16, torch.bfloat16]
        name = lambda device, dtype: f"{device}-{str(dtype).removeprefix('torch.')}"
        cases = [pytest.param(("cpu", torch.float32), id=name("cpu", torch.float32))]
        for dtype in dtypes:
            cases.append(pytest.param(("cuda", dtype), id=name("cuda", dtype), marks=pytest.mark.gpu))
        metafunc.parametrize("triton_case", cases, indirect=True)


@pytest.fixture
def triton_case(request) -> tuple[str, torch.dtype]:
    pytest.importorskip("triton")
    if request.param[0] == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
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
def triton_device(triton_case) -> str:
    """ "cpu" runs Triton's kernels in its interpreter, "cuda" compiled."""
    return triton_case[0]


@pytest.fixture
def triton_dtype(triton_case) -> torch.dtype:
    return triton_case[1]


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
