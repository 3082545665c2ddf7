"""Backend ``cuda`` of the three upsample operators: allocates and calls csrc/cuda/upsample*.cu. Not yet run on a GPU.

float32 inside; float64 for sums over pixels. Nothing synchronises with the host. Tiles are cells of the
low-resolution grid in parts of at most 16 x 16 pixels. Besides the scratch buffer of ops/_tiled_upsample.py there is
a packed copy of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops._tiled_upsample import TiledUpsample, Tiles
from depict_kernels.ops.cuda_kernels._library import DTYPES, call

__all__ = [
    "DTYPES",
    "argmax",
    "confusion",
    "cross_entropy_backward",
    "cross_entropy_forward",
]

_LONGEST = 16  # pixels of a tile along an axis, as kLongest in csrc/cuda/upsample.h
_TABLE_INTS = 8  # of an AxisTile there


def _tiles_per_cell(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Along y and x; a cell holds at most ceil(H / h) x ceil(W / w) pixels."""
    ceil_div = lambda a, b: (a + b - 1) // b
    return tuple(ceil_div(ceil_div(pixels, samples), _LONGEST) for pixels, samples in zip(size, grid))


def _pack(
    logits: Tensor, size: tuple[int, int], weight: Tensor | None, *, smooth: bool = False, shift: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Packed logits (B, h, w, C), the map (B, h, w) beside them, the table of tiles."""
    batch, classes, h, w = logits.shape
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)
    parts_y, parts_x = _tiles_per_cell((h, w), size)
    table = new((h + 1) * parts_y + (w + 1) * parts_x, _TABLE_INTS, dtype=torch.int32)
    packed = new(batch, h, w, classes)
    beside = new(batch, h, w) if smooth or not shift else None
    maps = (beside if smooth else None, None if shift else beside)
    call("upsample_pack", logits, weight, packed, *maps, table, *size, device=logits.device)
    return packed, beside, table


class _Upsample(TiledUpsample):
    def tiles_per_row(self, grid, size):
        parts_y, parts_x = _tiles_per_cell(grid, size)
        return parts_y * (grid[1] + 1) * parts_x

    def start(self, loss):
        weight, weight_sum = loss.weights()
        size, smooth = loss.target.shape[1:], loss.label_smoothing > 0
        packed, smoothed, table = _pack(loss.logits, size, weight, smooth=smooth, shift=True)
        inputs = (packed, smoothed, table, loss.target, weight, weight_sum, loss.upstream)
        outputs = (loss.pixel_loss, loss.partial, loss.bad)

        def run(first, count, samples):
            options = (first, count, loss.ignore_index, loss.label_smoothing)
            call("upsample_cross_entropy", *inputs, *outputs, samples, *options, device=loss.logits.device)

        return Tiles(loss.logits.shape[1], run)

    def gather(self, samples, scale, grad, size, first, rows):
        call("upsample_gather", samples, scale, grad, *size, first, rows, device=grad.device)

    def finish(self, logits, target, ignore_index, bad, partial=None, loss=None, scale=None, mean=False):
        report = torch.empty(5, dtype=torch.int64, device=target.device)
        outputs = (bad, partial, loss, scale, report)
        call("upsample_finish", target, *logits.shape[2:], *outputs, mean, ignore_index, device=target.device)
        return report

    def label(self, logits, size, labels=None, target=None, bad=None, counts=None, ignore_index=0):
        packed, magnitude, table = _pack(logits, size, None, shift=False)
        outputs = (labels, target, bad, counts)
        call("upsample_labels", packed, magnitude, table, *size, *outputs, ignore_index, device=logits.device)


_upsample = _Upsample()
cross_entropy_forward = _upsample.cross_entropy_forward
cross_entropy_backward = _upsample.cross_entropy_backward
argmax, confusion = _upsample.argmax, _upsample.confusion
