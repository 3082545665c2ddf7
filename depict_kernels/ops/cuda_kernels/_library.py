"""Calls of the compiled CUDA part: its operators, the stream they go to, how float32 products are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels import extension

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def call(name: str, *arguments, device: torch.device) -> None:
    """Runs the private operator ``name`` on the current stream of ``device``; outputs are among the arguments."""
    part = "cuda" if device.type == "cuda" else "cuda_emulated"
    reason = extension.load(part)
    if reason is not None:
        raise RuntimeError(reason)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    getattr(getattr(torch.ops, f"depict_kernels_{part}"), name)(*arguments, stream)


def precise(dtype: torch.dtype) -> bool:
    """Whether float32 products must keep float32's accuracy: torch's own setting for matrix products."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of ``tensor``."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
