"""check-data: counts, every bad file by name, and what looks like a mistake."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_folder import classes, folder, png

from train.ade20k import SegmentationFolder, exif_orientation, load_classes, read_image
from train.check_data import check_data
from train.errors import UserError
from train.run import main


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_counts(folder, classes, workers):
    report = check_data(folder, classes, workers=workers)
    assert report.exit_status == 0 and report.problems == []
    for split in report.splits:
        stored = np.stack([np.array(Image.open(p)) for p in (folder / "annotations" / split.split).iterdir()])
        assert (split.images, split.annotations) == (3, 3)
        assert split.pixels.tolist() == [int((stored == c).sum()) for c in (1, 2, 3)]
        assert split.ignored == (stored == 0).sum()
        assert split.images_with.tolist() == [3, 3, 3]
        assert split.smallest == split.largest == (20, 30)
    assert "no bad file" in report.text() and "wall" in report.text() and "never occur" not in report.text()


def test_check_data_names_every_bad_file(folder, classes):
    images, annotations = folder / "images" / "training", folder / "annotations" / "training"
    for name in "defg":
        (images / f"{name}.jpg").write_bytes((images / "a.jpg").read_bytes())
        (annotations / f"{name}.png").write_bytes((annotations / "a.png").read_bytes())
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:200])
    png(np.zeros((3, 3), np.uint8), annotations / "c.png")
    png(np.full((20, 30), 9, np.uint8), annotations / "d.png")
    (annotations / "e.png").write_bytes(b"")
    (annotations / "f.png").unlink()
    (images / "g.jpg").unlink()
    report = check_data(folder, classes)
    bad = sorted(Path(problem.split(": ")[0]).name for problem in report.problems)
    assert bad == ["b.jpg", "c.png", "d.png", "e.png", "f.jpg", "g.png"]
    assert report.exit_status == 1
    text = report.text()
    assert all(problem in text for problem in report.problems)
    assert "training: 6 images, 6 annotations, 6 bad files" in text
    good = np.stack([np.array(Image.open(annotations / "a.png"))])
    assert report.splits[0].pixels.tolist() == [int((good == c).sum()) for c in (1, 2, 3)]


def test_a_bad_label_takes_nothing_from_a_files_other_labels(folder, classes):
    annotations = folder / "annotations" / "training"
    for path in (folder / "annotations").rglob("*.png"):
        png(np.array(Image.open(path)) % 3, path)
    mixed = np.full((20, 30), 9, np.uint8)
    mixed[0] = [0] * 10 + [255] * 5 + [3] * 15
    png(mixed, annotations / "b.png")
    report = check_data(folder, classes)
    assert [Path(problem.split(": ")[0]).name for problem in report.problems] == ["b.png"]
    stored = np.stack([np.array(Image.open(path)) for path in annotations.iterdir()])
    split = report.splits[0]
    assert split.pixels.tolist() == [int((stored == c).sum()) for c in (1, 2, 3)]
    assert split.images_with.tolist() == [2, 2, 1] and split.ignored == np.isin(stored, (0, 255)).sum()
    assert split.smallest == (20, 30) and "never occur" not in report.text()
    for path in annotations.iterdir():
        png(mixed * (mixed != 3), path)
    assert len(check_data(folder, classes, ("training",)).problems) == 3  # and not that nothing is labelled


def turned(path: Path, orientation: int, size: tuple[int, int] = (30, 20)) -> np.ndarray:
    """A JPEG of this stored size (width, height) with EXIF's word on how to turn it; its pixels as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("decoder", ["torchvision", "PIL"])
def test_exif_orientation_turns_nothing_and_is_told(decoder, folder, classes, monkeypatch):
    from train import ade20k

    if decoder == "PIL":
        monkeypatch.setattr(ade20k, "decode_jpeg", None)
    images = folder / "images" / "training"
    stored = turned(images / "a.jpg", 3)
    turned(images / "b.jpg", 1)
    turned(images / "c.jpg", 6)
    assert [exif_orientation(images / f"{name}.jpg") for name in "abc"] == [3, 1, 6]
    image, target = SegmentationFolder(folder, "training", classes).read(0)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - stored)
    assert difference.max() <= 2 and target.shape == (20, 30)  # two JPEG decoders may round differently
    report = check_data(folder, classes)
    assert report.problems == [] and report.exit_status == 0
    warned = [line for line in report.text().splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warned] == [str(images / "a.jpg"), str(images / "c.jpg")]
    assert "EXIF orientation 3 is not applied" in warned[0] and "EXIF orientation 6" in warned[1]


def test_annotation_of_the_turned_image_is_told_apart(folder, classes):
    turned(folder / "images" / "training" / "a.jpg", 8, (20, 30))
    with pytest.raises(
        UserError, match=r"30 x 20 pixels, but .* 20 x 30; it fits the image turned by its EXIF"
    ):
        SegmentationFolder(folder, "training", classes).read(0)
    turned(folder / "images" / "training" / "a.jpg", 1, (20, 30))
    with pytest.raises(UserError, match=r"has 20 x 30$"):
        SegmentationFolder(folder, "training", classes).read(0)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe1\x00\x10Exif", b"no image"])
def test_unreadable_exif_is_none(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    assert exif_orientation(tmp_path / "a.jpg") == 1
    turned(tmp_path / "a.jpg", 77)
    assert exif_orientation(tmp_path / "a.jpg") == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_pil_takes_are_a_bad_file(folder, classes, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    report = check_data(folder, classes, ("training",))
    assert len(report.problems) == report.splits[0].images
    assert all(
        "cannot be read as a PNG annotation (more than the 200 pixels" in problem
        for problem in report.problems
    )
    assert exif_orientation(folder / "images" / "training" / "a.jpg") == 1
    with pytest.raises(UserError, match="cannot be read as a PNG annotation"):
        SegmentationFolder(folder, "training", classes, cache=tmp_path / "cache")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as a JPEG or PNG image"):
        read_image(tmp_path / "a.png")


def test_check_data_counts_wide_labels(tmp_path):
    (tmp_path / "many.txt").write_text("\n".join(f"class {i}" for i in range(300)))
    png(np.array([[0, 1, 300], [300, 256, 0]], np.uint16), tmp_path / "annotations" / "training" / "a.png")
    png(np.zeros((2, 3, 3), np.uint8), tmp_path / "images" / "training" / "a.png")
    report = check_data(tmp_path, load_classes(tmp_path / "many.txt"), ("training",))
    split = report.splits[0]
    assert split.ignored == 2 and split.pixels.sum() == 4
    assert (split.pixels[0], split.pixels[255], split.pixels[299]) == (1, 1, 2)
    assert "297 of 300 classes never occur" in report.text()


def test_check_data_command(folder, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("wall\nfloor\nchair\n")
    png(np.full((20, 30), 4, np.uint8), folder / "annotations" / "training" / "a.png")
    options = [
        "--data.root",
        str(folder),
        "--data.classes",
        str(tmp_path / "names.txt"),
        "--data.workers",
        "0",
    ]
    assert main(["check-data", *options]) == 1
    out = capsys.readouterr().out
    assert "a.png: label 4 on 600 pixels" in out
    assert "training: 3 images, 3 annotations, 1 bad file\n" in out and out.endswith("\n1 bad file\n")


def test_check_data_hints_at_labels_that_start_at_0(folder, classes):
    hint = "--data.reduce_zero_label false"
    assert hint not in check_data(folder, classes).text()  # 0..3
    for path in (folder / "annotations").rglob("*.png"):
        png(np.array(Image.open(path)) % 3, path)  # 0..2, of three classes
    report = check_data(folder, classes)
    assert hint in report.text() and "2 chair" in report.text().partition("never occur: ")[2]
    assert report.exit_status == 0  # chairs may just be rare
    assert hint not in check_data(folder, classes, reduce_zero_label=False).text()
    for path in (folder / "annotations").rglob("*.png"):
        png(np.maximum(np.array(Image.open(path)), 1), path)  # nothing unlabelled
    assert hint not in check_data(folder, classes).text()


def test_check_data_table_of_many_classes_has_those_that_occur(tmp_path):
    names = [f"class number {i};with a synonym" for i in range(40)]
    (tmp_path / "many.csv").write_text("index,name\n" + "".join(f"{i},{n}\n" for i, n in enumerate(names)))
    png(np.array([[1, 40]], np.uint8), tmp_path / "annotations" / "training" / "a.png")
    png(np.zeros((1, 2, 3), np.uint8), tmp_path / "images" / "training" / "a.png")
    text = check_data(tmp_path, load_classes(tmp_path / "many.csv"), ("training",)).text()
    table, _, rest = text.partition("38 of 40 classes never occur: 1 class number 1, ")
    assert [line.split("%")[0].split() for line in table.splitlines() if "class number" in line] == [
        ["0", "class", "number", "0", "50.000"],
        ["39", "class", "number", "39", "50.000"],
    ]
    assert "and 30 more" in rest and "synonym" not in text


def test_check_data_starts_no_more_processes_than_cores(folder, classes, recwarn, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    seen, loader = [], torch.utils.data.DataLoader

    def noted(*arguments, **options):
        seen.append(options["num_workers"])
        return loader(*arguments, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", noted)
    assert check_data(folder, classes, workers=8).splits[0].images == 3
    assert seen == [1, 1] and not [w for w in recwarn if "worker" in str(w.message)]


def test_a_split_without_a_labelled_pixel_is_a_problem(tmp_path):
    for kind, pixels in (
        ("annotations", np.zeros((2, 3), np.uint8)),
        ("images", np.zeros((2, 3, 3), np.uint8)),
    ):
        png(pixels, tmp_path / kind / "training" / "a.png")
    report = check_data(tmp_path, load_classes("ade20k"), ("training",))
    assert report.exit_status == 1 and "no pixel is labelled" in report.problems[0]


def test_check_data_hints_at_masks_of_0_and_255(tmp_path):
    png(np.array([[0, 255, 255]], np.uint8), tmp_path / "annotations" / "training" / "a.png")
    png(np.zeros((1, 3, 3), np.uint8), tmp_path / "images" / "training" / "a.png")
    (tmp_path / "two.txt").write_text("background\nforeground")
    two = load_classes(tmp_path / "two.txt")
    said = check_data(tmp_path, two, ("training",), reduce_zero_label=False).text()
    assert "unlabelled pixels (255): 66.67%" in said and "write 1 in place of 255" in said
    png(
        np.zeros((1, 3, 3), np.uint8), tmp_path / "images" / "training" / "alone.png"
    )  # another fault hides nothing
    said = check_data(tmp_path, two, ("training",), reduce_zero_label=False).text()
    assert "has no annotation" in said and "write 1 in place of 255" in said
    (tmp_path / "images" / "training" / "alone.png").unlink()
    report = check_data(tmp_path, two, ("training",))
    assert "(0 or 255 everywhere)" in report.problems[0] and "in place of 255" not in report.text()
    png(np.array([[0, 255, 7]], np.uint8), tmp_path / "annotations" / "training" / "a.png")
    assert "in place" not in check_data(tmp_path, two, ("training",), reduce_zero_label=False).text()
    png(np.array([[0, 255, 1]], np.uint8), tmp_path / "annotations" / "training" / "a.png")
    assert "in place" not in check_data(tmp_path, two, ("training",), reduce_zero_label=False).text()


@pytest.mark.parametrize("named", [False, True])
def test_a_class_list_beside_the_data_that_is_not_taken_is_told(folder, named, capsys):
    own = folder / "classes.csv"
    own.write_text("0,wall\n1,floor\n2,door\n")
    main(["check-data", "--data.root", str(folder), *(["--data.classes", str(own)] if named else [])])
    word = f"warning: {own} is not used: data.classes is ade20k; --data.classes {own} takes it\n"
    assert capsys.readouterr().err == ("" if named else word)
