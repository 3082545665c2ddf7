"""The compiled part: its build, its record, and the reasons it gives where it cannot be used."""

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depict_kernels import extension

ROOT = Path(__file__).resolve().parents[1]
needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or not (ROOT / "depict_kernels").exists(),
    reason="needs a source checkout",
)

needs_library = pytest.mark.skipif(
    not extension._library("cpu").exists(), reason="the C++ part is not built in this installation"
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The extension module as if it were installed in tmp_path; returns a writer of the build record."""
    monkeypatch.setattr(extension, "_HERE", tmp_path)
    monkeypatch.setattr(extension, "_BUILD_RECORD", tmp_path / "_build.json")
    extension.load.cache_clear()

    def write(**record):
        (tmp_path / "_build.json").write_text(json.dumps(record))
        extension.load.cache_clear()

    yield write
    extension.load.cache_clear()


@needs_library
def test_loads_once_and_says_what_it_is():
    assert extension.load("cpu") is None
    status = extension.status()
    assert status["cpu"].startswith("loaded, uses ")
    for key in ("compiler", "torch", "commit", "flags", "machine"):
        assert status[key], key
    assert extension.build_record()["torch_target"] == "2.11"


def test_not_built_says_how(elsewhere):
    reason = extension.load("cpu")
    assert "not built" in reason and "pip install" in reason
    assert extension.status()["cpu"] == f"not available: {reason}"


def test_not_built_gives_the_build_s_reason(elsewhere):
    elsewhere(
        cpu={"built": False, "reason": "there was no C++ compiler (looked for 'c++'); install g++ or set CXX"}
    )
    assert "no C++ compiler" in extension.load("cpu")


@pytest.mark.parametrize(
    "record, words",
    [
        ({"machine": "riscv64"}, "built for riscv64, this is"),
        ({"torch_target": "99.0"}, f"built for torch 99.0 and later, you have {torch.__version__}"),
        ({"torch": "2.15.0"}, f"built with torch 2.15.0, you have {torch.__version__}) did not load"),
    ],
    ids=["machine", "older torch", "no library"],
)
def test_built_for_something_else(elsewhere, record, words):
    extension._library("cpu").write_bytes(b"not a shared library")
    elsewhere(**record)
    assert words in extension.load("cpu")


@pytest.mark.parametrize(
    "built, capability, fits",
    [
        (["8.0", "9.0a"], (8, 6), True),
        (["8.0", "9.0a"], (9, 0), True),
        (["8.6"], (8, 0), False),
        (["9.0a"], (9, 1), False),
        (["9.0a"], (10, 0), False),
        (["10.0"], (10, 3), True),
        (["8.0+PTX"], (12, 0), True),
        (["9.0a+PTX"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),
        (["10.0f+PTX"], (10, 3), True),
        (["10.0f+PTX"], (12, 0), False),
        (["12.0+PTX"], (9, 0), False),
    ],
    ids=str,
)
def test_architectures_of_the_cuda_kernels(elsewhere, built, capability, fits):
    elsewhere(cuda={"built": True, "architectures": built})
    reason = extension.why_not_on_gpu(capability)
    if fits:
        assert reason is None
    else:
        own = f"{capability[0]}.{capability[1]}"
        exact = {"9.0": "9.0a"}.get(own, own)
        assert f"this GPU has {own}; TORCH_CUDA_ARCH_LIST={exact} pip install" in reason


def test_the_tensors_own_gpu_and_the_driver_decide(monkeypatch):
    from depict_kernels import backends

    capabilities = {0: (7, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(extension, "load", lambda part: None)
    monkeypatch.setattr(extension, "build_record", lambda: {"cuda": {"architectures": ["8.0", "9.0a"]}})
    monkeypatch.setattr(extension, "why_not_on_driver", lambda: None)
    why = lambda index: backends.why_unavailable(
        "cuda", "mask_logits", torch.device("cuda", index), torch.half
    )
    assert why(1) is None and "this GPU has 7.0" in why(0)
    monkeypatch.setattr(extension, "why_not_on_driver", lambda: "update the driver")
    assert why(1) == "update the driver"


@pytest.mark.skipif(extension.load("cuda") is not None, reason="the CUDA part is not built here")
def test_driver_is_asked_for_its_version():
    reason = extension.why_not_on_driver()
    if ctypes.util.find_library("cuda") is None:
        assert "the driver supports CUDA 0.0; update the driver" in reason
    else:
        assert reason is None or "update the driver" in reason


def test_cuda_kernels_are_built_where_they_can_be():
    reason = extension.build_record().get("cuda", {}).get("reason")
    if reason:
        pytest.skip(reason)
    assert extension.load("cuda") is None


def test_cuda_kernels_not_built_gives_the_reason(elsewhere):
    elsewhere(cuda={"built": False, "reason": "nvcc was not found"})
    assert extension.load("cuda") == "the CUDA kernels were not built: nvcc was not found"
    assert extension.status()["cuda"] == f"not available: {extension.load('cuda')}"


@pytest.mark.parametrize("part", ["cpu", "cuda", "cuda_emulated"])
def test_a_library_of_an_earlier_build_is_not_loaded(elsewhere, part):
    """Built in place, then again without this part: the record says so, the library still lies there."""
    extension._library(part).write_bytes(b"would be loaded, which fails")
    elsewhere(**{part: {"built": True, "reason": None}})
    assert "did not load" in extension.load(part)
    elsewhere(**{part: {"built": False, "reason": "it was switched off"}})
    reason = extension.load(part)
    assert "not built" in reason and (
        part == "cuda_emulated" or reason.endswith("built: it was switched off")
    )


def test_damaged_record_is_named(elsewhere):
    extension._BUILD_RECORD.write_text("{")
    assert "_build.json is not JSON" in extension.status()["error"]


def test_an_explicit_backend_raises_the_reason(elsewhere):
    from depict_kernels import backends, ops

    elsewhere(cpu={"built": False, "reason": "there was no C++ compiler"})
    logits = torch.randn(1, 3, 2, 2)
    with pytest.raises(
        backends.BackendUnavailable, match=r"no C\+\+ compiler.*Available: auto, reference, torch"
    ):
        ops.upsample_argmax(logits, (4, 4), backend="cpp")
    assert ops.upsample_argmax(logits, (4, 4)).shape == (1, 4, 4)  # auto takes stock torch


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("part", ["cpu", "cuda", "cuda_emulated"])
def test_only_the_stable_interface_is_linked(part):
    if not extension._library(part).exists():
        pytest.skip("not built in this installation")
    command = ["nm", "-D", "--undefined-only", str(extension._library(part))]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(name.startswith("aoti_torch_") for name in symbols)
    unstable = [
        name
        for name in symbols
        if name.startswith("_Z") and any(ns in name for ns in ("3c10", "2at", "5torch"))
    ]
    assert not unstable
    assert not any(name.startswith(("Py", "_Py")) for name in symbols)
    # Neither the driver nor a shared CUDA runtime: the module loads where there is none.
    assert not any(name.startswith(("cuda", "cu")) and not name.startswith("cur") for name in symbols)


@needs_library
def test_unknown_instruction_set_is_refused():
    extension.load("cpu")
    ops = torch.ops.depict_kernels_cpu
    before = ops.use_instruction_set("")
    with pytest.raises(RuntimeError, match="no instruction set 'mmx' here; there are: .*baseline"):
        ops.use_instruction_set("mmx")
    assert ops.use_instruction_set("") == before


@needs_library
def test_private_operators_check_what_memory_safety_needs():
    extension.load("cpu")
    op = torch.ops.depict_kernels_cpu.cross_entropy
    logits, target = torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    loss = torch.zeros(())
    good = [logits, target, None, None, loss, None, None, 255, 0.0, True]
    for position, value in [
        (0, logits[0]),
        (0, logits.half()),
        (1, target.float()),
        (1, target.expand(2, -1, -1)),
        (2, torch.ones(2, dtype=torch.float64)),
        (2, torch.ones(3)),
        (3, torch.ones(1, 4, 3)),
        (4, torch.zeros((), dtype=torch.float64)),
        (5, torch.zeros(1, 4, 5)),
        (6, torch.zeros(1, 3, 2, 3)),
        (6, torch.zeros(1, 2, 2, 3).transpose(1, 3)),
    ]:
        wrong = list(good)
        wrong[position] = value
        with pytest.raises(RuntimeError):
            op(*wrong)
    assert op(*good) == -1


def copy_sources(folder):
    """What a clone holds that builds the package, without what was built in this tree."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build*.json")
    shutil.copytree(ROOT / "depict_kernels", folder / "depict_kernels", ignore=built)


# Makes the file that it is asked for, empty, so that builds take seconds: what is tested is where libraries go.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        -o) : > "$2" ;;
        -MF) echo "x:" > "$2" ;;
    esac
    shift
done
"""


@pytest.mark.slow
@needs_sources
def test_a_package_holds_what_its_own_build_made_and_leaves_the_tree_alone(tmp_path):
    copy_sources(tmp_path)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    package = tmp_path / "depict_kernels"
    environment = {**os.environ, "CXX": str(compiler), "DEPICT_KERNELS_NO_CUDA": "1"}
    environment["DEPICT_KERNELS_EMULATE_CUDA"] = "0"  # conftest.py may have set it

    def build(command, **variables):
        result = subprocess.run(
            [sys.executable, "setup.py", "-q", *command.split()],
            cwd=tmp_path, env=environment | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr

    def libraries(folder):
        return {path.name.partition(".")[0] for path in folder.glob("*.so")}

    # In the tree: the record stands beside the libraries.
    build("build_ext --inplace", DEPICT_KERNELS_EMULATE_CUDA="1")
    assert libraries(package) == {"_cpu", "_cuda_emulated"}
    record = (package / "_build.json").read_bytes()
    assert json.loads(record)["cuda_emulated"]["built"] is True
    # A package: without what the earlier build left in build/lib* and in the tree, and with a record of its own.
    build("build")
    (packed,) = (tmp_path / "build").glob("lib*/depict_kernels")
    assert libraries(packed) == {"_cpu"}
    assert json.loads((packed / "_build.json").read_bytes())["cuda_emulated"]["built"] is False
    assert (package / "_build.json").read_bytes() == record
    assert libraries(package) == {"_cpu", "_cuda_emulated"}
    # An editable build, as setuptools' editable_wheel runs it, writes to the tree again.
    build("editable_wheel --dist-dir out")
    assert json.loads((package / "_build.json").read_bytes())["cuda_emulated"]["built"] is False
    (packed / "_build.json").unlink()
    build("editable_wheel --dist-dir out", DEPICT_KERNELS_NO_EXTENSIONS="1")
    assert json.loads((package / "_build.json").read_bytes())["cpu"]["built"] is False
    assert not (packed / "_build.json").exists()


@pytest.mark.slow
@needs_sources
@pytest.mark.parametrize(
    "variables, words",
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (looked for 'no-such-compiler')"),
        ({"CXX": "false"}, "'false' does not answer to --version; install a C++ compiler"),
        ({"DEPICT_KERNELS_NO_EXTENSIONS": "1"}, "DEPICT_KERNELS_NO_EXTENSIONS was set"),
    ],
    ids=["no compiler", "one that does nothing", "switched off"],
)
def test_builds_without_the_compiled_part(tmp_path, variables, words):
    copy_sources(tmp_path)
    # A library of an earlier build must not slip into a package that says it has none.
    (tmp_path / "depict_kernels" / "_cpu.abi3.so").touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", "out"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert words in result.stderr
    built = tmp_path / "out" / "lib" / "depict_kernels"
    record = json.loads((built / "_build.json").read_text())
    assert record["cpu"]["built"] is False and words in record["cpu"]["reason"]
    assert (built / "extension.py").exists() and not list(built.glob("*.so"))


def run_setup(code, environment):
    """Runs setup.py up to its setup(), then ``code``, to which it is ``module``."""
    begin = "import setuptools, runpy, json; setuptools.setup = lambda **k: None\n"
    begin += "module = runpy.run_path('setup.py')\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@needs_sources
def test_readme_names_the_architectures_that_are_built():
    variables = {"DEPICT_KERNELS_NO_CUDA": "1", "MAX_JOBS": "1"}
    result = run_setup("print(module['CUDA_ARCHITECTURES'])", {**os.environ, **variables})
    numbers = [entry.removesuffix("+PTX").rstrip("a") for entry in result.stdout.strip().split(";")]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"compute capability {', '.join(numbers[:-1])} and {numbers[-1]} unless" in text
    assert len(numbers) == 4 and "compiles for four CUDA architectures" in text


@needs_sources
@pytest.mark.parametrize(
    "variables, words",
    [
        ({"MAX_JOBS": "0"}, "MAX_JOBS: '0' is no number of compilations"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: 'many' is no number of compilations"),
        ({"CXX": "c++ '-O"}, 'CXX: "c++ \'-O" is no command'),
    ],
    ids=["no bound", "no number", "quotes"],
)
def test_nonsense_in_build_variables_is_named(variables, words):
    result = run_setup("", {**os.environ, "DEPICT_KERNELS_NO_CUDA": "1", **variables})
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


@needs_sources
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("command", ["", "c++ -g0", "{tools}/ccache c++"])
def test_host_compiler_is_the_compiler_alone(tmp_path, command):
    (tmp_path / "ccache").symlink_to(shutil.which("env"))  # runs what follows, as ccache does
    variables = {"DEPICT_KERNELS_NO_CUDA": "1", "CXX": command.format(tools=tmp_path), "MAX_JOBS": ""}
    result = run_setup("print(module['host_compiler']())", {**os.environ, **variables})
    assert result.stdout.strip() == shutil.which("c++"), result.stderr
