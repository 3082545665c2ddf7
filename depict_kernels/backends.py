"""Names of the backends, what is available here, and which one an operator call takes.

A backend is a set of modules with the stems of ``depict_kernels.ops`` (attention, mask_head, upsample).
``auto`` picks by device, dtype and class of shapes. A backend that is named explicitly never falls back: it works or
raises :class:`BackendUnavailable`, saying what is missing and what is available.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator

import torch

from depict_kernels import measured, self_check
from depict_kernels._constant import constant_in_graphs
from depict_kernels.shape_classes import shape_class

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

# What "auto" prefers on the CPU: C++ for the upsample operators, and for attention and mask head in float32 in the
# classes of shapes where it measured faster than stock torch (benchmarks/results/cpu_*.json). On a GPU it is what
# measured.py has for the architecture, the operator, the dtype and the class of the shape. Neither holds anything that
# was not measured. What no record knows of an NVIDIA GPU the operators of self_check.py give to _AUTO_CHECKED, once
# they have passed: by the bytes they move they are ahead of stock torch by far. "cuda" needs nothing compiled at the
# first call.
_AUTO_CPU = ("cpp",)
_CPU_MEASURED = {
    "subspace_self_attention": ("head_dim 100, over 512 tokens",),
    "subspace_cross_attention": (),
    "mask_logits": tuple(
        f"{classes} classes, width {width} 512, over 1000 patches"
        for classes in ("up to 32", "33 to 256")
        for width in ("up to", "over")
    ),
}
_AUTO_CHECKED = ("cuda", "triton")

_DIFFERENTIATING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)

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
    check_name(name)
    before, _override = _override, None if name == "auto" else name
    try:
        yield
    finally:
        _override = before


def check_name(name: str) -> None:
    """Raises ValueError for a name that is no backend's."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from auto, {', '.join(BACKENDS)}")


def named(requested: str) -> str:
    """The backend that a call names: its argument, else the surrounding :func:`use_backend`, else "auto"."""
    check_name(requested)
    return _override or "auto" if requested == "auto" else requested


def why_unavailable(
    backend: str, operator: str, device: str | torch.device, dtype: torch.dtype
) -> str | None:
    """None where ``backend`` can run ``operator`` on this device and dtype, else the reason.

    "cuda" without an index is the current GPU.
    """
    device_type = torch.device(device).type
    if backend in ("reference", "torch"):
        return None
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


def _architecture(device: torch.device) -> str | None:
    """The key of measured.py for an NVIDIA GPU, "sm_90"; None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _measured(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
    """Class of shapes -> backends, best first, none where stock torch is; lacks what was not measured."""
    table = measured.AUTO.get(_architecture(device), {}).get(operator, {})
    return table.get(str(dtype).removeprefix("torch."), {})


def auto_source(device: str | torch.device) -> str:
    """Where ``auto``'s choice on this device comes from, in words."""
    device = torch.device(device)
    architecture = _architecture(device)
    if architecture in measured.SOURCES:
        return f"measured on {architecture}: benchmarks/results/{measured.SOURCES[architecture]}"
    if architecture is not None:
        return (
            f"no record of {architecture} yet: kernels that agreed with float64 on this GPU, else stock torch; "
            "float32 shown, 16 bit is checked at its first call"
        )
    if device.type == "cpu":
        return "C++ where it is built and measured ahead"
    return f"no measurement of {device.type} yet"


def _checks_itself(operator: str, device: torch.device) -> bool:
    """Whether ``auto`` goes by :mod:`depict_kernels.self_check` for what was not measured."""
    architecture = _architecture(device)
    return (
        architecture is not None
        and operator in self_check.OPERATORS
        and int(architecture.removeprefix("sm_")) >= 80
    )


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and _architecture(device) is None  # tests give the CPU a GPU's table


@constant_in_graphs
def exporting() -> bool:
    """Whether torch.export makes a program of the call."""
    return torch.compiler.is_exporting()


@constant_in_graphs
def _asks_shape(operator: str, device: torch.device, dtype: torch.dtype, compiling: bool) -> bool:
    """Whether ``auto`` depends on the shape: elsewhere no compiled graph shall be guarded by it."""
    if _on_cpu(device):
        # A program that is exported or traced is for other machines too, and for other sizes: stock operators. So is
        # a mask head in compiled code, where inductor fuses them.
        traced = exporting() or torch.jit.is_tracing()
        fused = compiling and operator == "mask_logits"
        return bool(_CPU_MEASURED.get(operator)) and not (traced or fused)
    return _checks_itself(operator, device) or bool(_measured(operator, device, dtype))


def _candidates(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: str | None,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[tuple[str, ...], bool]:
    """What ``auto`` tries before ``torch``, best first, and whether that must pass its check first."""
    if _on_cpu(device):
        measured_dtype = dtype == (parameter_dtype or dtype) == torch.float32
        ahead = operator not in _CPU_MEASURED or (measured_dtype and shape in _CPU_MEASURED[operator])
        return (_AUTO_CPU if ahead else ()), False
    known = _measured(operator, device, dtype)
    if shape in known:
        return known[shape], False
    return (_AUTO_CHECKED if _checks_itself(operator, device) and shape in self_check.SHAPES else ()), True


@constant_in_graphs
def _resolve(
    requested: str,
    operator: str,
    device: str | torch.device,
    dtype: torch.dtype,
    shape: str | None = None,
    parameter_dtype: torch.dtype | None = None,
) -> str:
    device = torch.device(device)

    def why_not(name: str) -> str | None:
        reason = why_unavailable(name, operator, device, dtype)
        if reason is None and parameter_dtype is not None:
            reason = why_unavailable(name, operator, device, parameter_dtype)
            return reason and f"weight and bias: {reason}"
        return reason

    if requested == "auto":
        names, checks = _candidates(operator, device, dtype, shape, parameter_dtype)
        for name in names:
            if why_not(name) is None and not (
                checks and self_check.why_not(name, operator, device, dtype, shape)
            ):
                return name
        return "torch"
    reason = why_not(requested)
    if reason is not None:
        choice = ", ".join(name for name in BACKENDS if why_not(name) is None)
        raise BackendUnavailable(
            f"backend {requested!r} cannot run {operator} here: {reason}. Available: auto, {choice}"
        )
    return requested


def require(requested: str, operators: Iterable[str], device: str | torch.device, dtype: torch.dtype) -> None:
    """Raises what the first call would: ValueError or :class:`BackendUnavailable` unless all operators run here."""
    check_name(requested)
    for operator in operators:
        _resolve(requested, operator, device, dtype)


def auto_choices(operator: str, device: str | torch.device) -> dict[str, str]:
    """What ``auto`` takes here: {"float32, 33 to 256 classes, factor over 8": "cuda", ..., "otherwise": "torch"}.

    Where nothing was measured or checked there is "otherwise" alone.
    """
    device = torch.device(device)
    table = {
        name: [*known]
        for name, known in measured.AUTO.get(_architecture(device), {}).get(operator, {}).items()
    }
    if _on_cpu(device) and operator in _CPU_MEASURED:
        table["float32"] = _CPU_MEASURED[operator]
    if _checks_itself(operator, device):
        table["float32"] = dict.fromkeys([*table.get("float32", ()), *self_check.SHAPES])
    choices = {}
    for name, classes in table.items():
        for shape in classes:
            choices[f"{name}, {shape}"] = _resolve("auto", operator, device, getattr(torch, name), shape)
    return choices | {"otherwise": _resolve("auto", operator, device, torch.float32)}


def choose(
    requested: str,
    operator: str,
    tensor: torch.Tensor,
    *others: torch.Tensor,
    parameter_dtype: torch.dtype | None = None,
    **sizes,
) -> str:
    """The backend a call takes: the argument, else the surrounding :func:`use_backend`, else ``auto``'s table.

    The table is asked for ``tensor``'s dtype; the backend must take ``parameter_dtype``, weight's and bias's, too.
    ``others`` are the inputs that may be differentiated beside ``tensor``.
    ``sizes`` are those of :func:`depict_kernels.shape_classes.shape_class`.

    Registered operators know reverse-mode differentiation alone, and torch would drop a forward-mode tangent
    silently: under torch.func.grad, torch.func.jvp and dual numbers ``auto`` takes ``torch``.

    Raises ValueError for an unknown name and :class:`BackendUnavailable` for one that cannot run here.
    """
    requested = named(requested)
    if operator in _DIFFERENTIABLE and followed(tensor, *others):
        if requested not in ("auto", "torch"):
            raise BackendUnavailable(
                f"backend {requested!r} cannot run {operator} under torch.func.grad, torch.func.jvp, "
                "forward-mode differentiation or a vmap with gradient. Available: auto, torch"
            )
        return "torch"
    shape = None
    compiling = torch.compiler.is_compiling()
    if requested == "auto" and _asks_shape(operator, tensor.device, tensor.dtype, compiling):
        shape = shape_class(operator, **sizes)
    name = _resolve(requested, operator, tensor.device, tensor.dtype, shape, parameter_dtype)
    if requested == "auto":
        largest = _largest_head_dim(name, operator)
        if largest is not None and tensor.shape[-1] > largest:
            return "torch"
    return name


@constant_in_graphs
def _largest_head_dim(backend: str, operator: str) -> int | None:
    """A backend's attention module may say from which head_dim on it has no kernel, as MAX_HEAD_DIM."""
    if OPERATORS[operator] != "attention":
        return None
    return getattr(implementation(backend, "attention"), "MAX_HEAD_DIM", None)


def followed(*tensors: torch.Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation follows one of these tensors through a call."""
    if torch.compiler.is_compiling():
        # The level is read where the compiler sees it: entering one later then compiles anew.
        return torch.autograd.forward_ad._current_level >= 0 or _traces_transform()
    if torch._C._functorch.peek_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0:
        return False  # the usual call, soon done
    return any(_in_transform(t) for t in tensors)


@constant_in_graphs
def _traces_transform() -> bool:
    """Whether the compiler traces the inside of torch.func.grad or torch.func.jvp, by which it guards its graphs."""
    inside = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in _DIFFERENTIATING for level in inside)


def _in_transform(tensor: torch.Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation follows this tensor, or vmap hides that autograd does."""
    batched = torch._C._functorch.is_batchedtensor(tensor)
    while torch._C._functorch.is_batchedtensor(tensor):  # torch.func.grad of a function that uses vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if batched and tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_gradtrackingtensor(tensor):
        return True
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def implementation(backend: str, stem: str):
    """The module that implements ``stem`` in ``backend`` (imported on first use)."""
    return importlib.import_module(f"{_FOLDERS[backend]}.{stem}")
