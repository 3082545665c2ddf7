"""The evaluation protocol in strips of rows, against a brute-force float64 implementation of it."""

import numpy as np
import pytest
import torch
from largest_tensor import largest_tensor
from tiny_inference import TinyModel, picture, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depict_kernels import backends
from train import inference
from train.errors import UserError
from train.inference import (
    labels_from_views,
    predict_labels,
    stock_scores,
)
from train.windows import anchors, enlarged_size, resize_image, scaled_size, window_masks

# ------------------------------------------------------------ the protocol once more, in numpy and float64


def bilinear(x, height, width):  # (C, h, w) -> (C, height, width), half-pixel centres, no antialiasing
    for axis, size in ((1, height), (2, width)):
        n = x.shape[axis]
        source = np.maximum((np.arange(size) + 0.5) * n / size - 0.5, 0)
        low = np.minimum(source.astype(int), n - 1)
        high = np.minimum(low + 1, n - 1)
        t = (source - low).reshape((-1, 1) if axis == 1 else (1, -1))
        x = np.take(x, low, axis) * (1 - t) + np.take(x, high, axis) * t
    return x


def brute_force(model, image, cfg, multiscale=False):
    """Mean probabilities (C, H, W), window by window and pixel by pixel."""
    _, height, width = image.shape
    scales = cfg.multiscale_scales if multiscale else cfg.scales
    flips = [False, True] if multiscale or cfg.flip else [False]
    probabilities = []
    for scale in scales:
        for flip in flips:
            short, long = int(cfg.resize * scale), int(cfg.resize * 4 * scale)
            factor = min(short / min(height, width), long / max(height, width))
            h, w = int(height * factor + 0.5), int(width * factor + 0.5)
            exact = (
                bilinear(image.numpy().astype(np.float64), h, w)
                if (h, w) != (height, width)
                else image.numpy()
            )
            x = resize_image(image, (h, w)).double().numpy()
            assert np.abs(x - exact).max() <= 0.5 + 1e-4  # rounded; a half may go either way in float32
            x = x[:, :, ::-1] if flip else x
            x = (x / 255 - np.reshape(model.mean, (3, 1, 1))) / np.reshape(model.std, (3, 1, 1))
            side_y, side_x = h, w
            if cfg.mode == "slide":
                if min(h, w) < cfg.window:
                    ratio = max(h, w) / min(h, w)
                    long_side = int(ratio * cfg.window)
                    h, w = (cfg.window, long_side) if h < w else (long_side, cfg.window)
                    x = bilinear(x, h, w)
                side_y = side_x = cfg.window
            total, count = np.zeros((model.num_classes, h, w)), np.zeros((h, w))
            ys = [y for y in range(0, h, cfg.stride) if y < h - side_y] + [h - side_y]
            xs = [x0 for x0 in range(0, w, cfg.stride) if x0 < w - side_x] + [w - side_x]
            for y in ys:
                for x0 in xs:
                    crop = np.ascontiguousarray(x[:, y : y + side_y, x0 : x0 + side_x])
                    with torch.no_grad():
                        masks = model(torch.from_numpy(crop).float()[None])[0].numpy().astype(np.float64)
                    up = bilinear(masks, masks.shape[1] * model.patch_size, masks.shape[2] * model.patch_size)
                    total[:, y : y + side_y, x0 : x0 + side_x] += up[:, :side_y, :side_x]
                    count[y : y + side_y, x0 : x0 + side_x] += 1
            logits = bilinear(total / count, height, width)
            logits = logits[:, :, ::-1] if flip else logits
            e = np.exp(logits - logits.max(0))
            probabilities.append(e / e.sum(0))
    return np.mean(probabilities, 0)


PROTOCOLS = {
    "one window": ((32, 32), {}, 8, False),
    "landscape, own size": ((32, 75), {}, 8, False),
    "portrait, own size": ((101, 32), {}, 8, False),
    "odd size": ((45, 67), {}, 8, False),
    "portrait, made smaller": ((90, 61), {}, 8, False),
    "made larger": ((19, 23), {}, 8, False),
    "longer side limits": ((9, 70), {}, 8, False),
    "scale below the window is enlarged": ((32, 49), {"scales": [0.5]}, 8, False),
    "windows both ways": ((70, 83), {"resize": 70, "stride": 11}, 8, False),
    "three deep": ((64, 91), {"resize": 64, "stride": 9}, 8, False),
    "stride equals window": ((64, 96), {"resize": 64, "stride": 32}, 8, False),
    "patch does not divide the window": ((50, 77), {"window": 30, "stride": 17, "resize": 50}, 7, False),
    "flip": ((33, 47), {"flip": True}, 8, False),
    "several scales": ((40, 53), {"scales": [0.75, 1.25]}, 8, False),
    "multi-scale and flip": ((37, 58), {}, 8, True),
    "whole": ((41, 59), {"mode": "whole", "resize": 48}, 8, False),
    "whole, own size": ((41, 59), {"mode": "whole", "resize": 41}, 8, False),
    "whole, multi-scale": ((41, 59), {"mode": "whole", "resize": 48}, 7, True),
}
each_protocol = pytest.mark.parametrize("size, changes, patch, multiscale", PROTOCOLS.values(), ids=PROTOCOLS)


@pytest.fixture(params=["strips", "operators where they fit"])
def path(request, monkeypatch):
    """Strips alone, or the upsample operators (whichever backend they have here) wherever the protocol allows."""
    monkeypatch.setattr(inference, "_fused", lambda *_: request.param != "strips")


@each_protocol
def test_labels_follow_the_protocol(size, changes, patch, multiscale, path):
    model, image, cfg = TinyModel(patch_size=patch), picture(*size), settings(**changes)
    exact = brute_force(model, image, cfg, multiscale)
    labels = predict_labels(model, image, cfg, multiscale=multiscale).numpy()
    assert labels.shape == size and labels.dtype == np.uint8
    taken = np.take_along_axis(exact, labels[None].astype(int), 0)[0]
    # Elsewhere than at a float32 tie, the label is the float64 winner.
    assert (exact.max(0) - taken).max() <= 1e-5
    assert (labels != exact.argmax(0)).mean() < 1e-3
    assert len(np.unique(labels)) >= 3  # the picture tells something


@each_protocol
def test_stock_scores_follow_the_protocol(size, changes, patch, multiscale):
    model, image, cfg = TinyModel(patch_size=patch), picture(*size), settings(**changes)
    exact = brute_force(model, image, cfg, multiscale)
    views = window_masks(model, image, cfg, multiscale=multiscale)
    # float32 enters through the masks alone
    stock = stock_scores(views, size, torch.float64).numpy()
    assert np.abs(stock - exact).max() < 2e-6
    assert (stock.argmax(0) != exact.argmax(0)).mean() < 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"resize": 107}, {"flip": True}, {"mode": "whole", "resize": 45}], ids=str
)
def test_strip_rows_change_no_label(changes, path):
    model = TinyModel(num_classes=40)
    # Flat regions: many pixels are ties up to rounding, so that any change of rounding would show.
    image = (picture(145, 107) // 64) * 64
    labels = [predict_labels(model, image, settings(strip_rows=n, **changes)) for n in (1, 7, 16, 50, 1000)]
    assert all(torch.equal(labels[0], other) for other in labels[1:])


class Products(TorchDispatchMode):
    """Records every matrix product: its operands' shapes and dtypes, and the float32 precision in force."""

    def __init__(self):
        super().__init__()
        self.shapes, self.precisions = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.shapes.add(tuple((tuple(x.shape), x.dtype) for x in args))
            self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)
            self.precisions.add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_every_product_has_one_shape_whatever_the_strips():
    """A BLAS may sum in another order for other shapes, so this is what makes the labels' bits the same."""
    views = window_masks(TinyModel(), picture(145, 107), settings(flip=True))
    for strip_rows in (1, 7, 50, 1000):
        with Products() as products:
            labels_from_views(views, (145, 107), strip_rows=strip_rows)
        assert len(products.shapes) == 2  # down the rows, across the columns


def test_float32_settings_do_not_reach_the_labels():
    model, image, cfg = TinyModel(num_classes=40), picture(95, 67), settings(flip=True)
    views = window_masks(model, image, cfg)
    plain = labels_from_views(views, (95, 67))
    saved = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            assert torch.equal(labels_from_views(views, (95, 67)), plain)
        assert products.precisions == {"ieee"}
        assert {dtype for shapes in products.shapes for _, dtype in shapes} == {torch.float32}
        assert torch.get_float32_matmul_precision() == "medium"  # as it was
    finally:
        torch.set_float32_matmul_precision(saved)


@pytest.mark.parametrize("multiscale", [False, True], ids=["single", "multi-scale and flip"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_memory_is_a_strip_not_the_image(multiscale, backend):
    num_classes, width = 60, 64
    model = TinyModel(num_classes)
    for height in (256, 512):
        cfg = settings(resize=64, window=64, stride=48)
        views = window_masks(model, picture(height, width), cfg, multiscale=multiscale)
        with backends.use_backend(backend):
            strips = largest_tensor(labels_from_views, views, (height, width), strip_rows=16)
        stock = largest_tensor(stock_scores, views, (height, width))
        assert stock >= num_classes * height * width  # the record does see what the stock path stores
        masks = max(view.masks.numel() for view in views)
        assert strips <= max(num_classes * 16 * width, masks)


def test_windows_go_through_in_batches_across_scales():
    model, image = TinyModel(), picture(40, 70)
    batched = window_masks(model, image, settings(batch_windows=5), multiscale=True)
    windows = sum(len(view.masks) for view in batched)
    assert model.batch_sizes == [5] * (windows // 5) + ([windows % 5] if windows % 5 else [])
    single = window_masks(model, image, settings(batch_windows=1), multiscale=True)
    for one, other in zip(batched, single):
        torch.testing.assert_close(one.masks, other.masks)


def test_whole_mode_batches_equal_sizes_only():
    model, image = TinyModel(), picture(40, 70)
    cfg = settings(mode="whole", multiscale_scales=[1.0, 1.5, 1.0])
    views = window_masks(model, image, cfg, multiscale=True)
    assert model.batch_sizes == [2, 2, 2]
    assert [view.canvas for view in views] == [(32, 56)] * 2 + [(48, 84)] * 2 + [(32, 56)] * 2


def test_window_places():
    assert anchors(512, 512, 480) == (0,)
    assert anchors(513, 512, 480) == (0, 1)
    assert anchors(992, 512, 480) == (0, 480)
    assert anchors(993, 512, 480) == (0, 480, 481)
    assert anchors(1024, 512, 512) == (0, 512)


@pytest.mark.parametrize(
    "size, shorter, scale, expected",
    [
        ((512, 683), 512, 1.0, (512, 683)),
        ((300, 400), 512, 1.0, (512, 683)),
        ((364, 500), 512, 1.75, (896, 1231)),
        ((683, 512), 512, 0.5, (342, 256)),
        ((100, 1000), 512, 1.0, (205, 2048)),  # the longer side reaches 4 * 512 first
        ((1, 5000), 512, 1.0, (1, 2048)),
    ],
)
def test_scaled_size_rounds_as_mmsegmentation(size, shorter, scale, expected):
    assert scaled_size(size, shorter, scale) == expected


def test_enlarged_size_cuts():
    assert enlarged_size((342, 256), 512) == (684, 512)
    assert enlarged_size((256, 341), 512) == (512, 682)
    assert enlarged_size((200, 200), 512) == (512, 512)
    assert enlarged_size((600, 512), 512) == (600, 512)
    assert enlarged_size((205, 2048), 512) == (512, 5115)  # 1 : 10, as upstream
    assert enlarged_size((1, 2048), 512) == (512, 16 * 512)
    assert enlarged_size((2048, 2), 512) == (16 * 512, 512)


@pytest.mark.parametrize("size", [(1, 4000), (3000, 2)])
@pytest.mark.parametrize("multiscale", [False, True])
def test_a_thin_image_takes_few_windows(size, multiscale):
    model, image = TinyModel(), picture(*size)
    views = window_masks(model, image, settings(), multiscale=multiscale)
    assert all(len(view.masks) <= 24 and max(view.canvas) <= 16 * 32 for view in views)
    labels = labels_from_views(views, size)
    assert labels.shape == size and len(labels.unique()) >= 2


def test_image_resizing_gives_whole_grey_levels_without_antialiasing():
    image = picture(60, 90)
    small = resize_image(image, (20, 31))
    assert torch.equal(small, small.round()) and small.min() >= 0 and small.max() <= 255
    exact = bilinear(image.numpy().astype(np.float64), 20, 31)
    assert np.abs(small.numpy() - exact).max() <= 0.5 + 1e-4
    assert torch.equal(resize_image(image, (60, 90)), image.float())


def test_labels_of_many_classes():
    views = window_masks(TinyModel(num_classes=300), picture(32, 40), settings())
    assert labels_from_views(views, (32, 40)).dtype == torch.int32


def test_a_model_that_diverged_is_named():
    model, image = TinyModel(), picture(32, 40)
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        predict_labels(model, image, settings())
