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


# The upsample kernels. Rows: pixels (or samples) of a tile, columns: classes per step.


def upsample_pack() -> Config:
    return Config(32, 32, 4, 1)


def upsample_series(architecture: str, rows: int, classes: int) -> Config:
    """One warp holds rows x columns = 128 sums per pixel column: 64 registers for tiles of 16 x 16 pixels.

    Few classes per step make the sums over classes short, many those over rows; nothing meets in shared memory.
    """
    most = 64 if architecture == "interpreter" else 128 // rows  # every step costs the interpreter the same
    return Config(rows, min(most, max(8, power_of_two(classes))), 1, 1)


def upsample_careful(architecture: str, pixels: int, classes: int) -> Config:
    most = 64 if architecture == "interpreter" else min(64, 2048 // pixels)
    return Config(pixels, min(most, max(8, power_of_two(classes))), 4, 1)


def upsample_gather() -> Config:
    return Config(32, 32, 4, 1)


def upsample_finish() -> Config:
    return Config(1, 2048, 8, 1)


def upsample_labels(pixels: int, classes: int) -> Config:
    return Config(pixels, min(128, max(8, power_of_two(classes))), 1 if pixels <= 256 else 4, 1)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def mask_head(kernel: str, architecture: str, classes: int, element_size: int) -> Config:
    """Configuration of ``kernel`` ("forward", "backward": patches x width; "product": rows x width)."""
    if element_size == 4:
        return Config(32, 32, 4, 2)
    if kernel == "product":
        return Config(64, 64, 4, 3)
    return Config(64, 64, 4, 2)
