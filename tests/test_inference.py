"""The evaluation protocol in strips of rows, against a brute-force float64 implementation of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depict_kernels import backends
from train import inference
from train.ade20k import ClassList
from train.errors import UserError
from train.inference import (
    Comparison,
    compare_with_stock,
    evaluate,
    labels_from_views,
    predict_labels,
    prefetch,
    stock_predict_labels,
    stock_scores,
)
from train.windows import anchors, enlarged_size, resize_image, scaled_size, window_masks


class TinyModel(nn.Module):
    """Masks that depend on position and on the whole window, so that every misplaced window shows."""

    mean, std = (0.5, 0.4, 0.45), (0.5, 0.25, 0.3)

    def __init__(self, num_classes=5, patch_size=8, seed=0):
        super().__init__()
        self.patch_size, self.num_classes = patch_size, num_classes
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(3, 16, patch_size, patch_size)
        self.head = nn.Conv2d(18, num_classes, 1)
        nn.init.normal_(self.head.weight, std=2.0)
        self.batch_sizes = []

    def padded_size(self, height, width):
        return tuple(-(-side // self.patch_size) * self.patch_size for side in (height, width))

    def forward(self, images):
        self.batch_sizes.append(len(images))
        height, width = images.shape[-2:]
        padded = self.padded_size(height, width)
        x = self.embed(F.pad(images, (0, padded[1] - width, 0, padded[0] - height))).tanh()
        x = x - x.mean((2, 3), keepdim=True)
        b, _, h, w = x.shape
        y_position = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        x_position = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.head(torch.cat([x, y_position, x_position], 1))


def settings(**changes):
    values = {
        "mode": "slide",
        "window": 32,
        "stride": 24,
        "resize": 32,
        "scales": [1.0],
        "flip": False,
        "multiscale_scales": [0.5, 1.0, 1.5],
        "batch_windows": 4,
        "strip_rows": 16,
        "max_images": None,
    }
    return SimpleNamespace(**values | changes)


def picture(height, width, seed=1):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 2 + height // 9, 2 + width // 9, generator=g)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = torch.rand(3, height, width, generator=g)
    return ((0.8 * smooth + 0.2 * noise).clamp(0, 1) * 255).to(torch.uint8)


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
    assert np.abs(stock_scores(views, size, torch.float64).numpy() - exact).max() < 2e-6
    stock = stock_predict_labels(model, image, cfg, multiscale=multiscale, dtype=torch.float64)
    assert (stock.numpy() != exact.argmax(0)).mean() < 1e-3


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


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                # a view of an expanded tensor takes no memory of its own
                self.numel = max(self.numel, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return out


def largest_tensor(function, *args, **kwargs):
    with LargestTensor() as record:
        function(*args, **kwargs)
    return record.numel


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
    with pytest.raises(ValueError, match="uint8 has no room for 300 classes"):
        labels_from_views(views, (32, 40), out_dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32"):
        labels_from_views(views, (32, 40), out_dtype=torch.float32)


def test_bad_input_is_named():
    model, image = TinyModel(), picture(32, 40)
    with pytest.raises(UserError, match=r"\(3, H, W\) uint8, not \(1, 32, 40\)"):
        predict_labels(model, image[:1], settings())
    with pytest.raises(UserError, match="float32"):
        predict_labels(model, image.float(), settings())
    with pytest.raises(UserError, match=r"eval\.stride 33 .*eval\.window \(32\)"):
        predict_labels(model, image, settings(stride=33))
    with pytest.raises(UserError, match=r"eval\.mode 'tiles'.*slide or whole"):
        predict_labels(model, image, settings(mode="tiles"))
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        predict_labels(model, image, settings())


# ---------------------------------------------------------------------------------------- evaluation


class Pictures:
    """A data set of random pictures of different sizes, some of whose pixels are ignored."""

    def __init__(self, count=5, num_classes=5):
        self.sizes = [(32 + 9 * i, 70 - 7 * i) for i in range(count)]
        self.classes = ClassList(tuple(f"class {i}" for i in range(num_classes)), np.zeros((num_classes, 3)))

    def __len__(self):
        return len(self.sizes)

    def read(self, i):
        g = torch.Generator().manual_seed(i)
        target = torch.randint(0, self.classes.num_classes + 1, self.sizes[i], generator=g, dtype=torch.uint8)
        target[target == self.classes.num_classes] = 255
        return picture(*self.sizes[i], seed=i), target


def loop_confusion(model, dataset, cfg, images):
    n = np.zeros((model.num_classes, model.num_classes), dtype=np.int64)
    for i in images:
        image, target = dataset.read(i)
        labels = predict_labels(model, image, cfg).numpy()
        for t, y in zip(target.numpy().ravel(), labels.ravel()):
            if t != 255:
                n[t, y] += 1
    return n


def test_evaluate_counts_every_pixel_once():
    model, dataset, cfg = TinyModel().train(), Pictures(), settings()
    seen = []
    metrics = evaluate(model, dataset, cfg, progress=lambda *state: seen.append(state))
    assert np.array_equal(metrics.confusion.numpy(), loop_confusion(model, dataset, cfg, range(5)))
    assert [state[:2] for state in seen] == [(i, 5) for i in range(1, 6)] and all(s[2] > 0 for s in seen)
    assert list(metrics.results()["iou_per_class"]) == list(dataset.classes.names)
    assert model.training  # as it was
    few = evaluate(model, dataset, settings(max_images=2))
    assert np.array_equal(few.confusion.numpy(), loop_confusion(model, dataset, cfg, range(2)))


@pytest.mark.parametrize("patch", [8, 7], ids=["whole patches", "padded"])
def test_an_image_of_one_window_is_counted_without_a_label_map(monkeypatch, patch):
    model, dataset, cfg = TinyModel(patch_size=patch), Pictures(3), settings(mode="whole", resize=500)
    dataset.sizes = [(500, 520)] * 2
    expected = torch.zeros(25, dtype=torch.int64)
    for image, target in map(dataset.read, range(2)):
        labels, valid = stock_predict_labels(model, image, cfg), target != 255
        expected += torch.bincount(target[valid].long() * 5 + labels[valid], minlength=25)
    monkeypatch.setattr(inference, "_fused", lambda *_: True)  # whichever kernel there is, take the operator
    monkeypatch.setattr(inference, "labels_from_views", None)
    got = evaluate(model, dataset, cfg).confusion
    assert (got.flatten() - expected).abs().sum() <= 4  # ties within rounding
    assert got.sum() == expected.sum()


def test_reading_errors_reach_the_caller():
    dataset = Pictures()

    def read(i):
        if i == 3:
            raise UserError("picture 3 is truncated")
        return Pictures.read(dataset, i)

    dataset.read = read
    with pytest.raises(UserError, match="picture 3"):
        evaluate(TinyModel(), dataset, settings())


def test_prefetch_keeps_the_order_and_reads_ahead():
    started = []

    def read(i):
        started.append(i)
        return i * i

    pairs = prefetch(read, range(20), workers=2)
    item, get = next(pairs)
    assert (item, get()) == (0, 0) and len(started) >= 2
    assert [(i, g()) for i, g in pairs] == [(i, i * i) for i in range(1, 20)]


@pytest.mark.parametrize("multiscale", [False, True], ids=["single", "multi-scale and flip"])
def test_comparison_with_the_stock_path_finds_ties_only(multiscale):
    dataset = Pictures(3)
    comparison = compare_with_stock(TinyModel(), dataset, settings(), multiscale=multiscale)
    assert comparison.pixels == sum(h * w for h, w in dataset.sizes)
    assert comparison.not_ties == 0 and comparison.differing < 20
    assert f"of {comparison.pixels} pixels differ" in str(comparison)


def test_comparison_sees_a_wrong_label_and_forgives_a_tie():
    model, image = TinyModel(), picture(32, 40)
    views = window_masks(model, image, settings())
    exact = stock_scores(views, (32, 40), torch.float64)
    labels = stock_scores(views, (32, 40)).argmax(0)
    labels[3, 4] = exact[:, 3, 4].argmin()
    found = Comparison()
    found.add(views, (32, 40), labels)
    assert (found.pixels, found.differing, found.not_ties) == (32 * 40, 1, 1)

    for view in views:  # now classes 0 and 1 are equal everywhere: either is right
        view.masks[:, 1] = view.masks[:, 0]
    labels = stock_scores(views, (32, 40)).argmax(0)
    equal = labels == 0
    assert equal.any()
    labels[equal] = 1
    found = Comparison()
    found.add(views, (32, 40), labels)
    assert found.differing == equal.sum() and found.not_ties == 0


def _evaluate_as(rank, init_file, out=None):
    torch.distributed.init_process_group("gloo", f"file://{init_file}", rank=rank, world_size=2)
    try:
        metrics = evaluate(TinyModel(), Pictures(), settings(), rank=rank, world_size=2)
        if out is not None:
            torch.save(metrics.confusion, out)
    finally:
        torch.distributed.destroy_process_group()
    return metrics


def test_two_processes_give_the_same_integers(tmp_path):
    other = mp.spawn(_evaluate_other, (tmp_path / "init", tmp_path / "confusion"), join=False)
    metrics = _evaluate_as(0, tmp_path / "init")
    other.join()
    alone = evaluate(TinyModel(), Pictures(), settings())
    assert torch.equal(metrics.confusion, alone.confusion)
    assert torch.equal(torch.load(tmp_path / "confusion"), alone.confusion)


def _evaluate_other(_, init_file, out):
    torch.set_num_threads(1)
    _evaluate_as(1, init_file, out)
