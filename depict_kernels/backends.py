"""Names of the backends, what is available here, and which one an operator call takes.

A backend is a set of modules with the stems of ``depict_kernels.ops`` (attention, mask_head, upsample).
``auto`` picks by device and dtype. A backend that is named explicitly never falls back: it works or raises
:class:`BackendUnavailable`, saying what is missing and what is available.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from depict_kernels import measured

BACKENDS = ("reference", "torch", "cpp", "triton", "cuda")

# operator -> stem of the module that implements it in every backend's folder
OPERATORS = {
    "subspace_self_attention": "attention",
    "subspace_cross_attention": "attention",
    "mask_logits": "mask_head",
    "upsample_cross_entropy": "upsample",
    "upsample_argmax": "upsample",
    "upsample_confusion": "upsample",
}

_DIFFERENTIABLE = frozenset(OPERATORS) - {"upsample_argmax", "upsample_confusion"}

_FOLDERS = {
    "reference": "depict_kernels.ops.reference",
    "torch": "depict_kernels.ops.stock",
    "cpp": "depict_kernels.ops.compiled",
    "triton": "depict_kernels.ops.triton_kernels",
    "cuda": "depict_kernels.ops.cuda_kernels",
}

# What "auto" prefers on the CPU, best first; the first that is available for the operator wins. On a GPU it is what
# measured.py has for the architecture, the operator and the dtype. Neither holds anything that was not measured.
_AUTO_CPU = ("cpp", "torch")

# Of the whole process, like torch's own backend flags: a context variable would be per thread, but torch.compile
# cannot trace one in torch 2.11, and it guards on a plain global.
_override: str | None = None


class BackendUnavailable(RuntimeError):
    """An explicitly named backend cannot run this operator here."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every operator called with ``backend="auto"`` takes backend ``name``.

    An explicit ``backend=`` argument still wins. Holds for the whole process, not for one thread. Raises
    ValueError for an unknown name.
    """
    global _override
    _check_name(name)
    before, _override = _override, None if name == "auto" else name
    try:
        yield
    finally:
        _override = before


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from auto, {', '.join(BACKENDS)}")


def _has_stem(backend: str, stem: str) -> bool:
    try:
        return importlib.util.find_spec(f"{_FOLDERS[backend]}.{stem}") is not None
    except ModuleNotFoundError:
        return False


def why_unavailable(
    backend: str, operator: str, device: str | torch.device, dtype: torch.dtype
) -> str | None:
    """None where ``backend`` can run ``operator`` on this device and dtype, else the reason.

    "cuda" without an index is the current GPU.
    """
    device_type = torch.device(device).type
    if backend in ("reference", "torch"):
        return None
    if not _has_stem(backend, OPERATORS[operator]):
        return f"this version has no {backend} kernel for {operator}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it takes float16, bfloat16, float32 or float64, not {dtype}"
    if backend == "cpp":
        if device_type != "cpu":
            return f"it runs on CPU tensors and these are on {device_type}"
        from depict_kernels import extension

        return extension.load("cpu")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        if dtype == torch.bfloat16 and OPERATORS[operator] != "upsample":  # which has no products
            return "Triton's interpreter gets bfloat16 products wrong; use float32 or float16 there"
        return _why_not_dtype(backend, operator, dtype)
    if backend == "cuda":
        reason = _why_not_cuda(torch.device(device))
        return reason if reason is not None else _why_not_dtype(backend, operator, dtype)
    if device_type != "cuda":
        return f"it runs on GPU tensors and these are on {device_type}"
    return _why_not_dtype(backend, operator, dtype)


def _why_not_cuda(device: torch.device) -> str | None:
    from depict_kernels import extension

    if device.type == "cpu" and extension.emulated():
        return extension.load("cuda_emulated")
    if device.type != "cuda":
        return f"it runs on GPU tensors and these are on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU that this torch can use"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs"
    return (
        extension.load("cuda")
        or extension.why_not_on_driver()
        or extension.why_not_on_gpu(torch.cuda.get_device_capability(device))
    )


def _why_not_dtype(backend: str, operator: str, dtype: torch.dtype) -> str | None:
    """A backend's module may list the dtypes its kernels take as DTYPES; without a list it takes all of them."""
    taken = getattr(implementation(backend, OPERATORS[operator]), "DTYPES", None)
    if taken is None or dtype in taken:
        return None
    names = ", ".join(str(t).removeprefix("torch.") for t in taken)
    return f"its kernels take {names}; {str(dtype).removeprefix('torch.')} is not supported"


def available_backends(
    operator: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[str]:
    """The backends that can run ``operator`` here, in the order of :data:`BACKENDS`."""
    return [name for name in BACKENDS if why_unavailable(name, operator, device, dtype) is None]


def _candidates(operator: str, device: str | torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    device = torch.device(device)
    if device.type == "cpu":
        return _AUTO_CPU
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    choice = measured.AUTO.get(f"sm_{major}{minor}", {}).get(operator, {})
    name = choice.get(str(dtype).removeprefix("torch."))
    return () if name is None else (name,)


@torch.compiler.assume_constant_result
def _resolve(requested: str, operator: str, device: str | torch.device, dtype: torch.dtype) -> str:
    if requested == "auto":
        for name in _candidates(operator, device, dtype):
            if why_unavailable(name, operator, device, dtype) is None:
                return name
        return "torch"
    reason = why_unavailable(requested, operator, device, dtype)
    if reason is not None:
        choice = ", ".join(available_backends(operator, device, dtype))
        raise BackendUnavailable(
            f"backend {requested!r} cannot run {operator} here: {reason}. Available: auto, {choice}"
        )
    return requested


def choose(requested: str, operator: str, tensor: torch.Tensor) -> str:
    """The backend a call takes: the argument, else the surrounding :func:`use_backend`, else ``auto``'s table.

    Registered operators know reverse-mode differentiation alone, and torch would drop a forward-mode tangent
    silently: under torch.func.grad, torch.func.jvp and dual numbers ``auto`` takes ``torch``.

    Raises ValueError for an unknown name and :class:`BackendUnavailable` for one that cannot run here.
    """
    _check_name(requested)
    if requested == "auto":
        requested = _override or "auto"
    if operator in _DIFFERENTIABLE and not torch.compiler.is_compiling() and _in_transform(tensor):
        if requested not in ("auto", "torch"):
            raise BackendUnavailable(
                f"backend {requested!r} cannot run {operator} under torch.func.grad, torch.func.jvp or "
                "forward-mode differentiation. Available: auto, torch"
            )
        return "torch"
    name = _resolve(requested, operator, tensor.device, tensor.dtype)
    if requested == "auto":
        largest = _largest_head_dim(name, operator)
        if largest is not None and tensor.shape[-1] > largest:
            return "torch"
    return name


@torch.compiler.assume_constant_result
def _largest_head_dim(backend: str, operator: str) -> int | None:
    """A backend's attention module may say from which head_dim on it has no kernel, as MAX_HEAD_DIM."""
    if OPERATORS[operator] != "attention":
        return None
    return getattr(implementation(backend, "attention"), "MAX_HEAD_DIM", None)


def _in_transform(tensor: torch.Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation follows this tensor."""
    if torch._C._functorch.is_gradtrackingtensor(tensor):
        return True
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def implementation(backend: str, stem: str):
    """The module that implements ``stem`` in ``backend`` (imported on first use)."""
    return importlib.import_module(f"{_FOLDERS[backend]}.{stem}")
