"""How large the largest tensor of a computation was."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                # a view of an expanded tensor takes no memory of its own
                self.numel = max(self.numel, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return out


def largest_tensor(function, *args, **kwargs):
    with LargestTensor() as record:
        function(*args, **kwargs)
    return record.numel
