"""The mask head: public function, checks, registration, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from depict_kernels import backends
from depict_kernels.ops import _library
from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.ops.stock import mask_head as stock

_STEM = "mask_head"


def mask_logits(
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cosines of patches and class embeddings, LayerNorm over the classes, laid out as masks.

    m = (x / |x|) . (q / |q|)^T, then LayerNorm over the C classes (Segmenter, arXiv 2105.05633, eq. 6; DEPICT
    keeps it). Zero vectors give zero cosines, not NaN.

    Args:
        patches: (B, N, D) floating point, N = h * w in row-major order.
        classes: (B, C, D), same dtype as patches.
        weight, bias: (C,) LayerNorm's affine parameters, both of one dtype, which may differ from the patches'.
        grid: (h, w) of the patches.
        eps: LayerNorm's epsilon.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        (B, C, h, w) logits in weight's dtype: float32 where the parameters are, also under autocast.
        Differentiable in patches, classes, weight and bias.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit each other.
        BackendUnavailable: a backend named explicitly cannot run here.
    """
    grid = _library.pair("grid", grid)
    _check(patches, classes, weight, bias, grid)
    patches, classes = _library.autocast(patches, classes)
    if patches.dtype != classes.dtype:
        raise TypeError(f"patches and classes must have one dtype, got {patches.dtype} and {classes.dtype}")
    sizes = {"classes": classes.shape[1], "width": classes.shape[2], "patches": patches.shape[1]}
    inputs = (patches, classes, weight, bias)
    backend = backends.choose(backend, "mask_logits", *inputs, parameter_dtype=weight.dtype, **sizes)
    if backend == "torch":
        return stock.mask_logits(patches, classes, weight, bias, grid, eps)
    return torch.ops.depict_kernels.mask_logits(patches, classes, weight, bias, grid, eps, backend)[0]


def _check(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> None:
    for name, t in {"patches": patches, "classes": classes, "weight": weight, "bias": bias}.items():
        _library.check_tensor(name, t, floating=True)
        if t.device != patches.device:
            raise ValueError(f"patches are on {patches.device} and {name} on {t.device}; move one of them")
    if patches.ndim != 3 or classes.ndim != 3 or patches.shape[0] != classes.shape[0]:
        raise ValueError(
            f"patches (B, N, D) and classes (B, C, D) do not fit: {tuple(patches.shape)}, {tuple(classes.shape)}"
        )
    if patches.shape[2] != classes.shape[2]:
        raise ValueError(f"patches have width {patches.shape[2]} and classes {classes.shape[2]}")
    if grid[0] < 0:
        raise ValueError(f"grid must not be negative, got {grid}")
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"grid {grid} holds {grid[0] * grid[1]} patches, there are {patches.shape[1]}")
    if weight.shape != (classes.shape[1],) or bias.shape != weight.shape:
        raise ValueError(
            f"weight and bias must be ({classes.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")


def _fake(patches, classes, weight, bias, grid, eps, backend):
    batch, n, _ = patches.shape
    c = classes.shape[1]
    dtype = accumulation_dtype(patches.dtype)
    stat = [patches.new_empty((batch, rows), dtype=dtype) for rows in (n, c, n, n)]
    return weight.new_empty((batch, c, *grid)), *stat


_library.define(
    "mask_logits",
    "(Tensor patches, Tensor classes, Tensor weight, Tensor bias, SymInt[2] grid, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    stem=_STEM,
    fake=_fake,
    run=lambda kernels, *args: kernels.mask_logits_forward(*args),
)
_library.define(
    "mask_logits_backward",
    "(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor inv_patches, Tensor inv_classes,"
    " Tensor mean, Tensor rstd, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    stem=_STEM,
    fake=lambda grad, patches, classes, weight, inv_x, inv_q, mean, rstd, backend: (
        patches.new_empty(patches.shape),
        classes.new_empty(classes.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
    run=lambda kernels, *args: kernels.mask_logits_backward(*args),
)


def _save(ctx, inputs, output):
    patches, classes, weight, _bias, _grid, _eps, ctx.backend = inputs
    ctx.save_for_backward(patches, classes, weight, *output[1:])


def _backward(ctx, grad, *_stats):
    grads = torch.ops.depict_kernels.mask_logits_backward(grad, *ctx.saved_tensors, ctx.backend)
    return (*grads, None, None, None)


torch.library.register_autograd("depict_kernels::mask_logits", _backward, setup_context=_save)
_library.forbid_gradient("mask_logits_backward")


@register_flop_formula(torch.ops.depict_kernels.mask_logits)
def _(patches_shape, classes_shape, *args, **kwargs) -> int:
    batch, n, dim = patches_shape
    return 2 * batch * n * classes_shape[1] * dim


@register_flop_formula(torch.ops.depict_kernels.mask_logits_backward)
def _(grad_shape, patches_shape, classes_shape, *args, **kwargs) -> int:
    batch, n, dim = patches_shape
    return 3 * 2 * batch * n * classes_shape[1] * dim  # the cosines again, and two gradients
