"""The upsample operators of the backends ``triton`` and ``cuda``, whose kernels work on tiles: parts of cells.

The gradient of the loss goes through a scratch buffer: every tile writes the gradient that it gives to the four
samples around it, and a second kernel adds up what each sample got. Where the buffer for all tiles would take more
than :data:`SCRATCH` bytes, both kernels go through the batch in bands of cell rows, one after the other on the same
stream. Which row is in which band changes no bit of the result: a tile writes the same, whoever launches it, and a
sample is added up in one go once its rows are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype

# 8 x 150 x 32 x 32 logits take 21 MB in one band; a band of this size still fills a large GPU several times over.
SCRATCH = 64 << 20


@dataclass(frozen=True)
class Band:
    """Consecutive rows of cells and the rows of samples that they complete, both counted over the batch."""

    first: int  # h + 1 rows of cells per image
    rows: int
    first_sample: int  # h rows of samples per image
    sample_rows: int


def bands(batch: int, h: int, row_bytes: int) -> tuple[int, list[Band]]:
    """Rows of cells that the buffer holds, each of ``row_bytes``, and the bands in which the batch goes through it.

    Row r lies at r modulo the rows held: of several bands each leaves its last row to the next, which completes the
    samples between the two. Two rows are held however large they are.
    """
    total = batch * (h + 1)
    most = max(2, SCRATCH // row_bytes)
    if total <= most:
        return total, [Band(0, total, 0, batch * h)]
    count = -(-total // (most - 1))
    step = -(-total // count)
    complete = lambda row: row // (h + 1) * h + max(0, row % (h + 1) - 1)
    edges = [*range(0, total, step), total]
    return step + 1, [Band(a, b - a, complete(a), complete(b) - complete(a)) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Loss:
    """What the tiles read and, as far as given, write."""

    logits: Tensor  # (B, C, h, w)
    target: Tensor  # (B, H, W)
    weight: Tensor | None  # (C,)
    ignore_index: int
    label_smoothing: float
    upstream: Tensor | None = None  # (B, H, W)
    pixel_loss: Tensor | None = None  # (B, H, W)
    partial: Tensor | None = None  # (tiles, 2) float64
    bad: Tensor | None = None  # (tiles,) int64

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """As the kernels read them, contiguous and in their precision; and, for label smoothing, their sum ()."""
        if self.weight is None:
            return None, None
        weight = self.weight.to(dtype_of(self.logits)).contiguous()
        return weight, weight.sum() if self.label_smoothing > 0 else None


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call, ready to run."""

    lanes: int  # classes, padded as the kernels need it
    # Of the first tile, the number of tiles and, for the gradient, the buffer (held, 4, lanes).
    run: Callable[[int, int, Tensor | None], None]


class TiledUpsample(ABC):
    """What ops/upsample.py asks of a backend, in terms of a backend's launches; nothing waits for the device."""

    @abstractmethod
    def tiles_per_row(self, grid: tuple[int, int], size: tuple[int, int]) -> int:
        """Tiles of a row of cells: grid (h, w), size (H, W)."""

    @abstractmethod
    def start(self, loss: Loss) -> Tiles:
        """Packs the logits and says how to run tiles on them, once each."""

    @abstractmethod
    def gather(
        self,
        samples: Tensor,
        scale: Tensor | None,
        grad: Tensor,
        size: tuple[int, int],
        first: int,
        rows: int,
    ) -> None:
        """Writes ``rows`` rows of samples of grad (B, C, h, w), ``first`` counted over the batch, times scale ()."""

    @abstractmethod
    def finish(
        self,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        bad: Tensor,
        partial: Tensor | None = None,
        loss: Tensor | None = None,
        scale: Tensor | None = None,
        mean: bool = False,
    ) -> Tensor:
        """Writes loss () and scale () if given; returns the report of bad labels, int64 (5,)."""

    @abstractmethod
    def label(
        self,
        logits: Tensor,
        size: tuple[int, int],
        labels: Tensor | None = None,
        target: Tensor | None = None,
        bad: Tensor | None = None,
        counts: Tensor | None = None,
        ignore_index: int = 0,
    ) -> None:
        """Writes labels (B, H, W), or adds to counts (C, C) and writes bad (tiles,)."""

    def cross_entropy_forward(
        self,
        logits: Tensor,  # (B, C, h, w)
        target: Tensor,  # (B, H, W)
        weight: Tensor | None,  # (C,)
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Loss (scalar, or (B, H, W) for "none"), for scalar reductions its gradient (B, C, h, w), and the report.

        Both are float32, or float64 for float64 logits. A label that is neither a class nor ``ignore_index`` counts
        as ignored; the report, int64 (5,), is [1 if there is any, first such label, its b, y, x].
        """
        none = reduction == "none"
        need_grad = need_grad and not none
        loss = _new(logits, target.shape if none else ())
        if _is_empty(target):
            report = torch.zeros(5, dtype=torch.int64, device=target.device)
            return loss.zero_(), _new(logits, logits.shape) if need_grad else None, report
        bad = self._new_bad(logits, target)
        count = bad.shape[0]
        options = (logits, target, weight, ignore_index, label_smoothing)
        if none:
            self.start(Loss(*options, pixel_loss=loss, bad=bad)).run(0, count, None)
            return loss, None, self.finish(logits, target, ignore_index, bad)
        partial = torch.empty((count, 2), dtype=torch.float64, device=logits.device)
        scale = _new(logits, ())
        tiles = self.start(Loss(*options, partial=partial, bad=bad))
        finish = lambda: self.finish(
            logits, target, ignore_index, bad, partial, loss, scale, reduction == "mean"
        )
        if need_grad:
            grad, report = self._gradient(logits, target, tiles, scale, finish)
            return loss, grad, report
        tiles.run(0, count, None)
        return loss, None, finish()

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,  # (B, H, W)
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        """Gradient (B, C, h, w) of the unreduced loss, float32 or float64, for the upstream gradient."""
        if _is_empty(target):
            return _new(logits, logits.shape)
        tiles = self.start(Loss(logits, target, weight, ignore_index, label_smoothing, upstream=grad_loss))
        return self._gradient(logits, target, tiles)[0]

    def argmax(self, logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(B, C, h, w) -> label map (B, H, W); ties go to the lowest class index, as in torch.argmax."""
        labels = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
        self.label(logits, size, labels)
        return labels

    def confusion(self, logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
        """Adds the counts of (target, label) over the valid pixels into out (C, C) int64; returns the report."""
        if _is_empty(target):
            return torch.zeros(5, dtype=torch.int64, device=target.device)
        bad = self._new_bad(logits, target)
        self.label(logits, target.shape[1:], None, target, bad, out, ignore_index)
        return self.finish(logits, target, ignore_index, bad)

    def _gradient(
        self,
        logits: Tensor,
        target: Tensor,
        tiles: Tiles,
        scale: Tensor | None = None,
        finish: Callable[[], Tensor | None] = lambda: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient (B, C, h, w) and what ``finish`` returns, which writes ``scale`` once all tiles are done."""
        batch, _, h, w = logits.shape
        size = target.shape[1:]
        per_row = self.tiles_per_row((h, w), size)
        grad = _new(logits, logits.shape)
        held, parts = bands(batch, h, per_row * 4 * tiles.lanes * grad.element_size())
        samples = _new(logits, (held * per_row, 4, tiles.lanes))
        for band in parts:
            tiles.run(band.first * per_row, band.rows * per_row, samples)
            if len(parts) > 1:
                self.gather(samples, None, grad, size, band.first_sample, band.sample_rows)
        report = finish()
        if len(parts) == 1:
            self.gather(samples, scale, grad, size, 0, batch * h)
        elif scale is not None:  # known only now
            grad *= scale
        return grad, report

    def _new_bad(self, logits: Tensor, target: Tensor) -> Tensor:
        batch, _, h, w = logits.shape
        count = batch * (h + 1) * self.tiles_per_row((h, w), target.shape[1:])
        return torch.empty(count, dtype=torch.int64, device=logits.device)


def dtype_of(logits: Tensor) -> torch.dtype:
    """What the kernels compute in."""
    return accumulation_dtype(logits.dtype)


def _new(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=dtype_of(logits), device=logits.device)


def _is_empty(target: Tensor) -> bool:
    """Of an empty batch even height and width may be 0: there is nothing to cut into tiles."""
    return target.numel() == 0
