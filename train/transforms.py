"""Training augmentation in two halves: crop and resize in the worker, everything per pixel on the device.

The distribution is the protocol of Segmenter and mmsegmentation, which the paper trains with:

1. resize so that the shorter side is base_size * r, r uniform in ``scale``, the longer one capped at
   4 * base_size * r; image bilinear without antialiasing, annotation nearest (OpenCV's resize);
2. random crop, drawn again up to ten times while one class fills more than ``max_class_share`` of it;
3. flip left to right with probability ``flip``;
4. photometric distortion; 5. normalisation; 6. padding at the right and bottom to the crop size.

What differs is the order of the work, not the result. The crop is drawn before anything is resized, and the
annotation alone decides about it. ``TrainTransform`` (worker, uint8 in and out) does 1 and 2;
``DeviceAugment`` (device, batched, per-image parameters) does 3 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CROP_TRIES = 10
PARAMS = ("valid", "flip", "brightness", "contrast", "contrast_first", "saturation", "hue")


def resized_size(height: int, width: int, shorter: float, longer: float) -> tuple[int, int]:
    """The size that keeps the aspect ratio, with sides of at most `shorter` and `longer` pixels."""
    factor = min(longer / max(height, width), shorter / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest_index(start: int, count: int, size_in: int, size_out: int) -> np.ndarray:
    """Source indices (count,) of the pixels start..start+count-1 of a nearest resize, as torch rounds them."""
    scale = np.float32(size_in) / np.float32(size_out)
    index = np.arange(start, start + count, dtype=np.float32) * scale
    return np.minimum(index.astype(np.int64), size_in - 1)


def crop_of_resized(
    image: np.ndarray, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> torch.Tensor:
    """The crop of a bilinearly resized image, without resizing what lies right of it or below.

    torch's uint8 resize takes the scale apart from the sizes, so the source ends one pixel past the crop.
    It can only start at the image's corner: a start between two source pixels would shift the sampling phase.
    Kernels that start anywhere (PIL's ``box``, ``grid_sample``) take longer for the crop alone than this one
    for the corner and the crop (benchmarks/bench_loader.py).

    Args:
        image: (H, W, 3) uint8.
        size: (H', W') of the resized image.
        top, left, height, width: the crop in it, in pixels.

    Returns:
        (3, height, width) uint8, the same as resize then crop up to rounding (one level).
    """
    full = image.shape[:2]
    ends, counts = [], []
    for end, size_in, size_out in zip((top + height, left + width), full, size):
        last = (end - 0.5) * size_in / size_out - 0.5  # source position of the crop's last pixel
        ends.append(min(size_in, int(np.floor(last)) + 3))
        # The kernel does not resize a side that is as long before as after, whatever the scale: ask for one more.
        counts.append(end + (ends[-1] == end))
    # A copy (the kernel would make one), since arrays from the cache are read-only. Batched before permuted:
    # the strides must say channels_last, which the resize kernel takes 2.7 times as fast.
    source = torch.from_numpy(np.array(image[: ends[0], : ends[1]], order="C"))[None].permute(0, 3, 1, 2)
    if full != size:
        source = torch.ops.aten.upsample_bilinear2d(
            source, counts, False, size[0] / full[0], size[1] / full[1]
        )
    return source[0, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class Crop:
    """A crop of the resized image: (H', W') of the whole, and the part that is kept."""

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def rows(self, source: int) -> np.ndarray:
        return nearest_index(self.top, self.height, source, self.size[0])

    def columns(self, source: int) -> np.ndarray:
        return nearest_index(self.left, self.width, source, self.size[1])


@dataclass(frozen=True)
class TrainTransform:
    """The worker's half: draws all parameters of a sample and cuts it out.

    Args:
        crop_size: (h, w) of every sample.
        base_size: shorter side at scale 1.
        scale: range of r.
        max_class_share: a crop is drawn again while one class fills this share of its labelled pixels or more
            (or no pixel is labelled). 1 accepts every crop.
        flip: probability.
        photometric_distortion: whether to distort colours.
        ignore_index: the target of padded pixels.
    """

    crop_size: tuple[int, int]
    base_size: int
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: float = 0.5
    photometric_distortion: bool = True
    ignore_index: int = 255

    def draw_crop(self, target: np.ndarray, rng: np.random.Generator) -> Crop:
        """Draws the scale and the crop for an annotation (H, W)."""
        h, w = target.shape
        r = rng.uniform(*self.scale)
        size = resized_size(h, w, self.base_size * r, 4 * self.base_size * r)
        height, width = min(size[0], self.crop_size[0]), min(size[1], self.crop_size[1])
        for _ in range(CROP_TRIES):
            top = int(rng.integers(size[0] - height + 1))
            left = int(rng.integers(size[1] - width + 1))
            crop = Crop(size, top, left, height, width)
            if self.max_class_share >= 1 or self._is_varied(target, crop):
                break
        return crop

    def _is_varied(self, target: np.ndarray, crop: Crop) -> bool:
        """Whether no class fills max_class_share of the crop's labelled pixels."""
        rows, columns = crop.rows(target.shape[0]), crop.columns(target.shape[1])
        # Every fourth pixel both ways tells, except near the threshold.
        share = _largest_share(target[rows[::4]].take(columns[::4], axis=1), self.ignore_index)
        if abs(share - self.max_class_share) < 0.1:
            share = _largest_share(target[rows].take(columns, axis=1), self.ignore_index)
        return share < self.max_class_share

    def draw_colours(self, rng: np.random.Generator) -> dict[str, float]:
        """Draws the flip and the colour distortion; neutral values where it is off.

        brightness is added (image in 0..1), contrast and saturation multiply, hue is added as a part of the
        circle; the contrast comes before saturation and hue where contrast_first is true, else last.
        """
        flip = rng.random() < self.flip
        on = (rng.random(4) < 0.5) & self.photometric_distortion
        contrast_first = bool(rng.integers(2))
        brightness, contrast = rng.uniform(-32, 32) / 255, rng.uniform(0.5, 1.5)
        saturation, hue = rng.uniform(0.5, 1.5), rng.integers(-18, 18) / 180  # OpenCV's hue has 180 steps
        return {
            "flip": flip,
            "brightness": brightness if on[0] else 0.0,
            "contrast": contrast if on[1] else 1.0,
            "contrast_first": contrast_first,
            "saturation": saturation if on[2] else 1.0,
            "hue": hue if on[3] else 0.0,
        }

    def __call__(
        self,
        image: np.ndarray,
        target: np.ndarray,
        rng: np.random.Generator,
        out_image: torch.Tensor,
        out_target: torch.Tensor,
    ) -> dict[str, object]:
        """Cuts one sample into its place of the batch.

        Args:
            image: (H, W, 3) uint8; target: (H, W).
            rng: everything random comes from it.
            out_image: (3, h, w) uint8, out_target: (h, w), both written whole.

        Returns:
            one value for each name in PARAMS.
        """
        crop = self.draw_crop(target, rng)
        params: dict[str, object] = {"valid": (crop.height, crop.width), **self.draw_colours(rng)}
        # Padding goes right and bottom after the flip, so a sample that will be flipped gets it on the left.
        x = self.crop_size[1] - crop.width if params["flip"] else 0
        if (crop.height, crop.width) != tuple(self.crop_size):
            out_image.zero_()
            out_target.fill_(self.ignore_index)
        out_image[:, : crop.height, x : x + crop.width] = crop_of_resized(
            image, crop.size, crop.top, crop.left, crop.height, crop.width
        )
        rows, columns = crop.rows(target.shape[0]), crop.columns(target.shape[1])
        out_target[: crop.height, x : x + crop.width] = torch.from_numpy(target[rows].take(columns, axis=1))
        return params


def _largest_share(target: np.ndarray, ignore_index: int) -> float:
    """The share of the most frequent class among the labelled pixels; 1 where none is labelled."""
    labelled = target[target != ignore_index]
    return np.bincount(labelled).max() / labelled.size if labelled.size else 1.0


# --------------------------------------------------------------------------------------- on the device


def photometric_distortion(images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """mmsegmentation's PhotoMetricDistortion with given parameters, a whole batch at once and in float.

    Args:
        images: (B, 3, h, w) float, RGB in 0..1.
        params: (B,) tensors as ``TrainTransform.draw_colours`` describes them.

    Returns:
        (B, 3, h, w) in 0..1. Upstream rounds to uint8 after each step; this does not.
    """

    def each(name: str) -> torch.Tensor:
        return params[name].to(images.dtype)[:, None, None, None]

    contrast, first = each("contrast"), params["contrast_first"][:, None, None, None]
    images = (images + each("brightness")).clamp_(0, 1)
    images.mul_(torch.where(first, contrast, 1)).clamp_(0, 1)

    # To HSV and back, with the hue in 0..6 and the chroma (saturation * value) in the saturation's place.
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    difference = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    sector = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    hue = difference.div_(chroma.clamp(min=1e-12)).add_(sector).add_(6 * each("hue")[:, 0])
    hue.sub_(hue.div(6).floor_().mul_(6))
    chroma = torch.minimum(chroma * each("saturation")[:, 0], value)
    lowest = value - chroma
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, share, out=images[:, channel])
    return images.mul_(torch.where(first, 1, contrast)).clamp_(0, 1)


class DeviceAugment:
    """The device's half: flip, photometric distortion, normalisation and padding of a batch.

    Args:
        mean, std: per channel, for images in 0..1 (the backbone's pretrained_cfg).
        distort: whether batches carry colour distortion at all; False skips its arithmetic.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], distort: bool = True):
        self.mean, self.std, self.distort = tuple(mean), tuple(std), distort
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns a batch of ``train_loader``, moved to a device, into the model's input.

        Args:
            batch: "image" (B, 3, h, w) uint8, "target" (B, h, w) integer, "params" dict of (B, ...) tensors.

        Returns:
            images (B, 3, h, w) float32, normalised, 0 where padded; targets (B, h, w) of the batch's dtype.
        """
        image, target, params = batch["image"], batch["target"], batch["params"]
        device = image.device
        if device not in self._constants:
            self._constants[device] = tuple(
                torch.tensor(c, dtype=torch.float32, device=device)[None, :, None, None]
                for c in (self.mean, self.std)
            )
        mean, std = self._constants[device]
        flip = params["flip"][:, None, None]
        target = torch.where(flip, target.flip(-1), target)
        image = torch.where(flip[:, None], image.flip(-1), image).float().div_(255)
        image = photometric_distortion(image, params) if self.distort else image.contiguous()
        image.sub_(mean).div_(std)
        h, w = image.shape[-2:]
        valid = params["valid"]
        inside = (torch.arange(h, device=device) < valid[:, :1])[:, None, :, None]
        inside = inside & (torch.arange(w, device=device) < valid[:, 1:])[:, None, None, :]
        return image.mul_(inside), target
