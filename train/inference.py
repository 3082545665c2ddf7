"""From an image to its label map, and from a split to its scores, by the paper's evaluation protocol.

The protocol is that of DEPICT's and Segmenter's official code (``segm/model/utils.py`` and
``segm/eval/miou.py`` of github.com/rstrudel/segmenter, with mmsegmentation's resizing):

1. For every scale: the image is resized, keeping its aspect, to a shorter side of ``resize * scale``,
   bilinearly without antialiasing; mirrored, for a flip; normalised.
2. Where its shorter side is below the window, it is enlarged to it, the longer one to 16 windows at most. Square
   windows every ``stride`` pixels, the last one of each row and column moved to the border, go through the model.
3. Window logits, upsampled to the window, are averaged where windows overlap; the average is resized
   bilinearly to the image's original size, mirrored back, softmax over the classes.
4. The scales' and flips' probabilities are averaged; the label is their argmax.

``mode="whole"`` takes the resized image in place of the windows and does not enlarge it.

Everything in step 3 before the softmax is linear and acts on rows and columns separately. With M the
mosaic of all windows' low-resolution masks of one scale and flip (window rows below each other, window
columns side by side), the resized logits of a class are

    logits = V M Ht,    V (H, rows of M), Ht (columns of M, W)

where V and Ht hold interpolation, averaging, resizing and mirroring. So the masks, 0.6 MB a window, are all
that is kept, and any rows of the result can be had alone: memory is C x strip, whatever the image's size.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depict_kernels import backends
from depict_kernels.ops import upsample_argmax, upsample_confusion
from train.distributed import World, gather, sum_over
from train.metrics import SegmentationMetrics
from train.windows import NotFinite, View, window_masks

# Rows of one matrix product. A BLAS picks its order of summation by the shapes, so every product has the
# same shape, whatever strip_rows is: the labels do not depend on it by a single bit.
BLOCK_ROWS = 16

Progress = Callable[[int, int, float], None]  # images done, images in all, images per second


# -------------------------------------------------------------------------------------------- strips


def _resize_rows(matrix: Tensor, rows: int) -> Tensor:
    """(n, K) float64 -> (rows, K), bilinear along the rows: torch's own formula, applied to the matrix."""
    return F.interpolate(matrix[None, None], (rows, matrix.shape[1]), mode="bilinear", align_corners=False)[
        0, 0
    ]


@functools.lru_cache(maxsize=256)
def _interpolation(
    starts: tuple[int, ...], window: int, padded: int, grid: int, canvas: int, size: int
) -> Tensor:
    """(size, len(starts) * grid) float32: from the mask rows (or columns) of all windows to the result's.

    Formed in float64: every window's interpolation at its place on the canvas, divided by the number of
    windows there, then resized from the canvas to the image.
    """
    one = _resize_rows(torch.eye(grid, dtype=torch.float64), padded)[:window]
    total = torch.zeros(canvas, len(starts) * grid, dtype=torch.float64)
    for i, start in enumerate(starts):
        total[start : start + window, i * grid : (i + 1) * grid] = one
    total /= _coverage(starts, window, canvas)[:, None]
    return (total if size == canvas else _resize_rows(total, size)).float()


def _coverage(starts: tuple[int, ...], window: int, canvas: int) -> Tensor:
    """(canvas,) int64: how many windows cover each row (or column)."""
    count = torch.zeros(canvas, dtype=torch.int64)
    for start in starts:
        count[start : start + window] += 1
    return count


class _Factors:
    """V, M and Ht of one view: the module's docstring."""

    def __init__(self, view: View, size: tuple[int, int], columns: Tensor | None = None) -> None:
        _, num_classes, h, w = view.masks.shape
        rows, cols = len(view.tops), len(view.lefts)
        mosaic = view.masks.view(rows, cols, num_classes, h, w).permute(2, 0, 3, 1, 4)
        self.mosaic = mosaic.reshape(num_classes, rows * h, cols * w)
        vertical = _interpolation(view.tops, view.window[0], view.padded[0], h, view.canvas[0], size[0])
        blocks = -(-size[0] // BLOCK_ROWS)
        vertical = F.pad(vertical, (0, 0, 0, blocks * BLOCK_ROWS - size[0]))
        self.vertical = vertical.view(blocks, BLOCK_ROWS, rows * h).to(view.masks.device)
        across = _interpolation(view.lefts, view.window[1], view.padded[1], w, view.canvas[1], size[1])
        across = across.flip(0) if view.flip else across
        across = across if columns is None else across[columns.cpu()]
        self.across = across.T.contiguous().to(view.masks.device)

    def logits(self, first: int, last: int, out: Tensor) -> Tensor:
        """The resized logits of row blocks first..last, in out[: last - first]: (blocks, C, BLOCK_ROWS, W)."""
        for block, strip in zip(self.vertical[first:last], out):
            rows = torch.matmul(block, self.mosaic)  # (C, BLOCK_ROWS, columns of M)
            torch.mm(rows.flatten(0, 1), self.across, out=strip.view(-1, strip.shape[-1]))
        return out[: last - first]


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Products in true float32: TF32 and autocast are the model's business, a label must not hang on them."""
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    saved = [matmul.fp32_precision for matmul in matmuls]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, precision in zip(matmuls, saved):
            matmul.fp32_precision = precision


class _Scorer:
    """Labels of row blocks from the views' factors; its buffers, up to 3 x C x strip, serve every strip."""

    def __init__(self, views: list[View], size: tuple[int, int], step: int, columns: Tensor | None = None):
        self.columns = columns
        self.factors = [_Factors(view, size, columns) for view in views]
        num_classes, width = views[0].masks.shape[1], self.factors[0].across.shape[1]
        shape = (step, num_classes, BLOCK_ROWS, width)
        count = 1 if len(views) == 1 else 3
        self.buffers = [views[0].masks.new_empty(shape) for _ in range(count)]

    def fill(self, labels: Tensor, first: int, last: int) -> None:
        """Writes the labels of blocks first..last, of ``columns`` alone if given, into (blocks, rows, W)."""
        if len(self.factors) == 1:  # no softmax: it would change no argmax
            scores = self.factors[0].logits(first, last, self.buffers[0])
        else:
            scores, share = (buffer[: last - first] for buffer in self.buffers[1:])
            for i, view in enumerate(self.factors):
                logits = view.logits(first, last, self.buffers[0])
                torch.softmax(logits, 1, out=share if i else scores)
                if i:
                    scores += share
        best = scores.max(1).indices.to(labels.dtype)  # the first of equals; 3 times faster than argmax here
        if self.columns is None:
            labels[first:last] = best
        else:
            labels[first:last, :, self.columns] = best


def _fused(operator: str, view: View) -> bool:
    """Whether a kernel without upsampled logits serves the view's masks here."""
    sizes = {"classes": view.masks.shape[1], "grid": view.masks.shape[2:], "size": view.padded}
    return backends.choose("auto", operator, view.masks, **sizes) not in ("torch", "reference")


def _window_labels(view: View, labels: Tensor) -> Tensor:
    """Labels (H, W) of a view that needs no resizing: each window's own, then the pixels of several windows.

    ``labels`` (blocks, BLOCK_ROWS, W) is written; returns which blocks still have to be computed whole.
    """
    height, width = view.canvas
    flat = labels.view(-1, width)
    best = iter(upsample_argmax(view.masks, view.padded, dtype=labels.dtype))
    for y in view.tops:
        for x in view.lefts:
            flat[y : y + view.window[0], x : x + view.window[1]] = next(best)[
                : view.window[0], : view.window[1]
            ]
    shared = F.pad(_coverage(view.tops, view.window[0], height) > 1, (0, flat.shape[0] - height))
    return shared.view(-1, BLOCK_ROWS).any(1)


@torch.no_grad()
def labels_from_views(views: list[View], size: tuple[int, int], *, strip_rows: int = 64) -> Tensor:
    """Steps 3 and 4 of the protocol in strips of rows: the label map (H, W) from the windows' masks.

    It is uint8 up to 256 classes and int32 above.

    Args:
        views: from :func:`window_masks`.
        size: (H, W) of the original image.
        strip_rows: rows computed at once, in whole blocks of BLOCK_ROWS; the labels do not depend on it.
    """
    num_classes, device = views[0].masks.shape[1], views[0].masks.device
    height, width = size
    blocks = -(-height // BLOCK_ROWS)
    step = min(blocks, max(1, strip_rows // BLOCK_ROWS))
    dtype = torch.uint8 if num_classes <= 256 else torch.int32
    labels = torch.empty(blocks, BLOCK_ROWS, width, dtype=dtype, device=device)
    with _full_float32(device):
        todo = torch.ones(blocks, dtype=torch.bool)
        if len(views) == 1 and views[0].canvas == size and _fused("upsample_argmax", views[0]):
            todo = _window_labels(views[0], labels)
            columns = (_coverage(views[0].lefts, views[0].window[1], width) > 1).nonzero()[:, 0].to(device)
            if len(columns) and not todo.all():
                scorer = _Scorer(views, size, step, columns)
                for first, last in _runs(~todo, step):
                    scorer.fill(labels, first, last)
        if todo.any():
            scorer = _Scorer(views, size, step)
            for first, last in _runs(todo, step):
                scorer.fill(labels, first, last)
    return labels.view(-1, width)[:height]


def _runs(chosen: Tensor, step: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of at most ``step`` neighbouring indices at which ``chosen`` is true."""
    first = None
    for i, wanted in enumerate([*chosen.tolist(), False]):
        if first is not None and (not wanted or i - first == step):
            yield first, i
            first = None
        if wanted and first is None:
            first = i


def predict_labels(
    model: nn.Module,
    image: Tensor,
    cfg,
    *,
    multiscale: bool = False,
) -> Tensor:
    """Label map (H, W) of one image (3, H, W) uint8 at its own size, by the module's protocol, on the model's device.

    Memory beyond the model's own: every window's masks, and C x ``cfg.strip_rows`` x W scores. Arguments and
    errors as in :func:`window_masks` and :func:`labels_from_views`; the model should be in eval mode.
    """
    views = window_masks(model, image, cfg, multiscale=multiscale)
    return labels_from_views(views, tuple(image.shape[-2:]), strip_rows=cfg.strip_rows)


# --------------------------------------------------------------------------------------------- stock


@torch.no_grad()
def stock_scores(views: list[View], size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Steps 3 and 4 literally, all classes of every canvas stored: mean probabilities (C, H, W) in ``dtype``."""
    total = None
    for view in views:
        num_classes = view.masks.shape[1]
        canvas = torch.zeros(num_classes, *view.canvas, dtype=dtype, device=view.masks.device)
        count = torch.zeros(view.canvas, dtype=dtype, device=view.masks.device)
        windows = iter(view.masks.to(dtype))
        for y in view.tops:
            for x in view.lefts:
                rows, cols = slice(y, y + view.window[0]), slice(x, x + view.window[1])
                up = F.interpolate(next(windows)[None], view.padded, mode="bilinear", align_corners=False)[0]
                canvas[:, rows, cols] += up[:, : view.window[0], : view.window[1]]
                count[rows, cols] += 1
        canvas /= count
        scores = F.interpolate(canvas[None], size, mode="bilinear", align_corners=False)[0]
        scores = (scores.flip(-1) if view.flip else scores).softmax(0)
        total = scores if total is None else total.add_(scores)
    return total.div_(len(views))


@dataclass
class Comparison:
    """How the labels in strips differ from the stock path's."""

    pixels: int = 0
    differing: int = 0
    not_ties: int = 0

    def add(self, views: list[View], size: tuple[int, int], labels: Tensor) -> None:
        """Counts one image's pixels whose label in ``labels`` (H, W) is not the float32 stock path's.

        A tie: in float64, both labels' probabilities are as near to the largest as rounding explains. e is
        the largest relative error of the stock path's winning probabilities on this image, and the strips
        may err by 2 e (the library's error budget); two scores, each so far off, change places up to 4 e.
        """
        self.pixels += labels.numel()
        stock = stock_scores(views, size)
        differ = stock.argmax(0) != labels
        count = int(differ.sum())
        if count == 0:
            return
        self.differing += count
        exact = stock_scores(views, size, torch.float64)
        top, winner = exact.max(0, keepdim=True)
        error = ((stock.gather(0, winner) - top).abs() / top).max()
        pair = torch.stack([labels.long(), stock.argmax(0)])
        gap = ((top - exact.gather(0, pair)) / top).amax(0)
        self.not_ties += int((gap[differ] > 4 * error).sum())

    def reduce(self, world: World) -> None:
        """Sums the counts over all processes: once, on every one of them."""
        counts = torch.tensor([self.pixels, self.differing, self.not_ties], device=world.device)
        self.pixels, self.differing, self.not_ties = sum_over(world, counts).tolist()

    def __str__(self) -> str:
        return (
            f"{self.differing} of {self.pixels} pixels differ from the stock path, "
            f"{self.differing - self.not_ties} of them ties within float32 rounding, {self.not_ties} not"
        )


# ---------------------------------------------------------------------------------------- evaluation

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int = 4
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """(item, get) in order, while threads read ahead; ``get()`` gives ``read(item)`` or raises what it raised.

    Threads, since decoding releases the interpreter's lock and nothing has to be copied between processes.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        queue: list[tuple[Item, Future]] = []
        try:
            for item in items:
                queue.append((item, pool.submit(read, item)))
                if len(queue) > 2 * workers:
                    done, future = queue.pop(0)
                    yield done, future.result
            while queue:
                done, future = queue.pop(0)
                yield done, future.result
        finally:
            for _, future in queue:
                future.cancel()


def print_progress(label: str = "evaluating", every: float = 5.0) -> Progress:
    """A progress callback: rewrites one line on a terminal, prints one every ``every`` seconds in a log."""
    last = 0.0
    terminal = sys.stderr.isatty()

    def show(done: int, total: int, images_per_s: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < (0.1 if terminal else every):
            return
        last = now
        left = (total - done) / images_per_s if images_per_s else 0.0
        text = f"{label}: {done}/{total} images, {images_per_s:.1f} images/s, {left:.0f} s left"
        if terminal:
            print(f"\r{text}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    return show


def _count(metrics: SegmentationMetrics, views: list[View], target: Tensor, strip_rows: int) -> None:
    """Adds one image's pixels; one window that is the whole image needs not even a label map."""
    size, view = tuple(target.shape), views[0]
    single = len(views) == 1 and len(view.masks) == 1 and view.canvas == view.window == size
    if single and _fused("upsample_confusion", view):
        pad = (0, view.padded[1] - size[1], 0, view.padded[0] - size[0])
        padded = F.pad(target, pad, value=metrics.ignore_index)
        upsample_confusion(view.masks, padded[None], ignore_index=metrics.ignore_index, out=metrics.confusion)
    else:
        metrics.update(labels_from_views(views, size, strip_rows=strip_rows), target)


def evaluate(
    model: nn.Module,
    dataset,
    cfg,
    *,
    multiscale: bool = False,
    world: World | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    comparison: Comparison | None = None,
) -> SegmentationMetrics:
    """Scores of ``model`` on ``dataset`` at the annotations' own sizes.

    Image i is evaluated by process ``i % world.size``, none of them twice, and the counts are summed over the
    processes: the matrix holds the same integers for any number of them. Reading overlaps with computing.

    Args:
        model: as in :func:`window_masks`; put into eval mode for the time of the call.
        dataset: ``read(i)`` gives image (3, H, W) uint8 and target (H, W) uint8 or int32; has ``classes``.
        cfg: the ``eval`` section; the first ``cfg.max_images`` images, or all.
        world: the processes that evaluate together; None for this one alone.
        amp_dtype: dtype of autocast around the model, None for none.
        progress: called after every image of this process with about what all of them did; :func:`print_progress`
            makes one.
        comparison: counts the pixels whose label differs from the stock path's (slow: full canvases).

    Returns:
        The metrics over all processes, on every process.

    Raises:
        NotFinite: on every process, where the model of one gives NaN or infinite masks.
    """
    device = next(model.parameters()).device
    world = world or World(device)
    total = len(dataset) if cfg.max_images is None else min(len(dataset), cfg.max_images)
    names = dataset.classes.names
    metrics = SegmentationMetrics(len(names), names, device=device)
    mine = range(world.rank, total, world.size)
    start = time.monotonic()
    training = model.training
    failed = None
    model.eval()
    try:
        for done, (_, get) in enumerate(prefetch(dataset.read, mine), 1):
            image, target = get()
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                views = window_masks(model, image, cfg, multiscale=multiscale)
            if comparison is None:
                _count(metrics, views, target.to(device), cfg.strip_rows)
            else:
                size = tuple(target.shape)
                labels = labels_from_views(views, size, strip_rows=cfg.strip_rows)
                comparison.add(views, size, labels)
                metrics.update(labels, target)
            if progress is not None:
                all_done = min(done * world.size, total)  # the other processes are about as far
                progress(all_done, total, all_done / max(time.monotonic() - start, 1e-9))
    except NotFinite as error:
        failed = str(error)
    finally:
        model.train(training)
    # The other processes must learn of it: they would wait for this one's counts.
    if failures := [failure for failure in gather(world, failed) if failure]:
        raise NotFinite(failures[0])
    sum_over(world, metrics.confusion)  # integers, so that the sum is the same for any number of processes
    if comparison is not None:
        comparison.reduce(world)
    return metrics
