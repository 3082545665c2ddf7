"""The operators' calls whose kernels are compiled ahead of time: one registry for the report and the test.

A :class:`Case` is a call of a host function on meta tensors; the launches it records (see ``launch.recording``) are
the variants. Cases marked ``core`` are the small set that continuous integration compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from depict_kernels.ops.triton_kernels import attention, launch, mask_head

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Case:
    """``call`` runs an operator's host function on meta tensors."""

    name: str
    call: Callable[[], object]
    core: bool = False


@dataclass(frozen=True)
class Variant:
    """One kernel to compile for one target; ``name`` is the case's, with the kernel's."""

    name: str
    target: str
    launch: launch.Launch


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _attention_cases() -> Iterator[Case]:
    batch, heads, n, m = 8, 3, 1174, 150
    for dim in (16, 50, 64, 100, 128, 256):
        for dtype, name in _NAMES.items():
            w, q = _meta(batch, n, heads, dim, dtype=dtype), _meta(batch, m, heads, dim, dtype=dtype)
            lse_w, lse_q = _meta(batch, heads, n), _meta(batch, heads, m)
            scale = dim**-0.5
            tag = f"d{dim} {name}"
            core = dim == 100 and dtype == torch.bfloat16
            yield Case(f"self forward {tag}", partial(attention.self_attention_forward, w, scale), core)
            yield Case(
                f"self backward {tag}",
                partial(attention.self_attention_backward, w, w, w, lse_w, scale),
                core,
            )
            core = dim == 50 and dtype == torch.bfloat16
            yield Case(f"cross forward {tag}", partial(attention.cross_attention_forward, q, w, scale), core)
            yield Case(
                f"cross backward {tag}",
                partial(attention.cross_attention_backward, q, q, w, q, lse_q, scale),
                core,
            )


def _mask_head_cases() -> Iterator[Case]:
    batch, grid, dim = 8, (32, 32), 384
    n = grid[0] * grid[1]
    for classes in (1, 19, 150, 256, 847):
        for dtype, name in _NAMES.items():
            x, q = _meta(batch, n, dim, dtype=dtype), _meta(batch, classes, dim, dtype=dtype)
            weight, rows = _meta(classes), _meta(batch, n)
            tag = f"C{classes} {name}"
            core = classes == 150 and dtype == torch.bfloat16
            yield Case(
                f"mask_logits forward {tag}",
                partial(mask_head.mask_logits_forward, x, q, weight, weight, grid, 1e-5),
                core,
            )
            yield Case(
                f"mask_logits backward {tag}",
                partial(
                    mask_head.mask_logits_backward,
                    _meta(batch, classes, *grid), x, q, weight, rows, _meta(batch, classes), rows, rows,
                ),
                core,
            )  # fmt: skip


def cases() -> list[Case]:
    """Every case, of all kernel families."""
    return [*_attention_cases(), *_mask_head_cases()]


def variants(targets: tuple[str, ...] = TARGETS, *, core: bool = False) -> list[Variant]:
    """The distinct kernels of all cases (only the ``core`` ones if asked) for ``targets``, in order."""
    found: dict[tuple, Variant] = {}
    for target in targets:
        for case in cases():
            if core and not case.core:
                continue
            with launch.recording(target) as launches:
                case.call()
            for recorded in launches:
                key = (target, *launch.fingerprint(recorded))
                found.setdefault(key, Variant(f"{case.name}: {recorded.kernel.__name__}", target, recorded))
    return list(found.values())
