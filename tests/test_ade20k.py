"""The folder layout: class lists, annotations of every kind, and one clear error for every kind of bad file."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_folder import classes, folder, png

from depict_kernels.ops import default_ignore_index
from train.ade20k import (
    SegmentationFolder,
    load_classes,
    make_palette,
    read_image,
    read_labels,
    to_target,
)
from train.errors import UserError

SAMPLE = Path(__file__).parents[2] / "shared" / "ade20k_sample" / "ADEChallengeData2016"


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
    with pytest.raises(
        UserError, match=f"elsewhere/images/training: no such folder in {Path.cwd()}; .*data.root"
    ):
        SegmentationFolder("elsewhere", "training", classes)
    with pytest.raises(UserError, match="images/nowhere: no such folder;"):
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
