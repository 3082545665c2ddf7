"""Registration shared by the operators: one definition above all kernel backends.

A registered operator takes the backend's name as its last argument and calls that backend's forward; its
backward is a second operator. The stock backend ("torch") is not registered: it is plain torch, so that
autograd differentiates it and torch.compile fuses it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from depict_kernels import backends


def define(name: str, schema: str, *, stem: str, fake: Callable, run: Callable) -> None:
    """Defines ``depict_kernels::<name>``; ``run(module, *args)`` calls the backend's module named by the last arg."""
    qualified = f"depict_kernels::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))

    def dispatch(*args):
        *rest, backend = args
        return run(backends.implementation(backend, stem), *rest)

    torch.library.impl(qualified, "CompositeExplicitAutograd", dispatch)
    torch.library.register_fake(qualified, fake)


def forbid_gradient(name: str, within: str = "") -> None:
    """A backward operator's own backward raises instead of giving a silently missing second derivative.

    ``within`` is what backend "torch" needs around it to have one.
    """
    way = "backend='torch'" + (within and f" within {within}")

    def backward(ctx, *_):
        raise NotImplementedError(
            f"depict_kernels::{name} has no second derivative; for double backward use {way}"
        )

    torch.library.register_autograd(f"depict_kernels::{name}", backward)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to the autocast dtype where autocast is on, as torch does for its own matrix products."""
    device = tensors[0].device.type
    # (torch.amp.is_autocast_available cannot be traced by torch 2.11's compiler)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def integer(name: str, value) -> int:
    """``value`` as an int, which may be symbolic: numpy's integers are taken, 4.0 is not.

    Raises TypeError, and ValueError for one that 64 bits do not hold.
    """
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, int):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value}")
    return value


def check_tensor(name: str, value, *, floating: bool = False) -> None:
    """Raises TypeError where ``value`` is no dense tensor or, if that is asked for, not one of floating point."""
    if not isinstance(value, Tensor):
        if isinstance(value, Mapping):
            way = f"pass the one of its values that is meant ({', '.join(map(repr, value))})"
        else:
            way = "torch.as_tensor makes one"
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; {way}")
    if value.is_nested or value.layout is not torch.strided or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    if floating and (not value.is_floating_point() or value.dtype.itemsize == 1):
        raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, got {value.dtype}")


def pair(name: str, value) -> tuple[int, int]:
    """``value`` as two ints (height, width). Raises TypeError or ValueError."""
    if not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{name} must be two integers (height, width), got {value!r}")
    first, second = value
    return integer(f"{name}[0]", first), integer(f"{name}[1]", second)
