"""Fixtures shared by the tests: devices, fixed threads, poisoned memory."""

import importlib.util
import os
import re
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as train/run.py has it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: products in Triton's interpreter are small

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# "sm_90": kernels on CPU tensors are compiled for that architecture, and their PTX is executed (tests/ptx).
PTX = os.environ.get("DEPICT_TEST_PTX")
# Without a GPU Triton's interpreter runs the kernels on the CPU. It must be chosen before they are defined.
if PTX:
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DEPICT_KERNELS_EMULATE_CUDA", "1")  # the same for the CUDA kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

os.environ.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark of a pytest that a test starts would not time
# What the extras bring. Where only the core and pytest are installed, as on some GPU machines, test modules that
# need more skip; with the extras nothing is skipped, since their packages are found.
EXTRAS = {
    "docstring_parser", "hypothesis", "jsonargparse", "matplotlib", "PIL", "rich", "tensorboard", "torchmetrics",
    "torchvision", "transformers", "yaml",
}  # fmt: skip

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


GPU_FILES = pytest.StashKey[set]()  # where tests for a GPU were collected, before any of them is deselected


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[GPU_FILES] = {f"tests/{item.path.name}" for item in items if "gpu" in item.keywords}
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


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers whatever ran before it; a test that fails can be run alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def ptx_executor():
    """Of the whole process, as autograd has threads of its own: Triton's launches on CPU tensors execute PTX."""
    if not PTX:
        yield None
        return
    from depict_kernels import backends
    from tests.ptx import triton_runs

    why = backends.why_unavailable

    def as_on_a_gpu(backend, operator, device, dtype):
        if backend == "triton" and torch.device(device).type == "cpu":
            device = "cuda"
        return why(backend, operator, device, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "why_unavailable", as_on_a_gpu)
        races = os.environ.get("DEPICT_TEST_PTX_RACES") == "1"
        with triton_runs.executing(PTX, races=races, approximate=True) as executor:
            yield executor
    if executor.counts:
        print(f"\nexecuted for {PTX}: " + ", ".join(f"{k} x {n}" for k, n in sorted(executor.counts.items())))


class Kernels(NamedTuple):
    """A kernel backend on a device: interpreted, executed as PTX or emulated on "cpu", compiled on "cuda"."""

    backend: str
    device: str
    dtype: torch.dtype

    @property
    def interpreted(self) -> bool:
        """Runs in Triton's interpreter: slow, float32 instead of TF32, wrong bfloat16 products."""
        return (self.backend, self.device) == ("triton", "cpu") and INTERPRETED

    @property
    def as_on_a_gpu(self) -> bool:
        """Instructions of a GPU, from it or from the machine that executes PTX."""
        return self.device == "cuda" or (self.backend == "triton" and bool(PTX))


def pytest_generate_tests(metafunc):
    """``kernels``: every kernel backend and dtype, ``kernels32``: in float32 alone, as Triton's interpreter always."""
    name = lambda *parts: "-".join(str(part).removeprefix("torch.") for part in parts)
    for fixture in ("kernels", "kernels32"):
        if fixture not in metafunc.fixturenames:
            continue
        cases = []
        for backend in ("triton", "cuda"):
            for device in ("cpu", "cuda"):
                dtypes = [torch.float32, torch.float16, torch.bfloat16]
                if fixture == "kernels32" or Kernels(backend, device, dtypes[0]).interpreted:
                    dtypes = dtypes[:1]
                marks = [pytest.mark.gpu] if device == "cuda" else []
                for dtype in dtypes:
                    case = Kernels(backend, device, dtype)
                    cases.append(pytest.param(case, id=name(*case), marks=marks))
        metafunc.parametrize(fixture, cases, indirect=True)
    if "triton_device" in metafunc.fixturenames:
        dtypes = [torch.float32]
        if "triton_dtype" in metafunc.fixturenames:
            dtypes += [torch.float16, torch.bfloat16]
        cases = []
        for device, marks in (("cpu", []), ("cuda", [pytest.mark.gpu])):
            for dtype in dtypes[:1] if device == "cpu" and INTERPRETED else dtypes:
                cases.append(pytest.param((device, dtype), id=name(device, dtype), marks=marks))
        metafunc.parametrize("triton_case", cases, indirect=True)


def _skip_unless_it_runs(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.fail("another test changed TRITON_INTERPRET and left it so")
        if device == "cpu" and not INTERPRETED and not PTX:
            pytest.skip("Triton's interpreter is off (TRITON_INTERPRET is not 1)")
    else:
        from depict_kernels import extension

        reason = extension.load("cuda" if device == "cuda" else "cuda_emulated")
        if device == "cpu" and PTX and reason is None:
            reason = _no_cuda_ptx()
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def cuda_kernels_as_ptx():
    """The CUDA kernels' PTX in the place of the emulator."""
    if not PTX or _no_cuda_ptx():
        yield
        return
    from tests.ptx import cuda_runs

    races = os.environ.get("DEPICT_TEST_PTX_RACES") == "1"
    with cuda_runs.executing(PTX + "a" * (PTX == "sm_90"), races=races, approximate=True) as executor:
        yield
    if executor:
        print(f"\nCUDA kernels executed for {PTX}: " + ", ".join(f"{k} x {n}" for k, n in executor.counts()))


def _no_cuda_ptx() -> str | None:
    from tests.ptx import cuda_runs

    return cuda_runs.why_not()


@pytest.fixture
def kernels(request) -> Kernels:
    _skip_unless_it_runs(request.param.backend, request.param.device)
    return request.param


@pytest.fixture
def kernels32(request) -> Kernels:
    _skip_unless_it_runs(request.param.backend, request.param.device)
    return request.param


@pytest.fixture
def triton_case(request) -> tuple[str, torch.dtype]:
    _skip_unless_it_runs("triton", request.param[0])
    return request.param


@pytest.fixture(params=DEVICES)
def cuda_device(request) -> str:
    """ "cpu" runs the CUDA kernels in the emulator (csrc/cuda/emulator.h), "cuda" on the GPU."""
    _skip_unless_it_runs("cuda", request.param)
    return request.param


@pytest.fixture
def triton_device(triton_case) -> str:
    """ "cpu" runs Triton's kernels in its interpreter or executes their PTX, "cuda" runs them compiled."""
    return triton_case[0]


@pytest.fixture
def triton_interpreted(triton_device) -> bool:
    return triton_device == "cpu" and INTERPRETED


@pytest.fixture
def triton_dtype(triton_case) -> torch.dtype:
    return triton_case[1]


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    """The C++ kernels run on it."""
    from depict_kernels import extension

    extension.load("cpu")
    library = torch.ops.depict_kernels_cpu
    if request.param not in library.instruction_sets().split():
        pytest.skip(f"this processor or build has no {request.param}")
    before = library.use_instruction_set("")
    yield library.use_instruction_set(request.param)
    library.use_instruction_set(before)


@pytest.fixture
def threads():
    """Sets torch's number of threads, for the test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def triton_launches(monkeypatch, ptx_executor) -> list[str]:
    """The names of the Triton kernels that ran, in order: counted where Triton itself starts them, or the machine."""
    import triton

    names: list[str] = []
    if ptx_executor is not None:
        names = ptx_executor
        names.clear()
    elif os.environ.get("TRITON_INTERPRET") == "1":
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
def cuda_launches(monkeypatch) -> list[str]:
    """The names of the private CUDA operators that were called, in order."""
    import importlib

    names: list[str] = []
    for stem in ("attention", "mask_head", "upsample"):
        try:
            module = importlib.import_module(f"depict_kernels.ops.cuda_kernels.{stem}")
        except ModuleNotFoundError:
            continue
        run = module.call

        def counted(name, *args, run=run, **kwargs):
            names.append(name)
            return run(name, *args, **kwargs)

        monkeypatch.setattr(module, "call", counted)
    return names


@pytest.fixture
def launches(request, kernels32) -> list[str]:
    """The names of the kernels that ran, in order."""
    return request.getfixturevalue(f"{kernels32.backend}_launches")


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN (and extreme integers): an output element nobody wrote shows itself."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
