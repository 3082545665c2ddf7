"""The private operators of the C++ extension."""

import torch
from torch import Tensor

from depict_kernels import extension


def ops():
    reason = extension.load("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.depict_kernels_cpu


def rows(*tensors: Tensor) -> list[Tensor]:
    """As the kernels of attention and mask head take them: float32 or float64, the last dimension contiguous."""
    tensors = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
