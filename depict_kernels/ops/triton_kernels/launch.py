"""How the Triton kernels are launched, and how the same launches are recorded to be compiled without a GPU.

Every launch goes through :func:`launch`, with all arguments by name. Inside :func:`recording` the operators' host
functions run on meta tensors, launch nothing and leave a list of :class:`Launch`: what is compiled ahead of time
(``benchmarks/kernel_report.py``, ``tests/test_triton_aot.py``) is therefore exactly what a GPU would run.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from depict_kernels.ops.triton_kernels.tuning import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid, its arguments by name (constexpr ones too), the compiler's options."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict
    num_warps: int
    num_stages: int


_launching = threading.RLock()
# Of the process, not of a thread: autograd runs a GPU's backward kernels in a thread of its own.
_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within the context launches for ``architecture`` ("sm_90", "gfx942") are recorded instead of made.

    Of the whole process, those of backward passes too.
    """
    global _recording
    launches: list[Launch] = []
    before, _recording = _recording, (architecture, launches)
    try:
        yield launches
    finally:
        _recording = before


def architecture(device: torch.device) -> str:
    """The key of the launch tables: "sm_90", "gfx942", or "interpreter" for CPU tensors."""
    if _recording is not None:
        return _recording[0]
    return "interpreter" if device.type == "cpu" else _architecture(device)


@lru_cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """``input_precision`` of the dot products: TF32 only for float32, where torch's own setting asks for it and the
    architecture has it (of AMD's only CDNA 3; elsewhere Triton would refuse to compile).

    The new setting is read alone: the legacy flags raise once it was used, and setting them shows in it.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    name = architecture(device)
    return "ieee" if name.startswith("gfx") and name != "gfx942" else "tf32"


def launch(kernel, grid: tuple[int, ...], device: torch.device, config: Config, **arguments) -> None:
    """Launches ``kernel`` on the current stream of ``device``; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments, config.num_warps, config.num_stages))
        return
    # FP fusion is named because its default changes with Triton 3.10; the kernels count on fused multiply-adds.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    # One thread at a time: Triton puts a kernel into its cache before it has loaded it, and another thread that takes
    # it from there in between starts nothing.
    with _launching, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


def rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Copies what a kernel cannot walk: a strided last dimension, or rows too far apart for 32-bit tile offsets."""
    return [t if t.stride(-1) == 1 and t.stride(1) < 2**22 else t.contiguous() for t in tensors]


def unit_of(*tensors: Tensor) -> int:
    """The largest power of two, up to a 16-byte vector, that divides every stride but the last, which is 1.

    Kernels get strides in this unit: a constant factor is what makes a vector load provable.
    """
    unit = 16 // max(t.element_size() for t in tensors)
    for t in tensors:
        for size, stride in zip(t.shape[:-1], t.stride()[:-1]):
            if size > 1:
                unit = math.gcd(unit, stride)
    return unit


def strides(prefix: str, t: Tensor, unit: int) -> dict[str, int]:
    """The strides of (batch, row, ...) or (batch, row, head, ...) as kernel arguments, in units."""
    return {
        f"{prefix}_{name}": stride // unit for name, stride in zip(("batch", "row", "head"), t.stride()[:-1])
    }


def signature(recorded: Launch) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility of a launch's arguments, as Triton's launcher specialises them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            aligned = value.is_meta or value.data_ptr() % 16 == 0  # as torch's allocations are
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def fingerprint(recorded: Launch) -> tuple:
    """Equal for two launches that one compiled kernel serves."""
    return (recorded.kernel.__name__, str(signature(recorded)), recorded.num_warps, recorded.num_stages)


def compile_ahead(recorded: Launch, architecture: str):
    """Compiles a recorded launch for ``architecture``; returns Triton's compiled kernel."""
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    options = {
        "num_warps": recorded.num_warps,
        "num_stages": recorded.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(ASTSource(recorded.kernel, *signature(recorded)), target=target, options=options)
