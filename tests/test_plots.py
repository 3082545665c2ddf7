"""The pictures of a run folder show the numbers they are given."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from train.ade20k import ClassList, load_classes, make_palette
from train.metrics import SegmentationMetrics
from train.plots import (
    _UNLABELLED,
    _WRONG,
    Sample,
    collect_samples,
    confusion_figure,
    error_map,
    loss_figure,
    overlay_figure,
    plot_run,
    score_figure,
    smoothed,
)
from train.predict import enlarged, overlay


def train_lines(count):
    return [{"kind": "train", "step": 10 * i, "loss": 3.0 / i, "lr": 1e-3} for i in range(1, count + 1)]


def eval_line(step, miou):
    return {"kind": "eval", "step": step, "miou": miou, "pixel_accuracy": 0.9, "mean_accuracy": 0.6}


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def overlapping(canvas, texts):
    """Neighbouring texts whose drawn boxes overlap."""
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts if t.get_text()]
    return sum(a.overlaps(b) for a, b in pairwise(boxes))


def test_smoothing_is_centred():
    line = np.arange(50.0) * 2 + 1
    assert np.allclose(smoothed(line, 9)[4:-4], line[4:-4])  # no lag behind a straight line
    assert np.allclose(smoothed(np.full(7, 3.0), 4), 3.0)
    assert np.allclose(smoothed(np.array([0.0, 3.0, 0.0]), 3), [1.5, 1.0, 1.5])


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 5, 60])
def test_loss_curve(count):
    figure = loss_figure(train_lines(count))
    loss, rate = figure.axes
    x, y = loss.lines[0].get_data()
    assert list(x) == [10 * i for i in range(1, count + 1)] and np.allclose(y, 3.0 / np.arange(1, count + 1))
    assert (rate.lines[0].get_ydata() == 1e-3).all()
    assert len(loss.lines) == (2 if count >= 20 else 1)  # few points need no average
    assert "(nats)" in loss.get_ylabel() and rate.get_xlabel() == "optimiser step"


def test_the_average_of_the_loss_is_one_and_says_over_what():
    figure = loss_figure([line | {"loss": line["step"] / 10 % 2} for line in train_lines(26)])
    averaged = figure.axes[0].lines[1]
    assert averaged.get_label() == "average over 5 log lines"
    assert np.ptp(averaged.get_ydata()[2:-2]) == pytest.approx(0.2)  # of a loss that jumps between 0 and 1


def test_loss_curve_marks_the_best_checkpoint_and_chance():
    figure = loss_figure(train_lines(5), best_step=30, num_classes=150, steps_per_epoch=2526.25)
    loss, rate = figure.axes
    assert [list(line.get_xdata()) for line in (loss.lines[-1], rate.lines[-1])] == [[30, 30]] * 2
    assert labels_of(loss)[1:] == ["equal probabilities: ln 150 = 5.01", "best checkpoint: step 30"]
    assert loss.lines[1].get_ydata() == pytest.approx([np.log(150)] * 2)
    assert loss.get_ylim()[1] > np.log(150) and rate.get_xlabel() == "optimiser step (2,526 per epoch)"


def test_score_curves_mark_the_best():
    figure = score_figure([eval_line(10, 0.2), eval_line(20, 0.51), eval_line(30, 0.4)])
    axes = figure.axes[0]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves == {"pixel accuracy": [0.9] * 3, "mean accuracy": [0.6] * 3, "mIoU": [0.2, 0.51, 0.4]}
    marks = [mark for mark in axes.collections if "best checkpoint" in mark.get_label()]
    assert [mark.get_offsets().tolist() for mark in marks] == [[[20, 0.51]]]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[-1] == "best checkpoint: mIoU 51.0 % at step 20" and axes.get_ylabel() and axes.get_xlabel()


def test_score_curves_show_what_was_there_before_training():
    """The untrained model is a level, never the best checkpoint: it has none."""
    lines = [eval_line(0, 0.3), eval_line(10, 0.2), eval_line(20, 0.25)]
    axes = score_figure(lines, {"classifier": 0.22}).axes[0]
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2}
    assert levels == {"mIoU of the untrained model: 30.0 %": 0.3, "mIoU of the classifier: 22.0 %": 0.22}
    marks = [mark for mark in axes.collections if "best checkpoint" in mark.get_label()]
    assert marks[0].get_offsets().tolist() == [[20, 0.25]]


def test_a_high_score_stays_inside_the_axes():
    for miou in (0.001, 0.35, 0.999):
        line = eval_line(10, miou) | {"pixel_accuracy": miou, "mean_accuracy": None}
        bottom, top = score_figure([line]).axes[0].get_ylim()
        assert bottom == 0 and miou <= top <= 1


def test_overlays_of_thin_images_are_no_giants():
    samples = []
    for size in ((1000, 1), (2, 3000)):
        labels = np.zeros(size, np.uint8)
        samples.append(Sample("thin", np.zeros((*size, 3), np.uint8), labels, labels))
    figure = overlay_figure(samples, ClassList(("a", "b"), make_palette(2)))
    assert figure.get_figheight() < 20
    assert all(max(image.get_array().shape) <= 4096 for axes in figure.axes for image in axes.images)


def test_confusion_is_normalised_by_row_and_absent_classes_are_grey():
    counts = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 1, 2]])
    figure = confusion_figure(counts, ["a", "b", "c"])
    shown = figure.axes[0].images[0].get_array()
    assert np.allclose(shown[[0, 2]], [[0.8, 0.2, 0], [0.25, 0.25, 0.5]]) and shown.mask[1].all()
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in figure.axes[0].texts}
    assert texts == {(0, 0): "80", (0, 1): "20", (2, 0): "25", (2, 1): "25", (2, 2): "50"}
    assert figure.axes[0].get_ylabel() == "annotated class"  # rows


def test_confusion_leaves_out_classes_that_occur_nowhere():
    counts = torch.zeros(150, 150, dtype=torch.int64)
    counts[3, 3], counts[3, 70], counts[9, 3] = 6, 2, 1  # 70 is predicted alone
    figure = confusion_figure(counts, [str(i) for i in range(150)])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3", "9", "70"]
    assert np.allclose(axes.images[0].get_array()[0], [0.75, 0, 0.25])
    assert "left out: 147" in axes.get_title()
    drawn(figure)
    assert len(confusion_figure(torch.zeros(3, 3, dtype=torch.int64), "abc").axes[0].get_yticklabels()) == 3


@pytest.mark.parametrize("count", [2, 3, 12, 16, 26, 60, 150])
def test_confusion_labels_do_not_overlap(count):
    names = list(load_classes("ade20k").names[:count])
    figure = confusion_figure(torch.eye(count, dtype=torch.int64), names)
    axes, canvas = figure.axes[0], drawn(figure)
    assert len(axes.get_xticklabels()) == len(axes.get_yticklabels()) == count
    assert overlapping(canvas, axes.get_xticklabels()) == overlapping(canvas, axes.get_yticklabels()) == 0
    frame = figure.bbox
    bar = axes.child_axes[0].get_yticklabels()
    assert "100%" in [text.get_text() for text in bar]
    labels = [axes.title, axes.xaxis.label, axes.yaxis.label]
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels(), *bar, *labels]:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= frame.x0 and box.y0 >= frame.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1


def sample(num_classes=5, height=40, width=60):
    g = np.random.default_rng(0)
    image = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = np.tile(np.arange(width) * num_classes // width, (height, 1)).astype(np.uint8)
    target[:4] = 255
    return Sample("street", image, target, np.roll(target, 3, 1))


def test_overlays_and_their_legend_share_colours():
    classes = ClassList(tuple("abcde"), make_palette(5))
    one = sample()
    figure = overlay_figure([one], classes)
    pictures = [axes.images[0].get_array() for axes in figure.axes[:4]]
    factor = pictures[0].shape[0] // one.image.shape[0]
    image, target, labels = enlarged(factor, one.image, one.target, one.labels)
    assert np.array_equal(pictures[0], image)
    assert np.array_equal(pictures[1], overlay(image, target, classes.palette, 0.7))
    assert np.array_equal(pictures[2], overlay(image, labels, classes.palette, 0.7))
    known = one.target != 255
    share = 100 * (one.target != one.labels)[known].mean()
    assert 0 < share < 100 and [axes.get_title(loc="left") for axes in figure.axes[:4]] == [
        "street",
        "ground truth",
        "prediction",
        f"wrong: {share:.1f} % of the labelled pixels",
    ]
    legend = figure.axes[4].get_legend()
    shown = {
        text.get_text(): tuple(round(255 * v) for v in patch.get_facecolor()[:3])
        for text, patch in zip(legend.get_texts(), legend.get_patches())
    }
    assert {shown.pop("wrong"), shown.pop("unlabelled")} == {_WRONG, _UNLABELLED}
    assert shown == {name: tuple(colour) for name, colour in zip("abcde", classes.palette.tolist())}


def test_the_error_map_is_red_where_wrong_alone():
    one = sample()
    known = one.target != 255
    shown = error_map(one.image, one.target, one.labels, known).astype(int)
    red = shown[..., 0] - shown[..., 1] > 60
    assert np.array_equal(red, known & (one.target != one.labels))
    right = known & (one.target == one.labels)
    assert (np.ptp(shown[right], axis=-1) == 0).all()  # grey
    assert (
        np.ptp(shown[~known], axis=-1) > 0
    ).all()  # neither, and no class's colour: the same hue everywhere
    assert (shown[~known][:, 2] > shown[~known][:, 0]).all()


def test_enlarging_keeps_labels_and_brightness():
    one = sample()
    image, target = enlarged(3, one.image, one.target)
    assert image.shape == (120, 180, 3) and np.array_equal(target[1::3, 1::3], one.target)
    assert np.array_equal(target[::3, 2::3], one.target)
    assert image.mean() == pytest.approx(one.image.mean(), abs=1)
    assert enlarged(1, one.image)[0] is one.image


def test_the_legend_of_many_classes_is_cut():
    names = tuple(f"class {i}" for i in range(60))
    one = sample(60, 60, 120)
    legend = overlay_figure([one, one], ClassList(names, make_palette(60))).axes[8].get_legend()
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == 27 and shown[24:] == ["and 36 more", "wrong", "unlabelled"]


def test_plot_run_writes_what_there_is_material_for(tmp_path):
    lines = [*train_lines(3), {"kind": "train", "step": 40, "loss": None}, eval_line(30, 0.4)]
    cut_short = '{"kind": "train", "st'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + cut_short)
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png", "miou.png"]
    metrics = SegmentationMetrics(5)
    metrics.confusion.add_(torch.eye(5, dtype=torch.int64))
    classes = ClassList(tuple("abcde"), make_palette(5))
    written = plot_run(tmp_path, metrics=metrics, samples=[sample()], classes=classes)
    assert [p.name for p in written] == ["loss.png", "miou.png", "confusion.png", "overlays.png"]
    for path in written:
        pixels = np.array(Image.open(path).convert("L"))
        assert path.parent == tmp_path / "plots" and min(pixels.shape) > 250 and pixels.std() > 5


def test_plot_run_of_an_empty_folder_writes_nothing(tmp_path):
    assert plot_run(tmp_path, metrics=SegmentationMetrics(3)) == []


class Stripes:
    """Seven images; image i is of brightness 30 i."""

    names = tuple(f"image {i}" for i in range(7))

    def __len__(self):
        return 7

    def read(self, i):
        return torch.full((3, 16, 20), 30 * i, dtype=torch.uint8), torch.zeros(16, 20, dtype=torch.uint8)


class Brightness(nn.Module):
    mean, std, patch_size = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 4

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def padded_size(self, height, width):
        return height, width

    def forward(self, images):
        x = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        return torch.cat([x * 0 + 0.3 + self.bias, x], 1)


def test_samples_are_spread_over_the_split():
    cfg = SimpleNamespace(
        mode="whole",
        resize=16,
        scales=[1.0],
        flip=False,
        multiscale_scales=[1.0],
        batch_windows=1,
        strip_rows=16,
    )
    samples = collect_samples(Brightness(), Stripes(), cfg, 3)
    assert [s.name for s in samples] == ["image 0", "image 2", "image 4"]
    assert [int(s.labels.max()) for s in samples] == [0, 0, 1]
    assert samples[2].image.shape == (16, 20, 3) and (samples[2].image == 120).all()
    assert len(collect_samples(Brightness(), Stripes(), cfg, 100)) == 7
