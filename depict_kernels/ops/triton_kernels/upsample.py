"""Backend ``triton`` of the three upsample operators: allocates, chooses tiles, launches. Not yet run on a GPU.

    pack_logits, loss_series, gradient_series, loss_careful, finish_loss, gather_gradient   loss and gradient
    pack_logits, label_tiles, finish_loss (for the report of bad labels)                    label map, confusion

float32 inside (float64 for float64 logits); float64 for sums over pixels. Nothing synchronises with the host. The
number of classes and the label smoothing are compiled in. Tiles are cells of the low-resolution grid in parts of at
most 16 x 16 pixels. Besides the scratch buffer of ops/_tiled_upsample.py there are two numbers per pixel and a packed
copy of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depict_kernels.ops._tiled_upsample import TiledUpsample, Tiles, dtype_of
from depict_kernels.ops.triton_kernels import upsample_tuning as tuning
from depict_kernels.ops.triton_kernels.launch import architecture, launch
from depict_kernels.ops.triton_kernels.upsample_careful import loss_careful
from depict_kernels.ops.triton_kernels.upsample_cells import pack_logits
from depict_kernels.ops.triton_kernels.upsample_labels import label_tiles
from depict_kernels.ops.triton_kernels.upsample_loss import gradient_series, loss_series
from depict_kernels.ops.triton_kernels.upsample_reduce import finish_loss, gather_gradient

LONGEST = 16  # pixels of a tile along an axis: e r^k stays accurate that far


@dataclass(frozen=True)
class Cut:
    """How the pixels of a (h, w) grid upsampled to (H, W) are cut into tiles."""

    h: int
    w: int
    height: int
    width: int
    rows: int  # largest extent of a tile, rows a power of two
    columns: int
    parts_y: int  # tiles per cell
    parts_x: int

    @property
    def per_row(self) -> int:
        return self.parts_y * (self.w + 1) * self.parts_x

    @property
    def arguments(self) -> dict[str, int | bool]:
        names = ("h", "w", "height", "width", "parts_y", "parts_x")
        longest = max((2 * self.h + 3) * self.height, (2 * self.w + 3) * self.width)
        return {name: getattr(self, name) for name in names} | {"WIDE": longest >= 2**31, "ROWS": self.rows}


def cut(grid: tuple[int, int], size: tuple[int, int]) -> Cut:
    """grid (h, w), size (H, W); a cell holds at most ceil(H / h) x ceil(W / w) pixels."""
    (rows, parts_y), (columns, parts_x) = (_parts(-(-n // m)) for n, m in zip(size, grid))
    return Cut(*grid, *size, tuning.power_of_two(rows), columns, parts_y, parts_x)


def _parts(pixels: int) -> tuple[int, int]:
    parts = -(-pixels // LONGEST)
    return -(-pixels // parts), parts


@dataclass(frozen=True)
class Packed:
    """Low-resolution logits, classes innermost and padded to a multiple of every block of classes."""

    logits: Tensor  # (B * h * w, lanes)
    smooth: Tensor | None  # (B * h * w,) mean over classes of weight times shifted logit
    magnitude: Tensor  # (B * h * w,) largest |logit|, where not shifted
    lanes: int


def _pack(logits: Tensor, weight: Tensor | None, block_c: int, *, shift: bool, smooth: bool) -> Packed:
    batch, classes, h, w = logits.shape
    config = tuning.pack(architecture(logits.device))
    block_c = (
        max(block_c, 64) if classes > 256 else block_c
    )  # rows of whole 256 bytes; with 864 lanes sm_90 spills
    lanes = -(-classes // block_c) * block_c
    samples = batch * h * w
    new = lambda *shape: torch.empty(shape, dtype=dtype_of(logits), device=logits.device)
    packed = Packed(
        new(samples, lanes), new(samples) if smooth else None, new(0 if shift else samples), lanes
    )
    launch(
        pack_logits,
        (batch * h * -(-w // config.rows),),
        logits.device,
        config,
        logits_ptr=logits,
        packed_ptr=packed.logits,
        weight_ptr=weight if smooth else None,
        smooth_ptr=packed.smooth,
        magnitude_ptr=packed.magnitude,
        h=h,
        w=w,
        **dict(zip(("stride_b", "stride_c", "stride_y", "stride_x"), logits.stride())),
        CLASSES=classes,
        LANES=lanes,
        SHIFT=shift,
        SMOOTH=smooth,
        BLOCK_X=config.rows,
        BLOCK_C=config.columns,
    )
    return packed


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip("byx", strides)}


class _Upsample(TiledUpsample):
    def tiles_per_row(self, grid, size):
        return cut(grid, size).per_row

    def start(self, loss):
        logits, device = loss.logits, loss.logits.device
        tiles = cut(logits.shape[2:], loss.target.shape[1:])
        width = tuning.power_of_two(tiles.columns)
        arch, classes = architecture(device), logits.shape[1]
        series = tuning.series(arch, tiles.rows, classes)
        careful = tuning.careful(arch, tiles.rows * width, classes)
        weight, weight_sum = loss.weights()
        block_c, smooth = max(series.columns, careful.columns), loss.label_smoothing > 0
        packed = _pack(logits, weight, block_c, shift=True, smooth=smooth)
        common = {
            "packed_ptr": packed.logits,
            "weight_ptr": weight,
            "weight_sum_ptr": weight_sum,
            "target_ptr": loss.target,
            "upstream_ptr": loss.upstream,
            **tiles.arguments,
            **_strides("target", loss.target),
            **_strides("upstream", loss.upstream),
            "ignore_index": loss.ignore_index,
            "SMOOTHING": loss.label_smoothing,
            "CLASSES": classes,
            "LANES": packed.lanes,
            "WIDTH": width,
        }
        wanted = {
            "smooth_ptr": packed.smooth,
            "pixel_loss_ptr": loss.pixel_loss,
            "partial_ptr": loss.partial,
            "bad_ptr": loss.bad,
        }

        def run(first: int, count: int, samples: Tensor | None) -> None:
            exact = logits.dtype == torch.float64
            flags = None if exact else torch.empty(count, dtype=torch.int8, device=device)
            start = lambda kernel, programs, config, **arguments: launch(
                kernel,
                (programs,),
                device,
                config,
                **common,
                **arguments,
                careful_ptr=flags,
                first=first,
                BLOCK_C=config.columns,
            )
            gradient = {"samples_ptr": samples, "held": count if samples is None else samples.shape[0]}
            if not exact:
                shape = (count, 2, tiles.columns, tiles.rows)
                u = torch.empty(shape, dtype=torch.float32, device=device)
                pixels = {"u_ptr": u, "COLUMNS": tiles.columns}
                start(loss_series, count, series, **wanted, **pixels)
                if samples is not None:
                    start(gradient_series, count, series, **gradient, **pixels)
            # Where few tiles are careful, few programs look for them; where all are, there are enough to fill a GPU.
            group = 1 if exact else min(32, tuning.power_of_two(max(1, count // 256)))
            start(loss_careful, -(-count // group), careful, **wanted, **gradient, count=count, GROUP=group)

        return Tiles(packed.lanes, run)

    def gather(self, samples, scale, grad, size, first, rows):
        _, classes, h, w = grad.shape
        tiles, config = cut((h, w), size), tuning.gather(architecture(grad.device))
        launch(
            gather_gradient,
            (rows * -(-w // config.rows), -(-classes // config.columns)),
            grad.device,
            config,
            samples_ptr=samples,
            scale_ptr=scale,
            grad_ptr=grad,
            h=h,
            w=w,
            parts_y=tiles.parts_y,
            parts_x=tiles.parts_x,
            first=first,
            held=samples.shape[0] // tiles.per_row,
            CLASSES=classes,
            LANES=samples.shape[2],
            BLOCK_X=config.rows,
            BLOCK_C=config.columns,
        )

    def finish(self, logits, target, ignore_index, bad, partial=None, loss=None, scale=None, mean=False):
        report = torch.empty(5, dtype=torch.int64, device=target.device)
        config = tuning.finish(architecture(target.device))
        launch(
            finish_loss,
            (1,),
            target.device,
            config,
            partial_ptr=partial,
            bad_ptr=bad,
            target_ptr=target,
            loss_ptr=loss,
            scale_ptr=scale,
            report_ptr=report,
            tiles=bad.shape[0],
            height=target.shape[1],
            width=target.shape[2],
            **_strides("target", target),
            MEAN=mean,
            BLOCK=config.columns,
        )
        return report

    def label(self, logits, size, labels=None, target=None, bad=None, counts=None, ignore_index=0):
        batch, classes, h, w = logits.shape
        tiles = cut((h, w), size)
        columns = tuning.power_of_two(tiles.columns)
        config = tuning.labels(architecture(logits.device), tiles.rows * columns, classes)
        packed = _pack(logits, None, config.columns, shift=False, smooth=False)
        launch(
            label_tiles,
            (batch * (h + 1) * tiles.per_row,),
            logits.device,
            config,
            packed_ptr=packed.logits,
            magnitude_ptr=packed.magnitude,
            labels_ptr=labels,
            target_ptr=target,
            bad_ptr=bad,
            counts_ptr=counts,
            **tiles.arguments,
            **_strides("target", target),
            counts_y=0 if counts is None else counts.stride(0),
            counts_x=0 if counts is None else counts.stride(1),
            ignore_index=ignore_index,
            CLASSES=classes,
            LANES=packed.lanes,
            COLUMNS=columns,
            BLOCK_C=config.columns,
            EPSILON=8 * torch.finfo(packed.logits.dtype).eps,
        )


_upsample = _Upsample()
cross_entropy_forward, cross_entropy_backward = (
    _upsample.cross_entropy_forward,
    _upsample.cross_entropy_backward,
)
argmax, confusion = _upsample.argmax, _upsample.confusion
