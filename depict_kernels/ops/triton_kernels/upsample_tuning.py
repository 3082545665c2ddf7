"""Launch configurations of the upsample kernels, as tuning.py has them for the others.

Rows: pixels (or samples) of a tile; columns: classes per step.
"""

from __future__ import annotations

from dataclasses import replace

from depict_kernels.ops.triton_kernels.tuning import Config, choose, class_width


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _tile(architecture: str, name: str, pixels: int, classes: int, default: Config) -> Config:
    """Of a kernel whose rows are given by the tile; no more classes per step than there are."""
    config = choose(architecture, f"upsample {name} {pixels} {class_width(classes)}", default)
    return replace(config, rows=pixels, columns=min(config.columns, max(8, power_of_two(classes))))


def series(architecture: str, rows: int, classes: int) -> Config:
    """One warp holds rows x columns = 128 sums per pixel column: 64 registers for tiles of 16 x 16 pixels.

    Few classes per step make the sums over classes short, many those over rows; nothing meets in shared memory.
    """
    most = 64 if architecture == "interpreter" else 128 // rows  # every step costs the interpreter the same
    return _tile(architecture, "series", rows, classes, Config(rows, most, 1, 1))


def careful(architecture: str, pixels: int, classes: int) -> Config:
    sums = 1024 if architecture.startswith("sm_1") else 2048  # with 2048 the compiler spills there
    most = 64 if architecture == "interpreter" else min(32, sums // pixels)  # 64 spill on sm_90 at factor 2.7
    return _tile(architecture, "careful", pixels, classes, Config(pixels, most, 4, 1))


def labels(architecture: str, pixels: int, classes: int) -> Config:
    return _tile(architecture, "labels", pixels, classes, Config(pixels, 128, 1, 1))


def pack(architecture: str) -> Config:
    return choose(architecture, "upsample pack", Config(32, 32, 4, 1))


def gather(architecture: str) -> Config:
    return choose(architecture, "upsample gather", Config(32, 32, 4, 1))


def finish(architecture: str) -> Config:
    return choose(architecture, "upsample finish", Config(1, 2048, 8, 1))
