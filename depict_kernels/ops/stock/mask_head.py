"""The mask head by matmul and layer_norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    # float16 cannot hold F.normalize's eps: zero vectors would give NaN.
    return F.normalize(x.float() if x.dtype == torch.float16 else x, dim=-1).to(x.dtype)


def mask_logits(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> Tensor:
    """patches (B, N, D), classes (B, C, D) -> logits (B, C, h, w) in weight's dtype."""
    masks = (_unit(patches) @ _unit(classes).mT).to(weight.dtype)
    masks = F.layer_norm(masks, masks.shape[-1:], weight, bias, eps)
    return masks.mT.unflatten(-1, grid)
