"""Launch configurations of the Triton kernels: one small table, no tuning at first use.

Chosen from registers, shared memory and spills of the ahead-of-time reports (benchmarks/kernel_report.py); not yet
measured on a GPU. Attention is keyed by kernel and width class (head_dim up to 64, 128, 256); float32 and some
architectures have entries of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Rows a program owns, rows (or columns) of the other side per step, warps, stages of the load pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Wider blocks of the other side spill in the backward kernels; 16 rows per warp is what the products' layout wants.
_ATTENTION = {
    "forward": {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 4, 2)},
    "self_backward": {64: Config(64, 32, 4, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 16, 4, 2)},
    "query_backward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 16, 4, 2)},
    "key_backward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 16, 4, 2)},
}
_ATTENTION_SM80 = {"forward": {128: Config(64, 32, 4, 3)}}
_ATTENTION_GFX = {"forward": {128: Config(64, 64, 4, 2)}, "self_backward": {128: Config(64, 16, 4, 2)}}
# True float32 products are multiply-adds in registers: they spill in the backward kernels whatever the block.
_ATTENTION_FLOAT32 = {
    "forward": {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 16, 4, 1)},
    "backward": {64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(32, 16, 8, 1)},
}


def attention(kernel: str, architecture: str, dim: int, element_size: int) -> Config:
    """Configuration of ``kernel`` ("forward", "self_backward", "query_backward", "key_backward").

    Raises ValueError for a head_dim above 256.
    """
    width = next((w for w in (64, 128, 256) if dim <= w), None)
    if width is None:
        raise ValueError(f"the triton backend takes a head_dim up to 256, got {dim}; use backend='torch'")
    if element_size == 4:
        return _ATTENTION_FLOAT32["forward" if kernel == "forward" else "backward"][width]
    special = {}
    if architecture.startswith("sm_8"):
        special = _ATTENTION_SM80
    elif architecture.startswith("gfx"):
        special = _ATTENTION_GFX
    return special.get(kernel, {}).get(width) or _ATTENTION[kernel][width]


def mask_head(kernel: str, architecture: str, classes: int, element_size: int) -> Config:
    """Configuration of ``kernel`` ("forward", "backward": patches x width; "product": rows x width)."""
    if element_size == 4:
        return Config(32, 32, 4, 2)
    if kernel == "product":
        return Config(64, 64, 4, 3)
    if architecture.startswith("sm_8"):
        return Config(32, 64, 8, 2)
    if kernel == "forward":
        return Config(64, 64, 8, 2)
    return Config(16, 64, 4, 2) if architecture.startswith("gfx") else Config(32, 64, 8, 2)
