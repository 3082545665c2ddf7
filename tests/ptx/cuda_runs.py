"""Runs the CUDA operators on CPU tensors with their kernels compiled to PTX and executed by the machine.

The emulated library does what it always does up to the launch, which it then hands over (csrc/cuda/emulator.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from depict_kernels import extension
from tests.ptx import machine, program

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STEMS = ("attention", "mask_head", "upsample")
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{SOURCES.parent}"]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("count", ctypes.c_int),
    ]


_Hook = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Launch))


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def why_not() -> str | None:
    """What keeps this from working, or None."""
    missing = [tool for tool in ("nm", "c++filt") if not shutil.which(tool)]
    missing += [] if nvcc() else ["nvcc"]
    return f"{' and '.join(missing)} not found" if missing else extension.load("cuda_emulated")


def _demangled(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return text.stdout.splitlines()


@lru_cache
def _symbols(library: str) -> dict[int, str]:
    """Demangled names of a library's functions by their offsets."""
    text = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTW] (\S+)$", text, re.M)
    return dict(zip((int(at, 16) for at, _ in found), _demangled([name for _, name in found])))


@lru_cache
def _sources() -> dict[str, list[Path]]:
    """Where each kernel is defined, by its name without template arguments."""
    kernels = {}
    for source in sorted(SOURCES.glob("*.cu")):
        for found in re.finditer(r"__global__[^;{]*?(\w+)\([^()]*\)\s*\{", source.read_text()):
            kernels.setdefault(found[1], []).append(source)
    return kernels


# A file whose launches name no kernel, so that nvcc compiles the one that is wanted and not all of the file's.
_ALONE = """\
#include "cuda/device.h"
#define launch(...) static_cast<const char*>(nullptr)
#include "cuda/{file}"
auto* wanted = &{kernel};
"""


def _compiled(architecture: str, source: Path, kernel: str) -> str:
    """The PTX text of ``kernel`` (depict::cuda::forward_kernel<float, 56>), maybe with others that are no templates."""
    with tempfile.TemporaryDirectory() as folder:
        alone, out = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
        alone.write_text(_ALONE.format(file=source.name, kernel=kernel))
        command = [nvcc(), *FLAGS, f"-arch=compute_{architecture.removeprefix('sm_')}", "-ptx", str(alone)]
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return program.without_comments(out.read_text())


@lru_cache
def _parsed(architecture: str, kernel: str) -> program.Program:
    name = re.sub(r"^void |\(.*", "", kernel.replace("(anonymous namespace)::", ""))
    (source,) = _sources()[name.split("<")[0].split("::")[-1]]
    text = _compiled(architecture, source, name)
    names = program.kernel_names(text)
    return program.parse(text, names[_demangled(names).index(kernel)])


class Executor(list):
    """Executes launches and keeps the kernels' names."""

    def __init__(self, architecture: str, options: dict):
        self.architecture, self.options = architecture, options
        self.regions: list[machine.Region] = []
        path = str(Path(extension.__file__).with_name("_cuda_emulated.abi3.so"))
        self.library = ctypes.CDLL(path)
        self.symbols = _symbols(path)
        exported = next(at for at, name in self.symbols.items() if name == "depict_hand_launches_to")
        self.base = ctypes.cast(self.library.depict_hand_launches_to, ctypes.c_void_p).value - exported
        self.hook = _Hook(self._take)
        self.error: ctypes.Array | None = None

    def call(self, run, name: str, *arguments, device: torch.device) -> None:
        """In the place of ``call`` of ops/cuda_kernels: its tensors are what the kernels may touch."""
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.regions = [machine.Region(s.data_ptr(), s.nbytes()) for s in storages]
        run(name, *arguments, device=device)

    def _take(self, pointer) -> int | None:
        try:
            self._launch(pointer.contents)
        except Exception as error:  # an exception cannot pass through C++
            self.error = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(self.error)
        return None

    def _launch(self, given: _Launch) -> None:
        kernel = self.symbols[given.kernel - self.base]
        parsed = _parsed(self.architecture, kernel)
        blob = bytearray(parsed.parameter_bytes)
        for i, parameter in enumerate(parsed.parameters.values()):
            size = given.sizes[i]
            if i >= given.count or size != parameter.size:
                raise RuntimeError(f"{kernel}: parameter {i} has {size} bytes, in PTX {parameter.size}")
            blob[parameter.offset : parameter.offset + size] = ctypes.string_at(given.arguments[i], size)
        machine.launch(
            parsed,
            (given.blocks,),
            given.threads,
            bytes(blob),
            self.regions,
            shared_bytes=given.shared_bytes,
            **self.options,
        )
        self.append(kernel)

    def counts(self) -> list[tuple[str, int]]:
        """How often each kernel ran, by its name with template arguments."""
        short = [
            re.sub(r"\(anonymous namespace\)::|depict::cuda::|^void |\(.*", "", kernel) for kernel in self
        ]
        return sorted(Counter(short).items())


@contextlib.contextmanager
def executing(architecture: str, **options) -> Iterator[Executor]:
    """Within the context the CUDA operators on CPU tensors run the kernels' PTX for ``architecture`` ("sm_80").

    ``options``: races, profile and approximate of machine.launch.
    """
    executor = Executor(architecture, options)
    modules = [importlib.import_module(f"depict_kernels.ops.cuda_kernels.{stem}") for stem in STEMS]
    modules.append(importlib.import_module("depict_kernels.ops.cuda_kernels._library"))
    before = [module.call for module in modules]
    for module, call in zip(modules, before):
        module.call = lambda *a, call=call, **k: executor.call(call, *a, **k)
    executor.library.depict_hand_launches_to(executor.hook)
    try:
        yield executor
    finally:
        executor.library.depict_hand_launches_to(None)
        for module, call in zip(modules, before):
            module.call = call
