"""The operators' calls whose kernels are compiled ahead of time: one registry for the report and the test.

A :class:`Case` is a call of a host function on meta tensors; the launches it records (see ``launch.recording``) are
the variants. Of the cases marked ``core`` continuous integration compiles every kernel once per target, or for the one
``core_target`` where its tests compile the kernel for the others anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from depict_kernels.ops.triton_kernels import attention, launch, mask_head, upsample

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Case:
    """``call`` runs an operator's host function on meta tensors."""

    name: str
    call: Callable[[], object]
    core: bool = False
    may_spill: bool = False
    core_target: str | None = None


@dataclass(frozen=True)
class Variant:
    """One kernel to compile for one target; ``name`` is the case's, with the kernel's."""

    name: str
    target: str
    launch: launch.Launch
    may_spill: bool


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _with_tf32(call: Callable[..., object], *args):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return call(*args)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _attention_cases() -> Iterator[Case]:
    batch, heads, n, m = 8, 3, 1174, 150
    for dim in (16, 50, 64, 100, 128, 256):
        for dtype, name in _NAMES.items():
            w, q = _meta(batch, n, heads, dim, dtype=dtype), _meta(batch, m, heads, dim, dtype=dtype)
            lse_w, lse_q = _meta(batch, heads, n), _meta(batch, heads, m)
            scale = dim**-0.5
            spill = dim > 128 or dtype == torch.float32
            main = dtype == torch.bfloat16 and dim == 100
            for what, call in (
                ("forward", partial(attention.self_attention_forward, w, scale)),
                ("backward", partial(attention.self_attention_backward, w, w, w, lse_w, scale)),
            ):
                yield Case(f"self {what} d{dim} {name}", call, main, may_spill=spill)
            for what, call in (
                ("forward", partial(attention.cross_attention_forward, q, w, scale)),
                ("backward", partial(attention.cross_attention_backward, q, q, w, q, lse_q, scale)),
            ):
                yield Case(f"cross {what} d{dim} {name}", call, may_spill=spill)
    for dim in (50, 100, 256):
        w, lse = _meta(batch, n, heads, dim), _meta(batch, heads, n)
        forward = partial(_with_tf32, attention.self_attention_forward, w, dim**-0.5)
        backward = partial(_with_tf32, attention.self_attention_backward, w, w, w, lse, dim**-0.5)
        yield Case(f"self forward d{dim} tf32", forward, may_spill=True)
        yield Case(f"self backward d{dim} tf32", backward, may_spill=True)
    # Sizes and strides of 1 become constants of the kernel, which must still compile.
    w, lse = _meta(1, 1, 1, 1), _meta(1, 1, 1)
    yield Case("self forward one of each", partial(attention.self_attention_forward, w, 1.0))
    yield Case("self backward one of each", partial(attention.self_attention_backward, w, w, w, lse, 1.0))
    yield Case(
        "cross backward one of each", partial(attention.cross_attention_backward, w, w, w, w, lse, -1.0)
    )


def _mask_head_cases() -> Iterator[Case]:
    batch, grid, dim = 8, (32, 32), 384
    n = grid[0] * grid[1]
    for classes in (1, 19, 150, 256, 847):
        for dtype, name in _NAMES.items():
            x, q = _meta(batch, n, dim, dtype=dtype), _meta(batch, classes, dim, dtype=dtype)
            weight, rows = _meta(classes), _meta(batch, n)
            tag = f"C{classes} {name}"
            yield Case(
                f"mask_logits forward {tag}",
                partial(mask_head.mask_logits_forward, x, q, weight, weight, grid, 1e-5),
                classes == 150 and dtype == torch.bfloat16,
                may_spill=dtype == torch.float32,
            )
            yield Case(
                f"mask_logits backward {tag}",
                partial(
                    mask_head.mask_logits_backward,
                    _meta(batch, classes, *grid), x, q, weight, rows, _meta(batch, classes), rows, rows,
                ),
                classes == 150 and dtype != torch.float32,
                may_spill=dtype == torch.float32,
                # float16 adds mask_peak alone, which tests/test_triton_ptx.py compiles for the others and executes
                core_target="gfx942" if dtype == torch.float16 else None,
            )  # fmt: skip
    one = _meta(1, 1, 1)
    yield Case(
        "mask_logits forward one of each",
        partial(mask_head.mask_logits_forward, one, one, _meta(1), _meta(1), (1, 1), 1e-5),
    )
    yield Case(
        "mask_logits backward one of each",
        partial(
            mask_head.mask_logits_backward,
            _meta(1, 1, 1, 1), one, one, _meta(1), _meta(1, 1), _meta(1, 1), _meta(1, 1), _meta(1, 1),
        ),
    )  # fmt: skip


def _upsample_cases() -> Iterator[Case]:
    # batch, classes, grid, size: patch 16 and 14, scale 4, a non-integer scale, downsampling
    shapes = {
        "16x": (8, 150, (32, 32), (512, 512)),
        "14x": (8, 150, (37, 37), (518, 518)),
        "64x": (8, 19, (16, 32), (1024, 2048)),
        "4x": (8, 19, (128, 128), (512, 512)),
        "2.7x": (2, 847, (24, 24), (65, 65)),
        "0.5x": (8, 150, (64, 64), (32, 32)),
    }
    options = {"": (None, 0.0), " weighted": (True, 0.0), " smoothed": (True, 0.1)}
    for shape, (batch, classes, grid, size) in shapes.items():
        main = shape == "16x"
        weights, counts = _meta(classes), _meta(classes, classes, dtype=torch.int64)
        for dtype, target_dtype in ((torch.bfloat16, torch.uint8), (torch.float32, torch.int64)):
            if dtype == torch.float32 and not main:
                continue  # only pack_logits knows the logits' dtype
            logits = _meta(batch, classes, *grid, dtype=dtype)
            target = _meta(batch, *size, dtype=target_dtype)
            for option, (weighted, smoothing) in options.items() if main else [("", options[""])]:
                tag = f"C{classes} {shape} {_NAMES[dtype]}{option}"
                weight = weights if weighted else None
                loss = partial(upsample.cross_entropy_forward, logits, target, weight, 255, smoothing)
                core = main and not option and dtype == torch.bfloat16
                yield Case(f"loss and gradient {tag}", partial(loss, "mean", True), core)
                if not main:
                    continue
                yield Case(f"loss per pixel {tag}", partial(loss, "none", False))
                backward = partial(upsample.cross_entropy_backward, _meta(batch, *size), logits, target)
                yield Case(f"backward per pixel {tag}", partial(backward, weight, 255, smoothing))
            tag = f"C{classes} {shape} {_NAMES[dtype]}"
            core = main and dtype == torch.bfloat16
            yield Case(f"label map {tag}", partial(upsample.argmax, logits, size, torch.uint8), core)
            yield Case(f"confusion {tag}", partial(upsample.confusion, logits, target, 255, counts))
    logits, target = _meta(2, 19, 8, 8, dtype=torch.float64), _meta(2, 32, 32, dtype=torch.int64)
    yield Case(
        "loss and gradient fp64",
        partial(upsample.cross_entropy_forward, logits, target, None, 255, 0.0, "mean", True),
    )
    yield Case("label map fp64", partial(upsample.argmax, logits, (32, 32), torch.int64))


def cases() -> list[Case]:
    """Every case, of all kernel families."""
    return [*_attention_cases(), *_mask_head_cases(), *_upsample_cases()]


def variants(targets: tuple[str, ...] = TARGETS, *, core: bool = False) -> list[Variant]:
    """The distinct kernels of all cases for ``targets``, in order; if asked, each ``core`` one once per target."""
    found: dict[tuple, Variant] = {}
    for target in targets:
        for case in cases():
            if core and not (case.core and case.core_target in (None, target)):
                continue
            with launch.recording(target) as launches:
                case.call()
            for recorded in launches:
                kernel = (recorded.kernel.__name__,) if core else launch.fingerprint(recorded)
                key = (target, *kernel)
                sides = [s.lower() for s in ("QUERY", "KEY", "PATCHES") if recorded.arguments.get(s)]
                name = " ".join([f"{case.name}: {recorded.kernel.__name__}", *sides])
                found.setdefault(key, Variant(name, target, recorded, case.may_spill))
    return list(found.values())
