"""The mask head by matmul and layer_norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype


def _unit(x: Tensor) -> Tensor:
    # A zero vector times 1 / infinity gives zeros with gradient 0, where F.normalize's eps gives a gradient of 1e12
    # (and NaN in float16, which cannot hold the eps). Multiplying by the inverse takes three passes over x fewer
    # than dividing, in backward.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    return (x * F.threshold(norm, 0.0, torch.inf).reciprocal()).to(x.dtype)


def mask_logits(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> Tensor:
    """patches (B, N, D), classes (B, C, D) -> logits (B, C, h, w) in weight's dtype."""
    masks = (_unit(patches) @ _unit(classes).mT).to(weight.dtype)
    masks = F.layer_norm(masks, masks.shape[-1:], weight, bias, eps)
    return masks.mT.unflatten(-1, grid)
