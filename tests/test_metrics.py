"""The confusion matrix and the scores formed from it."""

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from train.metrics import SegmentationMetrics, iou_lines


def loop_scores(labels, target, num_classes, ignore):
    """The benchmark's definitions, class by class, in plain Python."""
    pairs = [(t, y) for t, y in zip(target.flatten().tolist(), labels.flatten().tolist()) if t != ignore]
    iou, accuracy = {}, []
    for c in range(num_classes):
        both = sum(t == c and y == c for t, y in pairs)
        either = sum(t == c or y == c for t, y in pairs)
        truth = sum(t == c for t, _ in pairs)
        iou[c] = both / either if either else None
        if truth:
            accuracy.append(both / truth)
    known = [v for v in iou.values() if v is not None]
    hits = sum(t == y for t, y in pairs)
    return sum(known) / len(known), hits / len(pairs), sum(accuracy) / len(accuracy), iou


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_scores_follow_the_definitions(dtype):
    g = torch.Generator().manual_seed(0)
    num_classes = 7  # class 5 occurs nowhere, class 6 is only predicted, class 4 is never predicted
    target = torch.randint(0, 5, (3, 20, 30), generator=g)
    labels = torch.where(torch.rand(target.shape, generator=g) < 0.6, target, 6)
    labels[labels == 4] = 0
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    metrics = SegmentationMetrics(num_classes)
    for y, t in zip(labels, target):  # streamed, image by image
        metrics.update(y.to(dtype), t.to(dtype))
    miou, pixel, mean, iou = loop_scores(labels, target, num_classes, 255)
    got = metrics.results()
    assert got["miou"] == pytest.approx(miou, rel=1e-12)
    assert got["pixel_accuracy"] == pytest.approx(pixel, rel=1e-12)
    assert got["mean_accuracy"] == pytest.approx(mean, rel=1e-12)
    assert (
        got["iou_per_class"]["5"] is None
        and got["iou_per_class"]["6"] == 0
        and got["iou_per_class"]["4"] == 0
    )
    for c in range(num_classes):
        assert got["iou_per_class"][str(c)] == (None if iou[c] is None else pytest.approx(iou[c], rel=1e-12))
    jaccard = MulticlassJaccardIndex(num_classes, ignore_index=255)
    assert got["miou"] == pytest.approx(jaccard(labels, target).item(), rel=1e-6)


def test_ignored_pixels_count_on_neither_side():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, 1, 1]), torch.tensor([0, 255, 1]))
    assert metrics.confusion.tolist() == [[1, 0], [0, 1]]


def test_above_255_classes_255_is_a_class():
    metrics = SegmentationMetrics(300)
    metrics.update(torch.tensor([255, 7], dtype=torch.int32), torch.tensor([255, -100], dtype=torch.int32))
    assert metrics.confusion[255, 255] == 1 and metrics.confusion.sum() == 1


def test_counts_above_two_to_the_31_stay_exact():
    metrics = SegmentationMetrics(2)
    metrics.confusion.add_(torch.tensor([[2**40 + 1, 2**40], [0, 3]]))
    metrics.update(torch.tensor([0]), torch.tensor([0]))
    assert metrics.confusion[0, 0].item() == 2**40 + 2
    assert metrics.results()["iou_per_class"]["0"] == (2**40 + 2) / (2**41 + 2)


def test_nothing_valid_gives_null_not_nan():
    metrics = SegmentationMetrics(3, ["a", "b", "c"])
    metrics.update(torch.zeros(4, dtype=torch.uint8), torch.full((4,), 255, dtype=torch.uint8))
    assert metrics.results() == {
        "miou": None,
        "pixel_accuracy": None,
        "mean_accuracy": None,
        "iou_per_class": {"a": None, "b": None, "c": None},
    }


@pytest.mark.parametrize("value", [150, 254, -1])
def test_target_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=f"target value {value} .*0..149.*255"):
        SegmentationMetrics(150).update(torch.zeros(3), torch.tensor([0, value, 255]))


def test_wrong_shapes_are_refused():
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        SegmentationMetrics(3, ["a", "b"])


def test_console_lines_have_all_classes_or_the_lowest():
    results = {"iou_per_class": {"sky": 0.5, "door": None, "wall": 0.25}}
    absent = "    neither annotated nor predicted: door"
    assert iou_lines(results) == ["  IoU of each class", "    0.5000  sky", "    0.2500  wall", absent]
    assert iou_lines(results, most=1) == ["  IoU of the lowest 1 of 2 classes", "    0.2500  wall", absent]
