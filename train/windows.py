"""Where an image's windows lie at every scale, and their masks: the first half of the evaluation protocol."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import UserError
from train.transforms import resized_size

# The longer side is at most this many times the shorter one's target (mmsegmentation's img_scale
# (2048, 512)): a panorama is made smaller instead of giving endless windows.
MAX_RATIO = 4
# A canvas is enlarged to at most so many windows' length: what is thinner is squeezed along its length, since keeping
# its aspect, as upstream does, takes any amount of memory.
MAX_LENGTH = 16


class NotFinite(UserError):
    """A model gives NaN or infinite masks."""


@dataclass(frozen=True)
class View:
    """One scale and flip of an image: the low-resolution masks of its windows and where they lie.

    Sizes are (rows, columns) in pixels of the scaled image, the canvas.
    """

    masks: Tensor  # (len(tops) * len(lefts), C, h, w) float32, window rows outermost
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    window: tuple[int, int]
    padded: tuple[int, int]  # what the masks cover: the window, rounded up to whole patches
    canvas: tuple[int, int]
    flip: bool


def scaled_size(size: tuple[int, int], shorter: int, scale: float = 1.0) -> tuple[int, int]:
    """Size (H, W) after resizing to a shorter side of ``shorter * scale``, rounded as mmsegmentation rounds it.

    The target is cut to an integer, the sides are rounded half up, the longer one is at most
    ``MAX_RATIO * shorter * scale``.
    """
    return resized_size(*size, int(shorter * scale), int(shorter * MAX_RATIO * scale))


def enlarged_size(size: tuple[int, int], window: int) -> tuple[int, int]:
    """``size``, or where its shorter side is below ``window``, enlarged to it.

    The longer side is cut to an integer, not rounded, as upstream does at this place; it is at most
    ``MAX_LENGTH * window``.
    """
    height, width = size
    if min(size) >= window:
        return size
    longer = int(min(max(size) / min(size), MAX_LENGTH) * window)
    return (window, longer) if height < width else (longer, window)


def anchors(length: int, window: int, stride: int) -> tuple[int, ...]:
    """First pixels of the windows along one side: every ``stride``, the last one ending at the border."""
    return (*range(0, length - window, stride), length - window)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, *size) float32 of whole numbers 0..255, bilinear without antialiasing.

    Upstream resizes in 8 bits with OpenCV, so the result is rounded; OpenCV's 11-bit fixed-point weights can
    differ from it by one grey level.
    """
    image = image.float()
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0].round_()


def normalised(image: Tensor, model: nn.Module) -> Tensor:
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (model.mean, model.std))
    return (image / 255 - mean) / std


def _scales_and_flips(cfg, multiscale: bool) -> list[tuple[float, bool]]:
    scales = cfg.multiscale_scales if multiscale else cfg.scales
    flips = (False, True) if multiscale or cfg.flip else (False,)
    return [(scale, flip) for scale in scales for flip in flips]


@torch.no_grad()
def window_masks(
    model: nn.Module,
    image: Tensor,
    cfg,
    *,
    multiscale: bool = False,
) -> list[View]:
    """Steps 1 and 2 of :mod:`train.inference`'s protocol: the masks of every window of every scale and flip.

    Windows of one size go through the model ``cfg.batch_windows`` at a time, across scales and flips.
    The batches depend on the image alone, never on its neighbours: an image's masks are the same whichever
    process evaluates it.

    Args:
        model: has ``mean``, ``std`` and ``padded_size(H, W)``; maps normalised images (B, 3, H, W) to masks
            (B, C, h, w).
        image: (3, H, W) uint8.
        cfg: the ``eval`` section of the configuration.

    Raises:
        NotFinite: a model that gives NaN or infinite masks.
    """
    image = image.to(next(model.parameters()).device)

    crops: list[Tensor] = []
    layouts: list[dict] = []
    for scale, flip in _scales_and_flips(cfg, multiscale):
        scaled = resize_image(image, scaled_size(tuple(image.shape[-2:]), cfg.resize, scale))
        scaled = normalised(scaled.flip(-1) if flip else scaled, model)
        canvas = window = tuple(scaled.shape[-2:])
        tops = lefts = (0,)
        if cfg.mode == "slide":
            window = (cfg.window, cfg.window)
            canvas = enlarged_size(canvas, cfg.window)
            if canvas != tuple(scaled.shape[-2:]):
                scaled = F.interpolate(scaled[None], canvas, mode="bilinear", align_corners=False)[0]
            tops, lefts = (anchors(side, cfg.window, cfg.stride) for side in canvas)
        crops += [scaled[:, y : y + window[0], x : x + window[1]] for y in tops for x in lefts]
        padded = tuple(model.padded_size(*window))
        layouts.append(
            {"tops": tops, "lefts": lefts, "window": window, "padded": padded, "canvas": canvas, "flip": flip}
        )

    masks: list[Tensor] = []
    while len(masks) < len(crops):
        batch = crops[len(masks) : len(masks) + cfg.batch_windows]
        batch = list(takewhile(lambda crop: crop.shape == batch[0].shape, batch))
        masks += model(torch.stack(batch)).float().unbind(0)

    views = []
    for layout in layouts:
        count = len(layout["tops"]) * len(layout["lefts"])
        views.append(View(masks=torch.stack(masks[:count]), **layout))
        del masks[:count]
    if not all(view.masks.isfinite().all() for view in views):
        raise NotFinite(
            "the model gives NaN or infinite masks: its training diverged, or its weights are damaged"
        )
    return views
