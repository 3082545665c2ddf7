"""The folder layout: class lists, annotations of every kind, and one clear error for every kind of bad file."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depict_kernels.ops import default_ignore_index
from train.ade20k import (
    SegmentationFolder,
    exif_orientation,
    load_classes,
    make_palette,
    read_image,
    read_labels,
    to_target,
)
from train.check_data import check_data
from train.errors import UserError
from train.run import main

SAMPLE = Path(__file__).parents[2] / "shared" / "ade20k_sample" / "ADEChallengeData2016"


def png(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("wall\nfloor\nchair\n")
    return load_classes(path)


@pytest.fixture
def folder(tmp_path):
    """Three images of 20 x 30 in both splits, with labels 0..3."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for split in ("training", "validation"):
        for name in "abc":
            image = root / "images" / split / f"{name}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(image)
            labels = rng.integers(0, 4, (20, 30), dtype=np.uint8)
            png(labels, root / "annotations" / split / f"{name}.png")
    return root


# ---------------------------------------------------------------------------------------- class lists


def test_built_in_classes():
    classes = load_classes("ade20k")
    assert classes.num_classes == 150
    assert (classes.names[0], classes.names[2], classes.names[149]) == ("wall", "sky", "flag")
    assert classes.palette.shape == (150, 3) and classes.palette.dtype == np.uint8
    assert classes.palette[0].tolist() == [120, 120, 120] and classes.palette[2].tolist() == [6, 230, 230]
    assert len({tuple(colour) for colour in classes.palette}) == 149  # the usual colours have one twice


def test_class_files_with_and_without_colours(tmp_path):
    (tmp_path / "a.csv").write_text('index,name,r,g,b\n0,road,1,2,3\n1,"car, parked",4,5,6\n')
    coloured = load_classes(tmp_path / "a.csv")
    assert coloured.names == ("road", "car, parked") and coloured.palette.tolist() == [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "b.csv").write_text("0,road\n1,car\n")
    (tmp_path / "c.txt").write_text("road\n\ncar\n")
    plain, text = load_classes(tmp_path / "b.csv"), load_classes(str(tmp_path / "c.txt"))
    assert plain.names == text.names == ("road", "car")
    assert np.array_equal(plain.palette, text.palette)


def test_made_palette_tells_classes_apart():
    palette = make_palette(60).astype(int)
    distance = np.abs(palette[:, None] - palette[None]).sum(-1) + 1000 * np.eye(60, dtype=int)
    assert distance.min() >= 10
    assert np.array_equal(make_palette(60), make_palette(60))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.csv", "0,road\n2,car\n", r"x\.csv, line 2: index '2', need 1"),
        ("x.csv", "index,name,r,g,b\n0,road,1,2\n", r"line 2: 4 columns"),
        ("x.csv", "0,road,1,2,300\n", r"line 1: colour 1,2,300"),
        ("x.csv", "0,road,1,2,3\n1,car\n", r"1 of 2 rows have a colour"),
        ("x.csv", "index,name\n", r"holds no class"),
        ("x.csv", "0,\n", r"class 0 has an empty name"),
        ("x.csv", "0,road,²,2,3\n", r"line 1: colour ²,2,3"),
        ("x.csv", '0,"road\n1,car\n', r"not valid CSV"),  # an open quote would swallow the rows below it
        ("x.csv", '0,"road\n1,car"\n1,bus\n', r"class 0 is called .*one line"),
        ("x.txt", "road\ncar\nroad\n", r"classes 0 and 2 are both called 'road'"),
        ("x.txt", None, r"no such file.*ade20k"),
    ],
)
def test_bad_class_list_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_classes(tmp_path / name)


# ------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "stored, num_classes, reduce, expected",
    [
        ([0, 1, 150], 150, True, [255, 0, 149]),
        ([0, 1, 149, 255], 150, False, [0, 1, 149, 255]),
        ([0, 1, 150, 255], 150, True, [255, 0, 149, 255]),
        ([0, 254, 255], 255, True, [255, 253, 254]),  # 255 is a class here
        ([0, 255], 256, False, [0, 255]),  # and here, where nothing 8-bit could say ignored
        ([0, 1, 255], 300, True, [-100, 0, 254]),
    ],
)
def test_targets_of_8_bit_annotations(stored, num_classes, reduce, expected):
    target = to_target(np.array([stored], np.uint8), num_classes, reduce)
    assert target.tolist() == [expected]
    assert target.dtype == (np.int32 if num_classes > 255 else np.uint8)


def test_targets_of_16_bit_annotations():
    stored = np.array([[0, 1, 256, 1000, 65535]], np.uint16)
    assert to_target(stored, 1000).tolist() == [[-100, 0, 255, 999, -100]]
    assert default_ignore_index(1000) == -100 and default_ignore_index(255) == 255
    few = to_target(np.array([[0, 3, 65535]], np.uint16), 3)
    assert few.tolist() == [[255, 2, 255]] and few.dtype == np.uint8


@pytest.mark.parametrize("num_classes, reduce, bad", [(150, True, 151), (150, False, 150), (254, True, None)])
def test_label_out_of_range(num_classes, reduce, bad):
    labels = np.zeros((4, 4), np.uint8)
    labels[1, 2:] = 255 if bad is None else bad
    if bad is None:  # the void label is no error
        assert to_target(labels, num_classes, reduce).tolist()[1] == [255] * 4
        return
    with pytest.raises(ValueError, match=f"label {bad} on 2 pixels: out of range") as error:
        to_target(labels, num_classes, reduce)
    assert ("data.reduce_zero_label true" in str(error.value)) == (not reduce)


def test_16_bit_folder_reads_through(tmp_path):
    names = tmp_path / "many.txt"
    names.write_text("\n".join(f"class {i}" for i in range(400)))
    labels = np.arange(12 * 10, dtype=np.uint16).reshape(12, 10) * 3
    png(labels, tmp_path / "annotations" / "training" / "a.png")
    png(np.zeros((12, 10, 3), np.uint8), tmp_path / "images" / "training" / "a.png")
    data = SegmentationFolder(tmp_path, "training", load_classes(names))
    _, target = data.read(0)
    assert target.dtype == torch.int32
    expected = torch.from_numpy(labels.astype(np.int32)) - 1
    expected[0, 0] = -100
    assert torch.equal(target, expected)


def test_palette_annotation_gives_indices(tmp_path):
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "p.png")
    assert np.array_equal(read_labels(tmp_path / "p.png"), labels)


# ------------------------------------------------------------------------------------------- reading


def test_read_equals_the_files(folder, classes):
    data = SegmentationFolder(folder, "training", classes)
    assert data.names == ["a", "b", "c"] and len(data) == 3
    image, target = data.read(1)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(data.image_path(1))))
    stored = np.array(Image.open(data.annotation_path(1)))
    assert np.array_equal(target.numpy(), np.where(stored == 0, 255, stored - 1))


def test_real_images_read_as_pil_reads_them():
    if not SAMPLE.is_dir():
        pytest.skip(f"{SAMPLE} is not there")
    data = SegmentationFolder(SAMPLE, "validation", load_classes("ade20k"))
    for i in range(len(data)):
        image, target = data.read(i)
        assert np.array_equal(
            image.permute(1, 2, 0).numpy(), np.array(Image.open(data.image_path(i)).convert("RGB"))
        )
        stored = np.array(Image.open(data.annotation_path(i)))
        assert np.array_equal(target.numpy(), (stored.astype(int) - 1) % 256)


def test_grey_jpeg_becomes_rgb(tmp_path):
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "g.jpg")
    assert np.array_equal(read_image(tmp_path / "g.jpg"), np.full((8, 8, 3), 77))


def test_truncated_jpeg_is_named(folder, classes):
    path = folder / "images" / "training" / "b.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    data = SegmentationFolder(folder, "training", classes)
    with pytest.raises(
        UserError, match=r"b\.jpg: cannot be read as a JPEG or PNG image \(.*truncated\)"
    ) as error:
        data.read(1)
    assert "\n" not in str(error.value) and ".cpp" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "jpeg", "empty"])
def test_damaged_annotation_is_named(folder, classes, damage):
    path = folder / "annotations" / "training" / "b.png"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-5]
    elif damage == "flipped":
        data[-20] ^= 4  # in the compressed pixels: torchvision's decoder crashes and PIL's may not notice
    elif damage == "jpeg":
        data = (folder / "images" / "training" / "b.jpg").read_bytes()
    else:
        data = b""
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"b\.png: cannot be read as a PNG annotation"):
        SegmentationFolder(folder, "training", classes).read(1)


def test_no_damaged_byte_of_a_png_goes_unnoticed(tmp_path):
    """Every single byte changed: an error, or the same pixels. Reading them must never give other labels."""
    labels = np.random.default_rng(1).integers(0, 3, (9, 9), dtype=np.uint8)
    whole = png(labels, tmp_path / "a.png").read_bytes()
    refused = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        (tmp_path / "b.png").write_bytes(data)
        try:
            assert np.array_equal(read_labels(tmp_path / "b.png"), labels)
        except UserError:
            refused += 1
    assert refused == len(whole)


def test_a_png_with_an_empty_chunk_of_right_checksum_is_named(tmp_path):
    """PIL reads past the end of such a colour profile and lets the IndexError through."""
    path = tmp_path / "empty.png"
    Image.new("L", (4, 4)).save(path)
    data, end = path.read_bytes(), b"\0\0\0\0IEND"
    profile = b"\0\0\0\0iCCP" + zlib.crc32(b"iCCP").to_bytes(4, "big")
    path.write_bytes(data.replace(end, profile + end))
    with pytest.raises(UserError, match=r"empty\.png"):
        read_image(path)


def test_rgb_annotation_is_refused(tmp_path):
    path = png(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: RGB of 8 bits, need one channel"):
        read_labels(path)


def test_annotation_of_another_size_is_named(folder, classes):
    png(np.zeros((20, 29), np.uint8), folder / "annotations" / "training" / "c.png")
    with pytest.raises(UserError, match=r"c\.png: 29 x 20 pixels, but its image c\.jpg has 30 x 20"):
        SegmentationFolder(folder, "training", classes).read(2)


def test_label_out_of_range_names_file_and_class_list(folder, classes):
    png(np.full((20, 30), 4, np.uint8), folder / "annotations" / "training" / "a.png")
    with pytest.raises(
        UserError, match=r"a\.png: label 4 on 600 pixels.*need 0 for unlabelled, 1\.\.3.*classes\.txt"
    ):
        SegmentationFolder(folder, "training", classes).read(0)


def test_missing_and_empty_folders(folder, classes, tmp_path):
    with pytest.raises(UserError, match="images/nowhere: no such folder"):
        SegmentationFolder(folder, "nowhere", classes)
    with pytest.raises(UserError, match="no such folder"):
        SegmentationFolder(tmp_path / "missing", "training", classes)
    for kind in ("images", "annotations"):
        (folder / kind / "empty").mkdir()
    with pytest.raises(UserError, match="images/empty: holds no image"):
        SegmentationFolder(folder, "empty", classes)


def test_image_without_annotation_is_named(folder, classes):
    (folder / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.jpg: has no annotation, expected .*b\.png"):
        SegmentationFolder(folder, "training", classes)


def test_two_images_of_one_stem(folder, classes):
    png(np.zeros((20, 30, 3), np.uint8), folder / "images" / "training" / "b.png")
    with pytest.raises(UserError, match=r"b\.png: b\.jpg has the same stem"):
        SegmentationFolder(folder, "training", classes)


# ---------------------------------------------------------------------------------------- check-data


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


def test_16_bit_grey_images_are_scaled_not_clipped(tmp_path):
    from train.predict import read_any_image

    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    png(grey, tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image[..., 0].tolist() == [[0, 1, 128, 255]] and np.ptp(image, axis=2).max() == 0
    assert np.array_equal(image, read_any_image(tmp_path / "a.png"))


@pytest.mark.parametrize("content, words", [(b"", "the file is empty"), (b"<html>", "its first bytes")])
def test_a_file_that_is_no_image_says_why(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jpg: cannot be read as a JPEG or PNG image \({words}"):
        read_image(tmp_path / "a.jpg")


def test_a_split_without_a_labelled_pixel_is_a_problem(tmp_path):
    for kind, pixels in (
        ("annotations", np.zeros((2, 3), np.uint8)),
        ("images", np.zeros((2, 3, 3), np.uint8)),
    ):
        png(pixels, tmp_path / kind / "training" / "a.png")
    report = check_data(tmp_path, load_classes("ade20k"), ("training",))
    assert report.exit_status == 1 and "no pixel is labelled" in report.problems[0]
