"""The emulator of the CUDA kernels: it computes what a GPU would, and planted errors do not pass."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not shutil.which(COMPILER[0]):
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    flags = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DDEPICT_EMULATE", "-Wno-unknown-pragmas"]
    sources = [ROOT / "tests" / "emulator_kernels.cu", ROOT / "csrc" / "cuda" / "emulator.cpp"]
    command = [*COMPILER, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


def launch(library, name, *arguments) -> str | None:
    """The emulator's error, or None."""
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    convert = lambda a: ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a
    error = function(*map(convert, arguments))
    return None if error is None else error.decode()


def neighbours(library, monkeypatch, broken) -> list[torch.Tensor]:
    results = []
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        out = torch.zeros(64)
        assert launch(library, "neighbours", out, ctypes.c_bool(broken)) is None
        results.append(out)
    return results


def test_a_barrier_makes_results_independent_of_the_order(emulated, monkeypatch):
    expected = torch.arange(1, 65) % 64
    assert all(torch.equal(out, expected.float()) for out in neighbours(emulated, monkeypatch, False))


def test_a_missing_barrier_shows_under_some_seed(emulated, monkeypatch):
    expected = (torch.arange(1, 65) % 64).float()
    assert any(not torch.equal(out, expected) for out in neighbours(emulated, monkeypatch, True))


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divergent_warp", "lanes of one warp do different things"),
        ("half_a_warp", "hangs"),
        ("half_a_barrier", "hangs"),
    ],
)
def test_divergence_is_an_error_and_not_a_hang(emulated, monkeypatch, name, words, seed):
    monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
    assert words in launch(emulated, name, torch.zeros(64))
    test_a_barrier_makes_results_independent_of_the_order(emulated, monkeypatch)  # and it works on


def test_copies_land_when_they_are_waited_for(emulated):
    values, out = torch.randn(32), torch.zeros(32)
    assert launch(emulated, "copy", values, out, ctypes.c_bool(True)) is None
    assert torch.equal(out, values)
    assert launch(emulated, "copy", values, out, ctypes.c_bool(False)) is None
    assert out.isnan().all()  # the poison of shared memory


@pytest.mark.parametrize(
    ("name", "words"), [("never_waited", "not waited for"), ("misaligned", "not aligned")]
)
def test_wrong_copies_are_errors(emulated, name, words):
    assert words in launch(emulated, name, torch.zeros(64))


@pytest.mark.parametrize(
    ("dtype", "transposed"),
    [
        (torch.float32, False),
        (torch.float16, False),
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
    ids=str,
)
def test_fragments_give_the_product(emulated, dtype, transposed):
    """Whole numbers, which every type holds exactly: the sums are exact too."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (n, 16), generator=generator).to(dtype) for n in (16, 8))
    out = torch.zeros(16, 8)
    given = b.mT.contiguous() if transposed else b
    kind = (torch.float32, torch.float16, torch.bfloat16).index(dtype)
    assert launch(emulated, "product", a, given, out, kind, ctypes.c_bool(transposed)) is None
    assert torch.equal(out, a.float() @ b.float().mT)


def test_products_are_cut_off_as_tensor_cores_do(emulated):
    """1 + 0.75 ulp is 1 there; a sum that is rounded to nearest would be an ulp larger."""
    a, b, out = torch.zeros(16, 16), torch.ones(8, 16), torch.zeros(16, 8)
    a[:, :4] = torch.tensor([1, *[2.0**-25] * 3])
    assert launch(emulated, "product", a, b, out, 0, ctypes.c_bool(False)) is None
    assert torch.equal(out, torch.ones(16, 8))
    a[:, 8:10] = 2.0**-24  # half an ulp each: the next step's products start from 24 bits below the largest
    assert launch(emulated, "product", a, b, out, 0, ctypes.c_bool(False)) is None
    assert torch.equal(out, torch.full((16, 8), 1 + 2.0**-23))
