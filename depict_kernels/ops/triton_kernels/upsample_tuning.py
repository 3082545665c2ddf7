"""Launch configurations of the upsample kernels, as tuning.py has them for the others.

Rows: pixels (or samples) of a tile; columns: classes per step. Chosen from the ahead-of-time reports; not yet measured
on a GPU.
"""

from __future__ import annotations

from depict_kernels.ops.triton_kernels.tuning import Config


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _block(most: int, classes: int) -> int:
    return min(most, max(8, power_of_two(classes)))


def pack() -> Config:
    return Config(32, 32, 4, 1)


def series(architecture: str, rows: int, classes: int) -> Config:
    """One warp holds rows x columns = 128 sums per pixel column: 64 registers for tiles of 16 x 16 pixels.

    Few classes per step make the sums over classes short, many those over rows; nothing meets in shared memory.
    """
    most = 64 if architecture == "interpreter" else 128 // rows  # every step costs the interpreter the same
    return Config(rows, _block(most, classes), 1, 1)


def careful(architecture: str, pixels: int, classes: int) -> Config:
    most = 64 if architecture == "interpreter" else min(64, 2048 // pixels)
    return Config(pixels, _block(most, classes), 4, 1)


def gather() -> Config:
    return Config(32, 32, 4, 1)


def finish() -> Config:
    return Config(1, 2048, 8, 1)


def labels(pixels: int, classes: int) -> Config:
    return Config(pixels, _block(128, classes), 1, 1)
