"""Label PNGs and overlays of a folder of images."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from train.ade20k import ClassList, load_classes, read_labels, to_target
from train.distributed import World
from train.errors import UserError
from train.inference import predict_labels
from train.predict import (
    classes_by_area,
    draw_overlay,
    encode_labels,
    find_images,
    output_names,
    overlay,
    predict_folder,
    read_any_image,
    short_name,
)

CFG = SimpleNamespace(
    mode="whole", resize=16, scales=[1.0], flip=False, multiscale_scales=[1.0], batch_windows=1, strip_rows=16
)
CLASSES = ClassList(
    ("red", "green", "blue"), np.array([[250, 10, 20], [30, 240, 40], [50, 60, 230]], np.uint8)
)


class BrightestChannel(nn.Module):
    """Labels every 4 x 4 patch by its strongest colour."""

    patch_size, mean, std = 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def padded_size(self, height, width):
        return -(-height // 4) * 4, -(-width // 4) * 4

    def forward(self, images):
        height, width = images.shape[-2:]
        padded = self.padded_size(height, width)
        images = nn.functional.pad(images, (0, padded[1] - width, 0, padded[0] - height))
        return self.scale * nn.functional.avg_pool2d(images, 4)


def test_processes_share_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    for name in "abcde":
        Image.fromarray(halves()).save(tmp_path / f"{name}.png")
    written = [
        run([tmp_path], tmp_path / "out", world=World(torch.device("cpu"), rank, 2)).written
        for rank in range(2)
    ]
    stems = [[path.stem for path in paths if "overlay" not in path.stem] for paths in written]
    assert stems == [["a", "c", "e"], ["b", "d"]]


def halves(height=16, width=24):
    """Red at the left, blue at the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0] = image[:, width // 2 :, 2] = 200
    return image


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)
    return path


def run(paths, output, **options):
    return predict_folder(BrightestChannel(), paths, CLASSES, CFG, output, **options)


def test_labels_are_stored_as_annotations_and_the_overlay_beside_them(tmp_path):
    save(halves(), tmp_path / "a.png")
    report = run([tmp_path], tmp_path / "out")
    assert report.exit_status == 0
    assert report.written == [tmp_path / "out/a.png", tmp_path / "out/a_overlay.png"]
    stored = read_labels(tmp_path / "out/a.png")
    assert stored.dtype == np.uint8 and set(np.unique(stored)) == {1, 3}
    expected = predict_labels(BrightestChannel(), torch.from_numpy(halves()).permute(2, 0, 1), CFG)
    assert np.array_equal(to_target(stored, 3), expected.numpy())
    assert (stored[:, :10] == 1).all() and (stored[:, 14:] == 3).all()
    assert Image.open(tmp_path / "out/a_overlay.png").width > 24
    assert not list(tmp_path.glob("out/.*"))  # no temporary files left


def test_without_reduce_zero_label_the_values_are_the_classes(tmp_path):
    save(halves(), tmp_path / "a.png")
    run([tmp_path / "a.png"], tmp_path / "out", reduce_zero_label=False)
    assert set(np.unique(read_labels(tmp_path / "out/a.png"))) == {0, 2}


@pytest.mark.parametrize("num_classes, dtype", [(150, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_encoding_survives_the_way_back(tmp_path, num_classes, dtype):
    labels = np.arange(num_classes, dtype=np.int32).reshape(1, -1)
    encode_labels(labels, num_classes).save(tmp_path / "x.png")
    stored = read_labels(tmp_path / "x.png")
    assert stored.dtype == dtype
    assert np.array_equal(to_target(stored, num_classes), labels)


def formats(folder: Path) -> dict[str, Path]:
    """The same red | blue (or dark | bright) picture in every way that people store one."""
    rgb, grey = Image.fromarray(halves()), Image.fromarray(halves()).convert("L")
    files = {
        "jpg": (rgb, "a.jpg", {"quality": 95}),
        "jpeg": (rgb, "b.JPEG", {}),
        "png": (rgb, "c.png", {}),
        "rgba": (rgb.convert("RGBA"), "d.png", {}),
        "palette": (rgb.convert("P", palette=Image.Palette.ADAPTIVE), "e.png", {}),
        "grey": (grey, "f.png", {}),
        "grey and alpha": (grey.convert("LA"), "g.png", {}),
        "16 bits": (Image.fromarray(np.array(grey).astype(np.uint16) * 257), "h.png", {}),
        "cmyk": (rgb.convert("CMYK"), "i.jpg", {"quality": 95}),
        "one bit": (grey.point(lambda v: 255 * (v > 40)).convert("1"), "j.png", {}),
    }
    for picture, name, options in files.values():
        picture.save(folder / name, **options)
    return {kind: folder / name for kind, (_, name, _) in files.items()}


def test_every_kind_of_image_is_read(tmp_path):
    grey = np.array(Image.fromarray(halves()).convert("L"))
    for kind, path in formats(tmp_path).items():
        got = read_any_image(path).astype(int)
        assert got.shape == (16, 24, 3), kind
        if kind in ("jpg", "jpeg", "png", "rgba", "palette", "cmyk"):
            assert np.abs(got[:, [2, 20]] - halves()[:, [2, 20]]).max() < 12, kind
        elif kind != "one bit":
            assert np.array_equal(got, np.repeat(grey[..., None], 3, 2)), kind
        else:
            assert (got[:, 2] == 255).all() and (got[:, 20] == 0).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for viewing
    save(halves(), tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_any_image(tmp_path / "a.jpg")
    assert image.shape == (24, 16, 3)
    assert image[2, 8, 0] > 150 and image[20, 8, 2] > 150  # left became top


def test_one_bad_file_is_named_and_the_others_get_done(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = save(halves(200, 300), folder / "b.jpg")
    (folder / "a.jpg").write_bytes(whole.read_bytes()[:400])
    (folder / "c.png").write_text("no image")
    save(np.zeros((4, 4), np.float32), folder / "d.tiff")
    report = run([folder], tmp_path / "out")
    assert report.exit_status == 1
    assert [path.name for path, _ in report.failed] == ["a.jpg", "c.png", "d.tiff"]
    assert [path.name for path in report.written] == ["b.png", "b_overlay.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"error: {folder}") for line in lines)
    assert (
        "truncated" in lines[0].lower()
        and "cannot be read as an image" in lines[1]
        and "floating" in lines[2]
    )


def test_an_input_is_never_overwritten(tmp_path):
    save(halves(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png is an input and would be overwritten"):
        run([tmp_path], tmp_path)
    with pytest.raises(UserError, match=r"a\.png: is a file; name a folder"):
        run([tmp_path / "a.png"], tmp_path / "a.png")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="would be overwritten"):
        run([tmp_path / "a.png"], tmp_path / "link")
    assert (tmp_path / "a.png").read_bytes() == before


def test_what_is_no_earlier_prediction_is_never_overwritten(tmp_path):
    save(halves(), tmp_path / "a.jpg")
    save(halves(), tmp_path / "b.jpg")
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    truth = save(halves()[..., 0], annotations / "b.png")
    before = truth.read_bytes()
    with pytest.raises(
        UserError, match=r"b\.png: may be no earlier prediction \(b_overlay\.png is not .*--output"
    ):
        run([tmp_path], annotations)
    assert list(annotations.iterdir()) == [truth] and truth.read_bytes() == before
    for _ in range(2):  # the second time over the first
        assert run([tmp_path], tmp_path / "out").exit_status == 0


def test_an_image_that_is_too_large_for_the_memory_stops_no_other(tmp_path, monkeypatch, capsys):
    for name in "abcd":
        save(halves(), tmp_path / f"{name}.png")
    errors = [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ]
    monkeypatch.setattr(
        "train.predict.predict_labels",
        lambda *_, **__: raise_next(errors) if errors else torch.zeros(16, 24, dtype=torch.uint8),
    )
    report = run([tmp_path], tmp_path / "out")
    assert [path.name for path, _ in report.failed] == ["a.png", "b.png", "c.png"] and report.exit_status == 1
    assert [path.name for path in report.written] == ["d.png", "d_overlay.png"]
    assert capsys.readouterr().err.count("not enough memory for this image") == 3
    errors.append(RuntimeError("a fault of the program"))
    with pytest.raises(RuntimeError, match="a fault"):
        run([tmp_path], tmp_path / "out")


def raise_next(errors):
    raise errors.pop(0)


def test_images_of_one_stem_keep_apart(tmp_path):
    assert output_names([Path("a.jpg"), Path("a.png"), Path("b.png")]) == ["a.jpg", "a.png", "b"]
    with pytest.raises(UserError, match=r"x/a\.jpg and y/a\.jpg"):
        output_names([Path("x/a.jpg"), Path("y/a.jpg")])
    # whose overlay and whose labels would be one file
    assert output_names([Path("a.jpg"), Path("a_overlay.png")]) == ["a.jpg", "a_overlay.png"]
    with pytest.raises(
        UserError, match=r"a\.png and a\.png_overlay\.jpg .* a\.png_overlay\.png: predict them apart"
    ):
        output_names([Path("a.jpg"), Path("a.png"), Path("a.png_overlay.jpg")])
    save(halves(), tmp_path / "a.jpg")
    save(halves(), tmp_path / "a.png")
    run([tmp_path], tmp_path / "out")
    names = ["a.jpg.png", "a.jpg_overlay.png", "a.png.png", "a.png_overlay.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def test_find_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "._a.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "sub.jpg").mkdir()
    assert [p.name for p in find_images([tmp_path])] == ["a.jpg", "b.PNG"]
    assert find_images([tmp_path / "a.jpg", tmp_path]) == [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    with pytest.raises(UserError, match="missing: no such file"):
        find_images([tmp_path / "missing"])
    with pytest.raises(UserError, match="no images in this folder"):
        find_images([tmp_path / "sub.jpg"])
    with pytest.raises(UserError, match="no images given"):
        find_images([])


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    save(halves(), tmp_path / "a.png")

    def write_some(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", write_some)
    report = run([tmp_path], tmp_path / "out")
    assert report.exit_status == 1 and "No space left" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


# ------------------------------------------------------------------------------------------- drawing


def test_overlay_has_the_legends_hue_and_leaves_ignored_pixels():
    image = np.full((6, 6, 3), 128, np.uint8)
    labels = np.zeros((6, 6), np.uint8)
    labels[:, 3:] = 255
    out = overlay(image, labels, CLASSES.palette)
    assert (out[:, 3:] == 128).all()
    assert not np.ptp(
        overlay(image * np.uint8([2, 1, 0]), labels, CLASSES.palette)[:, 3:], axis=-1
    ).any()  # grey
    inside = out[2, 0].astype(int)
    assert np.array_equal(inside, (0.6 * CLASSES.palette[0] + 0.4 * 128).round())


def test_legend_lists_classes_by_area_in_their_colours():
    labels = np.zeros((300, 300), np.uint8)
    labels[:, :200] = 2
    labels[:5] = 255
    assert classes_by_area(labels, 3) == [(2, pytest.approx(2 / 3)), (0, pytest.approx(1 / 3))]
    sheet = np.array(draw_overlay(np.zeros((300, 300, 3), np.uint8), labels, CLASSES))
    panel = sheet[:, 300:]
    rows = [np.flatnonzero((panel == colour).all(-1).any(1)) for colour in CLASSES.palette]
    assert len(rows[2]) and len(rows[0]) and rows[2].max() < rows[0].min() and not len(rows[1])


@pytest.mark.parametrize("size", [(1, 1000), (3000, 2)])
def test_the_picture_of_a_thin_image_is_no_giant(size):
    sheet = draw_overlay(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), CLASSES)
    assert min(sheet.size) > 30 and max(sheet.size) < 4500
    panel = np.array(sheet)
    assert (panel == CLASSES.palette[0]).all(-1).sum() > 50  # the legend's swatch is there all the same


def test_legend_of_very_many_classes_fits():
    n = 150
    classes = ClassList(
        tuple(f"a rather long name of class {i}" for i in range(n)), np.zeros((n, 3), np.uint8)
    )
    labels = np.arange(300 * 300).reshape(300, 300) % n
    sheet = draw_overlay(np.zeros((300, 300, 3), np.uint8), labels, classes)
    assert sheet.height == 300 and sheet.width < 1200


def test_short_names_of_ade20k_are_distinct():
    names = [short_name(name) for name in load_classes("ade20k").names]
    assert len(set(names)) == 150


def test_short_names():
    assert short_name("building;edifice") == "building"
    assert short_name("coffee;table;cocktail;table") == "coffee table"
    assert short_name("screen;door;screen") == "screen door"
    assert short_name("screen;silver;screen;projection;screen") == "screen"
    assert short_name("stop sign, octagonal") == "stop sign"
    assert short_name("a" * 30) == "a" * 23 + "…"
