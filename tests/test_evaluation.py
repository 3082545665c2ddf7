"""Evaluation of a data set: every pixel counted once, errors of files, processes, comparison with the stock path."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from tiny_inference import TinyModel, picture, settings

from train import command_eval, inference
from train.ade20k import ClassList
from train.distributed import World
from train.errors import UserError
from train.inference import (
    Comparison,
    evaluate,
    predict_labels,
    prefetch,
    stock_scores,
)
from train.windows import NotFinite, window_masks


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
        scores = stock_scores(window_masks(model, image, cfg), tuple(target.shape))
        labels, valid = scores.argmax(0), target != 255
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
    comparison = Comparison()
    evaluate(TinyModel(), dataset, settings(), multiscale=multiscale, comparison=comparison)
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
    world, broken = World(torch.device("cpu"), rank, 2), TinyModel()
    try:
        if rank == 1:
            torch.nn.init.constant_(broken.head.weight, torch.nan)
        with pytest.raises(
            NotFinite, match="the model gives NaN or infinite masks"
        ):  # on both, and both go on
            evaluate(broken, Pictures(), settings(), world=world)
        metrics = evaluate(TinyModel(), Pictures(), settings(), world=world)
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


@pytest.mark.parametrize("name, words", [("", "is a folder"), ("none/x.json", "there is no folder")])
def test_an_output_that_cannot_be_written_is_refused_before_the_model(name, words, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was built")

    monkeypatch.setattr(command_eval, "open_run", refuse)
    with pytest.raises(UserError, match=words):
        command_eval.evaluate_run([str(tmp_path), "--output", str(tmp_path / name)])


@pytest.mark.parametrize(
    "arguments, held, words",
    [
        (["--output", "other"], "weights", r"other: exists and holds no results"),
        (
            ["--checkpoint", "elsewhere/last.pt"],
            '{"iou_per_class": {}, "checkpoint": "last"}',
            "results of checkpoint last",
        ),
        (["--checkpoint", "last"], '{"iou_per_class": {}}', "results of an unknown checkpoint, not last"),
    ],
    ids=["another file", "another checkpoint", "an unknown checkpoint"],
)
def test_nothing_but_own_results_is_overwritten(arguments, held, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_eval, "open_run", None)  # before the model is built
    for name in ("other", "results_last.json"):
        (tmp_path / name).write_text(held)
    with pytest.raises(UserError, match=words):
        command_eval.evaluate_run([".", *arguments])
    assert (tmp_path / "other").read_text() == held


def test_a_device_is_no_place_for_results(tmp_path):
    with pytest.raises(UserError, match="exists and holds no results"):
        command_eval.evaluate_run([str(tmp_path), "--output", "/dev/zero"])
