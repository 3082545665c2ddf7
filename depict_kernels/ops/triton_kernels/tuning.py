"""Launch configurations of the Triton kernels: one small table, no tuning at first use.

Chosen from registers, shared memory and spills of the ahead-of-time reports (benchmarks/kernel_report.py); not yet
measured on a GPU. Keys: kernel, width class (head_dim up to 64, 128, 256), bytes per element class (2 or 4).
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


_ATTENTION = {
    ("forward", 64, 2): Config(64, 64, 4, 3),
    ("forward", 128, 2): Config(64, 64, 4, 3),
    ("forward", 256, 2): Config(64, 32, 4, 2),
    ("self_backward", 64, 2): Config(64, 64, 4, 2),
    ("self_backward", 128, 2): Config(64, 64, 8, 2),
    ("self_backward", 256, 2): Config(32, 32, 4, 2),
    ("query_backward", 64, 2): Config(64, 64, 4, 2),
    ("query_backward", 128, 2): Config(64, 64, 4, 2),
    ("query_backward", 256, 2): Config(32, 32, 4, 2),
    ("key_backward", 64, 2): Config(64, 64, 4, 2),
    ("key_backward", 128, 2): Config(64, 64, 4, 2),
    ("key_backward", 256, 2): Config(32, 32, 4, 2),
}
_FLOAT32 = {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 1)}


def attention(kernel: str, architecture: str, dim: int, element_size: int) -> Config:
    """Configuration of ``kernel`` ("forward", "self_backward", "query_backward", "key_backward")."""
    width = next(w for w in (64, 128, 256) if dim <= w)
    if element_size == 4:
        return _FLOAT32[width]
    return _ATTENTION[kernel, width, 2]
