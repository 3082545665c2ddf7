"""The two halves of the augmentation against the plain order, and against their definitions."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from train.transforms import (
    DeviceAugment,
    TrainTransform,
    crop_of_resized,
    nearest_index,
    photometric_distortion,
    resized_size,
)


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return np.ascontiguousarray(F.gaussian_blur(noise, [3, 3]).permute(1, 2, 0).numpy())


def blocks(height: int, width: int, seed: int, num_classes: int = 4, block: int = 9) -> np.ndarray:
    """An annotation of large pieces, some of them ignored."""
    rng = np.random.default_rng(seed)
    values = np.append(np.arange(num_classes), 255).astype(np.uint8)
    coarse = rng.choice(
        values, (height // block + 1, width // block + 1), p=[0.1] * (num_classes - 1) + [0.6, 0.1]
    )
    return np.ascontiguousarray(coarse.repeat(block, 0).repeat(block, 1)[:height, :width])


def plain_order(image, target, transform, rng):
    """Resize the whole, then crop, in the words of mmsegmentation's protocol, with stock torchvision."""
    h, w = target.shape
    r = rng.uniform(*transform.scale)
    factor = min(4 * transform.base_size * r / max(h, w), transform.base_size * r / min(h, w))
    size = [int(h * factor + 0.5), int(w * factor + 0.5)]
    image = F.resize(torch.from_numpy(image).permute(2, 0, 1), size, antialias=False)
    target = F.resize(torch.from_numpy(target)[None], size, interpolation=InterpolationMode.NEAREST)[0]
    ch, cw = transform.crop_size
    for _ in range(10):
        top = int(rng.integers(max(size[0] - ch, 0) + 1))
        left = int(rng.integers(max(size[1] - cw, 0) + 1))
        labels, counts = np.unique(target[top : top + ch, left : left + cw], return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < transform.max_class_share:
            break
    return image[:, top : top + ch, left : left + cw], target[top : top + ch, left : left + cw]


def run(transform, image, target, rng):
    out = torch.full((3, *transform.crop_size), 99, dtype=torch.uint8)
    labels = torch.full(transform.crop_size, 99, dtype=torch.uint8)
    return out, labels, transform(image, target, rng, out, labels)


# ------------------------------------------------------------------------------- same as the plain order


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.floats(0.3, 3),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_crop_first_equals_resize_first(height, width, factor, down, right, seed):
    """Within one level, even on noise, wherever the crop lies; the annotation's indices exactly."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    ch, cw = min(40, size[0]), min(32, size[1])
    top, left = round(down * (size[0] - ch)), round(right * (size[1] - cw))
    ours = crop_of_resized(image, size, top, left, ch, cw)
    whole = F.resize(torch.from_numpy(image).permute(2, 0, 1), list(size), antialias=False)
    plain = whole[:, top : top + ch, left : left + cw]
    assert ours.shape == plain.shape
    assert (ours.int() - plain.int()).abs().max() <= 1

    index = torch.arange(height * width).reshape(1, height, width).float()
    whole = F.resize(index, list(size), interpolation=InterpolationMode.NEAREST)[0]
    rows, columns = nearest_index(top, ch, height, size[0]), nearest_index(left, cw, width, size[1])
    assert torch.equal(index[0][rows][:, columns], whole[top : top + ch, left : left + cw])


def test_crop_whose_source_is_as_long_as_itself():
    """torch's kernel skips a side of the same length before and after, even where the scale is not 1."""
    image = np.random.default_rng(0).integers(0, 256, (131, 97, 3), dtype=np.uint8)
    for size in ((133, 99), (129, 95), (131, 99), (132, 98)):
        whole = F.resize(torch.from_numpy(image).permute(2, 0, 1), list(size), antialias=False).int()
        for end in range(40, size[1] + 1):
            ours = crop_of_resized(image, size, end - 30, end - 40, 30, 40).int()
            assert (ours - whole[:, end - 30 : end, end - 40 : end]).abs().max() <= 1, (size, end)


@pytest.mark.parametrize("share", [0.75, 0.6, 1.0])
@pytest.mark.parametrize("size", [(60, 80), (131, 97), (40, 200)])
def test_samples_equal_the_plain_order(size, share):
    """From the same random numbers: the same crops, among them drawn-again ones, and the same pixels."""
    transform = TrainTransform((48, 56), 64, max_class_share=share, flip=0)
    redrawn = 0
    for seed in range(60):
        image, target = smooth_image(*size, seed), blocks(*size, seed)
        rng = np.random.default_rng(seed)
        if share < 1:
            plain_image, plain_target = plain_order(image, target, transform, np.random.default_rng(seed))
        else:  # accept the first crop
            first = TrainTransform((48, 56), 64, max_class_share=2.0)
            always = np.zeros_like(target)
            always[::2] = 1  # a target that never makes the plain order draw again
            plain_image, _ = plain_order(image, always, first, np.random.default_rng(seed))
            plain_target = None
        out, labels, params = run(transform, image, target, rng)
        h, w = params["valid"]
        assert (h, w) == plain_image.shape[1:]
        assert (out[:, :h, :w].int() - plain_image.int()).abs().max() <= 1
        if plain_target is not None:
            assert torch.equal(labels[:h, :w], plain_target)
        assert (out[:, h:] == 0).all() and (out[:, :, w:] == 0).all()
        assert (labels[h:] == 255).all() and (labels[:, w:] == 255).all()
        one = TrainTransform((48, 56), 64, max_class_share=1.0).draw_crop(target, np.random.default_rng(seed))
        redrawn += share < 1 and transform.draw_crop(target, np.random.default_rng(seed)) != one
    assert redrawn > 5 or share == 1.0


def test_crops_and_scales_are_uniform():
    """Chi-square-free check of the marginals: scale and position fill their ranges evenly."""
    transform = TrainTransform((32, 32), 64, scale=(0.5, 2.0), max_class_share=1.0)
    target = np.zeros((64, 64), np.uint8)
    crops = [transform.draw_crop(target, np.random.default_rng([3, i])) for i in range(3000)]
    scales = np.array([c.size[0] for c in crops]) / 64
    places = np.array([(c.top + 0.5) / (c.size[0] - 31) for c in crops if c.size[0] > 60])
    for values, low, high in ((scales, 0.5, 2.0), (places, 0, 1)):
        deciles = np.quantile((values - low) / (high - low), np.linspace(0.1, 0.9, 9))
        assert np.abs(deciles - np.linspace(0.1, 0.9, 9)).max() < 0.035


def test_colour_parameters_have_mmsegmentations_distribution():
    transform = TrainTransform((8, 8), 8)
    rng = np.random.default_rng(0)
    drawn = [transform.draw_colours(rng) for _ in range(4000)]
    column = {name: np.array([d[name] for d in drawn], float) for name in drawn[0]}
    for name, neutral in (("brightness", 0), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        assert abs((column[name] != neutral).mean() - 0.5) < 0.03, name
    assert abs(column["flip"].mean() - 0.5) < 0.03 and abs(column["contrast_first"].mean() - 0.5) < 0.03
    assert abs(np.abs(column["brightness"]).max() - 32 / 255) < 1e-3
    for name in ("contrast", "saturation"):
        assert abs(column[name].min() - 0.5) < 0.01 and abs(column[name].max() - 1.5) < 0.01
    steps = column["hue"] * 180
    assert np.allclose(steps, steps.round()) and (steps.min(), steps.max()) == (-18, 17)
    off = TrainTransform((8, 8), 8, flip=0, photometric_distortion=False)
    assert all(
        off.draw_colours(rng) | {"contrast_first": 0}
        == {"flip": False, "brightness": 0, "contrast": 1, "contrast_first": 0, "saturation": 1, "hue": 0}
        for _ in range(20)
    )


def test_long_side_is_capped():
    assert resized_size(100, 1000, 512, 2048) == (205, 2048)
    assert resized_size(512, 683, 512, 2048) == (512, 683)
    assert resized_size(300, 400, 256, 1024) == (256, 341)


# ----------------------------------------------------------------------------------------- the device part


def reference_distortion(pixel, brightness, contrast, contrast_first, saturation, hue):
    """PhotoMetricDistortion of one RGB pixel in 0..1, step by step, with the standard library's HSV."""

    def clip(values):
        return [min(1.0, max(0.0, v)) for v in values]

    pixel = clip([v + brightness for v in pixel])
    if contrast_first:
        pixel = clip([v * contrast for v in pixel])
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    pixel = colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), v)
    if not contrast_first:
        pixel = [v * contrast for v in pixel]
    return clip(pixel)


def random_params(count: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    transform = TrainTransform((8, 8), 8)
    drawn = [transform.draw_colours(rng) for _ in range(count)]
    return {name: torch.tensor([d[name] for d in drawn]) for name in drawn[0]}


def test_photometric_distortion_equals_the_definition():
    rng = np.random.default_rng(5)
    params = random_params(24, rng)
    images = torch.from_numpy(rng.random((24, 3, 4, 4), dtype=np.float32))
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 0, 2] = 0, 1, 0.5  # black, white, grey have no hue
    images[:, 0, 1, 0] = images[:, 1, 1, 0]  # a tie for the largest channel
    before = images.clone()
    out = photometric_distortion(images, params)
    assert torch.equal(images, before)
    for b in range(24):
        values = {k: v[b].item() for k, v in params.items() if k != "flip"}
        for y in range(4):
            for x in range(4):
                expected = reference_distortion(before[b, :, y, x].tolist(), **values)
                assert out[b, :, y, x].tolist() == pytest.approx(expected, abs=3e-6)


def make_batch(image: torch.Tensor, target: torch.Tensor, **params) -> dict:
    count = len(image)
    h, w = image.shape[-2:]
    neutral = {"brightness": 0.0, "contrast": 1.0, "contrast_first": False, "saturation": 1.0, "hue": 0.0}
    neutral["flip"] = False
    values = {k: torch.tensor([params.get(k, v)] * count) for k, v in neutral.items()}
    values["valid"] = torch.tensor([params.get("valid", (h, w))] * count)
    return {"image": image, "target": target, "params": values}


def test_neutral_batch_is_only_normalised():
    image = torch.randint(0, 256, (3, 3, 6, 7), dtype=torch.uint8)
    target = torch.randint(0, 5, (3, 6, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    plain = F.normalize(F.to_dtype(image, torch.float32, scale=True), mean, std)
    for distort in (True, False):
        images, targets = DeviceAugment(mean, std, distort)(make_batch(image, target))
        assert torch.allclose(images, plain, atol=1e-5) and images.is_contiguous()
        assert torch.equal(targets, target) and targets.dtype == torch.uint8


@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "interleaved"])
def test_flip_per_image(channels_last):
    image = torch.randint(0, 256, (4, 3, 5, 8), dtype=torch.uint8)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 5, (4, 5, 8), dtype=torch.int32)
    batch = make_batch(image, target)
    batch["params"]["flip"] = torch.tensor([True, False, True, False])
    images, targets = DeviceAugment((0, 0, 0), (1, 1, 1), distort=False)(batch)
    for i, flipped in enumerate((True, False, True, False)):
        expected = image[i].flip(-1) if flipped else image[i]
        assert torch.allclose(images[i], expected / 255)
        assert torch.equal(targets[i], target[i].flip(-1) if flipped else target[i])
    assert targets.dtype == torch.int32


@pytest.mark.parametrize("flip", [0.0, 1.0], ids=["straight", "flipped"])
def test_padding_ends_right_and_below_and_is_zero_after_normalisation(flip):
    image, target = smooth_image(30, 20, 0), blocks(30, 20, 0, block=5)
    transform = TrainTransform(
        (48, 40), 20, scale=(1, 1), max_class_share=1, flip=flip, photometric_distortion=False
    )
    out, labels, params = run(transform, image, target, np.random.default_rng(0))
    batch = make_batch(out[None], labels[None], flip=bool(flip), valid=params["valid"])
    images, targets = DeviceAugment((0.3, 0.4, 0.5), (0.2, 0.2, 0.2))(batch)
    assert params["valid"] == (30, 20)
    assert (images[0, :, 30:] == 0).all() and (images[0, :, :, 20:] == 0).all()
    assert (targets[0, 30:] == 255).all() and (targets[0, :, 20:] == 255).all()
    shown = torch.from_numpy(image[:, ::-1].copy() if flip else image).permute(2, 0, 1)
    plain = F.normalize(F.to_dtype(shown, torch.float32, scale=True), (0.3, 0.4, 0.5), (0.2, 0.2, 0.2))
    assert torch.allclose(images[0, :, :30, :20], plain, atol=1e-5)
    expected = torch.from_numpy(target[:, ::-1].copy() if flip else target)
    assert torch.equal(targets[0, :30, :20], expected)


def test_distorted_batch_equals_the_per_image_pipeline():
    """Flip, distort, normalise of a batch = the same three done image by image."""
    rng = np.random.default_rng(2)
    image = torch.from_numpy(rng.integers(0, 256, (6, 3, 9, 10), dtype=np.uint8))
    batch = make_batch(image, torch.zeros(6, 9, 10, dtype=torch.uint8))
    batch["params"].update(random_params(6, rng))
    images, _ = DeviceAugment((0.5,) * 3, (0.5,) * 3)(batch)
    for i in range(6):
        alone = image[i].flip(-1) if batch["params"]["flip"][i] else image[i]
        one = {k: v[i : i + 1] for k, v in batch["params"].items()}
        expected = photometric_distortion(alone[None] / 255, one)[0] * 2 - 1
        assert torch.allclose(images[i], expected, atol=1e-5)
