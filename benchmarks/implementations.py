"""Everything that is timed against each other: stock torch in all its ways, other libraries where installed, ours.

``build(case, name)`` gives a function of the case's inputs, or raises :class:`Unavailable` with the reason. "eager" is
the plain torch one writes without thinking of kernels: the baseline of every ratio.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, decoder_parameters, make_decoder
from depict_kernels import backends, ops

OURS = ("cpp", "triton", "cuda")
SDPA = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
AUTO = ("auto", "compile(auto)")  # what a user gets without naming a backend
COMPILED = ("compile(eager)", "compile(torch)", "compile(auto)", "flex")
ATTENTION = (*(f"sdpa {name}" for name in SDPA), "flex", "flash_attn 2", "flash_attn 3")
STOCK = ("eager", "reference", "torch", "compile(eager)", "compile(torch)", *ATTENTION, "liger")
NAMES = (*STOCK, *OURS, *AUTO)


class Unavailable(RuntimeError):
    """An implementation that cannot run a case here; says why."""


def names_for(case: Case, full: bool = False) -> list[str]:
    """The implementations worth their time for a case; ``full`` adds the slow and the compiled ones everywhere."""
    attention = case.family == "attention"
    # On the CPU eager torch runs between the rounds of every other implementation and is timed there.
    names = ["eager"] if case.device == "cuda" or case.growth else []
    if full or case.compiled:
        names.append("reference")
    if full or attention or case.device == "cuda" or case.family == "mask_head":
        names.append("torch")
    if full or case.compiled:
        names += ["compile(eager)", "compile(torch)"]
    if attention:
        # On the CPU the stock kernels are two; flex costs a compilation.
        known = ATTENTION if case.device == "cuda" else ("sdpa flash", "sdpa math", "flex")
        names += [name for name in known if full or case.compiled or name != "flex"]
    if case.operator == "upsample_cross_entropy" and case.device == "cuda":
        names.append("liger")
    if case.growth and case.device == "cpu" and case.H > 1024 and not full:
        names.remove("eager")  # tens of seconds and 10 GiB
    if case.device == "cuda":
        names += ["triton", "cuda"]
    elif case.family != "decoder":  # a decoder calls several operators: "auto" is what a user gets
        names.append("cpp")
    if case.device == "cuda" or case.family != "upsample":  # of which it is "cpp"
        names.append("auto")
    if case.family == "decoder" and "compile(torch)" in names:  # the rest are one operator: nothing to fuse
        names.append("compile(auto)")
    return names


# --- plain eager torch ---


def _attention(q: Tensor, w: Tensor) -> Tensor:
    k = w.transpose(1, 2)
    scores = q.transpose(1, 2) @ k.mT * w.shape[-1] ** -0.5
    return (scores.softmax(-1) @ k).transpose(1, 2)


def _mask_logits(patches, classes, weight, bias, grid, eps=1e-5) -> Tensor:
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = (patches @ classes.mT).to(weight.dtype)
    return F.layer_norm(masks, masks.shape[-1:], weight, bias, eps).mT.unflatten(-1, grid)


def _upsample(logits: Tensor, size) -> Tensor:
    # 16-bit logits are widened first, as the kernels do; interpolating them in 16 bits would be faster and wrong.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(_upsample(logits, target.shape[1:]), target, ignore_index=ignore_index)


def _labels(logits: Tensor, size) -> Tensor:
    return _upsample(logits, size).argmax(1)


def _confusion(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    # Ignored pixels go to a bin of their own, so that nothing is gathered and nothing waits for the device.
    classes = logits.shape[1]
    pairs = torch.where(
        target == ignore_index, classes**2, target * classes + _labels(logits, target.shape[1:])
    )
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=logits.device)
    ones = torch.ones((), dtype=torch.int64, device=logits.device).expand(pairs.numel())
    return counts.scatter_add_(0, pairs.flatten(), ones)[:-1].view(classes, classes)


@contextlib.contextmanager
def eager_operators() -> Iterator[None]:
    """Within the context the models compute with plain eager torch: what a decoder costs without this library."""
    plain = {
        "subspace_self_attention": lambda w, *_, **__: _attention(w, w),
        "subspace_cross_attention": lambda q, w, *_, **__: _attention(q, w),
        "mask_logits": lambda *inputs, **_: _mask_logits(*inputs),
        "upsample_cross_entropy": lambda x, target, *_, **__: _loss(
            x, target, ops.default_ignore_index(x.shape[1])
        ),
        "upsample_argmax": lambda x, size, dtype=torch.int64, **_: _labels(x, size).to(dtype),
    }
    before = {name: getattr(ops, name) for name in plain}
    for name, function in plain.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Models within the context compute with an implementation of this name: "eager", "auto" or a backend's."""
    with eager_operators() if name == "eager" else backends.use_backend(name):
        yield


def _eager(case: Case) -> Callable[..., Tensor]:
    # Sizes are read here: torch.compile should see tuples, not a case.
    if case.operator == "subspace_self_attention":
        return lambda w: _attention(w, w)
    if case.operator == "subspace_cross_attention":
        return _attention
    if case.operator == "mask_logits":
        return functools.partial(_mask_logits, grid=(case.h, case.w))
    if case.operator == "upsample_argmax":
        return functools.partial(_labels, size=(case.H, case.W))
    loss = case.operator == "upsample_cross_entropy"
    return functools.partial(_loss if loss else _confusion, ignore_index=_ignored(case))


def _ignored(case: Case) -> int:
    return ops.default_ignore_index(case.C)


# --- ours: one of the package's backends ---


def _require(case: Case, name: str, operators: tuple[str, ...]) -> None:
    if name == "triton" and case.device == "cpu":
        raise Unavailable("Triton's interpreter on the CPU is for tests; its time means nothing")
    for operator in operators if name in OURS else ():
        if reason := backends.why_unavailable(name, operator, case.device, case.dtype):
            raise Unavailable(reason)


def _backend(case: Case, name: str) -> Callable[..., Tensor]:
    _require(case, name, (case.operator,))
    function = getattr(ops, case.operator)
    if case.operator == "mask_logits":
        grid = (case.h, case.w)
        return lambda *tensors: function(*tensors, grid, backend=name)
    if case.operator == "upsample_argmax":
        size = (case.H, case.W)
        return lambda logits: function(logits, size, backend=name)
    if case.operator in ("upsample_cross_entropy", "upsample_confusion"):
        ignored = _ignored(case)
        return lambda logits, target: function(logits, target, ignored, backend=name)
    return lambda *tensors: function(*tensors, backend=name)


_CORES = {
    "depict_sa_decoder": ("subspace_self_attention", "mask_logits"),
    "depict_ca_decoder": ("subspace_self_attention", "subspace_cross_attention", "mask_logits"),
}


def _decoder(case: Case, name: str, wrap: Callable = lambda function: function) -> Callable[..., Tensor]:
    """A whole decoder as a function of patches and parameters; in 16 bits under autocast, as it is trained.

    ``wrap`` is torch.compile or nothing: the choice of the implementation stays outside of what is compiled.
    """
    _require(case, name, _CORES[case.operator])
    decoder, names, grid = (
        make_decoder(case).to(case.device),
        tuple(decoder_parameters(case)),
        (case.h, case.w),
    )

    def core(patches, *parameters):
        return torch.func.functional_call(decoder, dict(zip(names, parameters)), (patches, grid))

    core = wrap(core)

    def run(patches, *parameters):
        half = case.dtype in (torch.float16, torch.bfloat16) and patches.dtype != torch.float64
        with way(name), torch.autocast(case.device, case.dtype, enabled=half):
            return core(patches, *parameters)

    return run


# --- torch's and other libraries' attention ---


def _padded(attend: Callable, q: Tensor, w: Tensor, multiple: int = 8) -> Tensor:
    """Pads the head width with zeros, which changes no score, where kernels need rows of 16 bytes."""
    dim, scale = w.shape[-1], w.shape[-1] ** -0.5
    pad = -dim % multiple
    if pad:
        same = q is w
        w = F.pad(w, (0, pad))
        q = w if same else F.pad(q, (0, pad))
    return attend(q, w, scale)[..., :dim]


def _sdpa(which: str) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, SDPA[which])

    def attend(q, w, scale):
        k = w.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.transpose(1, 2), k, k, scale=scale).transpose(1, 2)

    return functools.partial(_padded, attend, multiple=1 if which == "math" else 8)


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, w, scale):
        k = w.transpose(1, 2)
        return compiled(q.transpose(1, 2), k, k, scale=scale).transpose(1, 2)

    return functools.partial(_padded, attend, multiple=16)


def _flash_attn(version: int) -> Callable:
    module = {2: "flash_attn", 3: "flash_attn_interface"}[version]
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")
    function = importlib.import_module(module).flash_attn_func

    def attend(q, w, scale):
        out = function(q, w, w, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out

    return functools.partial(_padded, attend)


def _liger(case: Case) -> Callable[..., Tensor]:
    """Liger fuses the cross-entropy and its gradient, not the upsampling: the upsampled logits are still stored."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger_kernel is not installed")
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(ignore_index=_ignored(case))

    def run(logits, target):
        high = _upsample(logits, target.shape[1:])
        return loss(high.permute(0, 2, 3, 1).reshape(-1, high.shape[1]), target.flatten())

    return run


def build(case: Case, name: str) -> Callable[..., Tensor]:
    """The function that is timed. Raises :class:`Unavailable` with the reason, ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"unknown implementation {name!r}; choose from {', '.join(NAMES)}")
    if name.startswith("compile"):
        torch._dynamo.reset()
        name = name.removeprefix("compile(").removesuffix(")")
        compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        return _decoder(case, name, compiler) if case.family == "decoder" else compiler(build(case, name))
    if name == "liger":
        return _liger(case)
    if name in ATTENTION:
        if name.startswith("sdpa "):
            attend = _sdpa(name.removeprefix("sdpa "))
        else:
            attend = _flex() if name == "flex" else _flash_attn(int(name[-1]))
        return attend if case.operator == "subspace_cross_attention" else lambda w: attend(w, w)
    if case.family == "decoder":
        return _decoder(case, name)
    return _eager(case) if name == "eager" else _backend(case, name)
