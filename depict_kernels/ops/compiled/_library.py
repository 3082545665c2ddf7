"""The private operators of the C++ extension."""

import torch

from depict_kernels import extension


def ops():
    reason = extension.load("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.depict_kernels_cpu
