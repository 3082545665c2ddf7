"""Launch configurations of the Triton kernels: a small table per architecture and shape class.

Nothing is tuned at first use. The first of these that has an entry for an architecture and a key wins:

- the file named by the environment variable DEPICT_KERNELS_TUNING: what ``benchmarks/tune.py`` measured on this GPU;
- ``tuned.py``: the measurements that are shipped (``benchmarks/tune.py --write``);
- the defaults here and in upsample_tuning.py, chosen from registers, shared memory and spills of the ahead-of-time
  reports (benchmarks/kernel_report.py), not measured on a GPU.

A key is a kernel with its shape class: "attention forward d128 16", "mask_head product C256 32", "upsample gather".
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

import triton

from depict_kernels.ops.triton_kernels.tuned import TUNED

VARIABLE = "DEPICT_KERNELS_TUNING"
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Config:
    """Rows a program owns, rows (or columns) of the other side per step, warps, stages of the load pipeline.

    Raises ValueError unless all four are positive, and powers of two but for the stages, as Triton wants them.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        values = astuple(self)
        if any(type(v) is not int or v < 1 for v in values) or any(v & (v - 1) for v in values[:3]):
            raise ValueError(
                f"rows, columns and warps must be powers of two and stages at least 1, got {values}"
            )


_trial: dict[str, Config] = {}
_chosen: dict[str, Config] | None = None


@contextlib.contextmanager
def trial(configs: Mapping[str, Config]) -> Iterator[dict[str, Config]]:
    """Within the context ``configs`` win over every table. Yields what kernels ask for: key -> configuration taken.

    Of the process, for one thread: made for benchmarks/tune.py.
    """
    global _trial, _chosen
    before = _trial, _chosen
    _trial, _chosen = dict(configs), {}
    try:
        yield _chosen
    finally:
        _trial, _chosen = before


def choose(architecture: str, key: str, default: Config) -> Config:
    """The configuration for ``key`` on ``architecture``; see the module's text for where it comes from."""
    config = _trial.get(key)
    if config is None:
        path = os.environ.get(VARIABLE)
        own = load(path) if path else {}
        config = own.get((architecture, key)) or _shipped().get((architecture, key)) or default
    if _chosen is not None:
        _chosen[key] = config
    return config


@lru_cache
def load(path: str) -> dict[tuple[str, str], Config]:
    """The table in a file that benchmarks/tune.py wrote.

    Raises ValueError naming the file where it cannot be read, and the entry that is wrong.
    """
    try:
        table = json.loads(Path(path).read_text())["table"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{VARIABLE}={path}: not a file of benchmarks/tune.py ({error!r})") from error
    return _parse(table, f"{VARIABLE}={path}")


@lru_cache
def _shipped() -> dict[tuple[str, str], Config]:
    return _parse(TUNED, "tuned.py")


def _parse(table: Mapping, where: str) -> dict[tuple[str, str], Config]:
    parsed = {}
    for architecture, entries in table.items():
        for key, values in entries.items():
            try:
                parsed[architecture, key] = Config(*values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {architecture}, {key!r}: {error}") from error
    return parsed


def class_width(classes: int) -> str:
    """The shape class of a number of classes."""
    return next((f"C{most}" for most in (32, 256) if classes <= most), "Cmany")


# Wider blocks of the other side spill in the backward kernels; 16 rows per warp is what the products' layout wants.
_ATTENTION = {
    "forward": {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 4, 2)},
    "self_backward": {64: Config(64, 32, 4, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 16, 4, 2)},
    "query_backward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 16, 4, 2)},
    "key_backward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 16, 4, 2)},
}
_ATTENTION_SM80 = {"forward": {128: Config(64, 32, 4, 3)}}
_ATTENTION_GFX = {"forward": {128: Config(64, 64, 4, 2)}, "self_backward": {128: Config(64, 16, 4, 2)}}
# True float32 products are multiply-adds in registers: above 64 wide they spill on NVIDIA in the backward kernels,
# whatever the block.
_ATTENTION_FLOAT32 = {
    "forward": {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 16, 4, 1)},
    "backward": {64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
}
_BACKWARD_FLOAT32_GFX = {64: Config(32, 16, 4, 2), 128: Config(32, 16, 4, 2), 256: Config(32, 16, 4, 1)}


# On tensor cores 16 rows per warp again. (AMD's float32 blocks serve both.)
_ATTENTION_TF32 = {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(16, 16, 4, 1)}

MAX_HEAD_DIM = 256


def attention(kernel: str, architecture: str, dim: int, element_size: int, tf32: bool = False) -> Config:
    """Configuration of ``kernel``: "self_forward", "cross_forward", "self_backward", "query_backward", "key_backward".

    Raises ValueError for a head_dim above MAX_HEAD_DIM.
    """
    width = next((w for w in (64, 128, MAX_HEAD_DIM) if dim <= w), None)
    if width is None:
        raise ValueError(
            f"the triton backend takes a head_dim up to {MAX_HEAD_DIM}, got {dim}; use backend='torch'"
        )
    kind = "tf32" if tf32 else str(8 * element_size)
    default = _attention_default(kernel, architecture, width, kind)
    config = choose(architecture, f"attention {kernel} d{width} {kind}", default)
    # Backward adds two products to one accumulator in each step, which Triton before 3.9 pipelines wrongly on these
    # (https://github.com/triton-lang/triton/issues/10821): wrong gradients, and without pipelining right ones.
    if kernel.endswith("_backward") and architecture.startswith("sm_10") and TRITON < (3, 9):
        return replace(config, num_stages=1)
    return config


def _attention_default(kernel: str, architecture: str, width: int, kind: str) -> Config:
    kernel = "forward" if kernel.endswith("_forward") else kernel
    if kind == "tf32" and not architecture.startswith("gfx"):
        return _ATTENTION_TF32[width]
    if kind != "16":
        if kernel != "forward" and architecture.startswith("gfx"):
            return _BACKWARD_FLOAT32_GFX[width]
        return _ATTENTION_FLOAT32["forward" if kernel == "forward" else "backward"][width]
    special = {}
    if architecture.startswith(("sm_8", "sm_12")):  # the same tensor core instructions
        special = _ATTENTION_SM80
    elif architecture.startswith("gfx"):
        special = _ATTENTION_GFX
    return special.get(kernel, {}).get(width) or _ATTENTION[kernel][width]


def attention_masks_apart(architecture: str, dim: int) -> bool:
    """Whether the backward kernels treat the partial block apart, so that whole ones need no masks.

    10 to 25 % of the instructions, but the second copy of the block takes registers that NVIDIA's have only up to this
    head_dim.
    """
    if architecture.startswith("sm_12"):
        return False
    if architecture.startswith("sm_8"):
        return dim <= 112
    return dim <= 128 or not architecture.startswith("sm_")


def mask_head(kernel: str, architecture: str, classes: int, element_size: int) -> Config:
    """Configuration of ``kernel`` ("forward", "backward": patches x width; "product": rows x width)."""
    key = f"mask_head {kernel} {class_width(classes)} {8 * element_size}"
    return choose(architecture, key, _mask_head_default(kernel, architecture, element_size))


def _mask_head_default(kernel: str, architecture: str, element_size: int) -> Config:
    if kernel == "product":
        return Config(32, 32, 4, 2) if element_size == 4 else Config(64, 64, 4, 3)
    if element_size == 4:
        if architecture.startswith("gfx"):
            return Config(16, 32, 4, 2)
        # Forward holds the next tiles in registers. Equal columns: backward then rounds the products as forward did.
        return Config(16 if kernel == "forward" else 32, 32, 8, 2)
    if architecture.startswith(("sm_8", "sm_12")):  # the same tensor core instructions
        return Config(32, 64, 8, 2)
    if kernel == "forward":
        return Config(64, 64, 8, 2)
    return Config(16, 64, 4, 2) if architecture.startswith("gfx") else Config(32, 64, 8, 2)
