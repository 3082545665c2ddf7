"""The generated data set: what a class needs to be told, the same from the same seed, never over others' files."""

import errno
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from train import build, generated
from train.ade20k import SegmentationFolder, load_classes
from train.check_data import check_data
from train.config import load_config
from train.distributed import World
from train.errors import UserError
from train.generated import CLASSES, LABELS, generate, make_scene, pixel_baseline


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("made") / "generated", seed=0, train_images=240, val_images=40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fills_up_is_one_line(workers, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"images/training: cannot be written: No space left on device"):
        generate(tmp_path / "data", train_images=2, val_images=1, workers=workers)
    assert not list(tmp_path.iterdir())


def bytes_of(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_layout_and_labels_are_ade20ks(root):
    classes = load_classes(root / "classes.csv")
    assert classes.names == tuple(name for name, _ in CLASSES) and classes.num_classes >= 12
    report = check_data(root, classes, workers=0)
    assert report.exit_status == 0
    for split, count in zip(report.splits, (240, 40)):
        assert (split.images, split.annotations) == (count, count)
        assert split.smallest == split.largest == (128, 128)
        assert (split.images_with >= 0.05 * count).all(), "a class is too rare to be learnt"
        assert 0.005 < split.ignored / (split.ignored + split.pixels.sum()) < 0.15
    data = SegmentationFolder(root, "training", classes)
    assert (
        Image.open(data.image_path(0)).format == "JPEG"
        and Image.open(data.annotation_path(0)).format == "PNG"
    )


def test_colour_and_position_do_not_tell_the_classes(root):
    score = pixel_baseline(root)
    assert 0.08 < score < 0.30  # above chance, or the baseline itself would be broken


def test_baseline_solves_what_colour_and_position_tell(tmp_path):
    """A data set whose classes are colours, or halves of the image, is no problem for it."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.csv").write_text("0,red\n1,green above\n2,green below\n")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(6):
            red = rng.random((40, 40)) < 0.4
            image = np.where(red[..., None], [200, 30, 30], [30, 200, 30]) + rng.integers(
                -20, 20, (40, 40, 3)
            )
            labels = np.where(red, 1, np.where(np.arange(40)[:, None] < 20, 2, 3))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / split / f"{i}.png")
            Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "annotations" / split / f"{i}.png")
    assert pixel_baseline(tmp_path) > 0.97


def test_same_seed_same_bytes_however_many_processes(tmp_path):
    a = generate(tmp_path / "a", seed=4, train_images=5, val_images=3, size=(64, 80), workers=0)
    b = generate(tmp_path / "b", seed=4, train_images=5, val_images=3, size=(64, 80), workers=2)
    c = generate(tmp_path / "c", seed=5, train_images=5, val_images=3, size=(64, 80), workers=0)
    assert bytes_of(a) == bytes_of(b)
    assert bytes_of(a).keys() == bytes_of(c).keys() and bytes_of(a) != bytes_of(c)
    names = [p for p in bytes_of(a) if p.suffix == ".jpg"]
    assert len({bytes_of(a)[p] for p in names}) == len(names) == 8  # no scene twice, in no split


def test_it_is_made_once_and_again_when_asked_for_another(tmp_path):
    options = {"train_images": 3, "val_images": 2, "size": (48, 48), "workers": 0}
    root = generate(tmp_path / "a", seed=1, **options)
    marker = root / "images" / "training" / "scene_000000.jpg"
    before = marker.stat().st_mtime_ns
    generate(root, seed=1, **options)
    assert marker.stat().st_mtime_ns == before
    first = marker.read_bytes()
    generate(root, seed=2, **options)
    assert marker.read_bytes() != first and json.loads((root / "generated.json").read_text())["seed"] == 2
    generate(root, seed=2, **{**options, "train_images": 2})
    assert len(list((root / "images" / "training").iterdir())) == 2
    (root / "generated.json").write_text("{")
    generate(root, seed=1, **options)
    assert marker.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_settings_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "GENERATED", tmp_path / "generated")
    made = []
    monkeypatch.setattr("train.generated.generate", lambda root, *_, **__: made.append(root))
    for key, value in (
        (None, None),
        ("seed", 1),
        ("height", 32),
        ("width", 32),
        ("val_images", 2),
        ("seed", 1),
    ):
        config = load_config([], {"data.root": None} | ({f"data.generate.{key}": value} if key else {}))
        assert build.data_root(config, World(torch.device("cpu"))) == made[-1]
    assert made[0] == tmp_path / "generated" and made[5] == made[1] and len(set(made)) == 5
    assert all(re.fullmatch("generated-[0-9a-f]{8}", root.name) for root in made[1:])


def test_what_another_process_made_meanwhile_stays(tmp_path, monkeypatch):
    options = {"seed": 1, "train_images": 2, "val_images": 1, "size": (48, 48), "workers": 0}
    other, each_sample = generate(tmp_path / "b", **options), generated.each_sample
    made = (other / "classes.csv").stat()

    def meanwhile(*arguments):
        if other.exists():
            other.rename(tmp_path / "a")
        return each_sample(*arguments)

    monkeypatch.setattr(generated, "each_sample", meanwhile)
    generate(tmp_path / "a", **options)
    assert (tmp_path / "a" / "classes.csv").stat().st_ino == made.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_files_are_never_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files that were not generated here"):
        generate(tmp_path, train_images=1, val_images=1)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (200, 90)])
def test_any_size_gives_whole_scenes(size):
    seen = set()
    for i in range(40):
        image, labels = make_scene(*size, np.random.default_rng(i))
        assert image.shape == (*size, 3) and image.dtype == labels.dtype == np.uint8 and labels.shape == size
        assert labels[0].max() > 0  # the sky reaches the top
        seen |= set(np.unique(labels))
    assert seen == set(range(len(CLASSES) + 1))


def scenes(count: int = 60):
    return [make_scene(128, 128, np.random.default_rng([9, i])) for i in range(count)]


def test_ball_and_balloon_differ_by_position_only():
    """The same colours; balloons lie above."""
    balls, balloons = [], []
    for image, labels in scenes(80):
        for name, found in (("ball", balls), ("balloon", balloons)):
            rows, _ = np.nonzero(labels == LABELS[name])
            if len(rows) > 100:
                found.append((rows.mean(), *image[labels == LABELS[name]].mean(0)))
    balls, balloons = np.array(balls), np.array(balloons)
    assert np.median(balloons[:, 0]) + 40 < np.median(balls[:, 0])
    assert np.abs(balls[:, 1:].mean(0) - balloons[:, 1:].mean(0)).max() < 35


def test_signs_differ_by_colour():
    for name, channel in (("stop sign", 0), ("info sign", 2)):
        means = [
            image[labels == LABELS[name]].mean(0)
            for image, labels in scenes()
            if (labels == LABELS[name]).any()
        ]
        assert np.mean([mean.argmax() == channel for mean in means]) > 0.95
        assert len(means) > 5
