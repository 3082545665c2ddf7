"""Label maps and overlays for any folder or list of images."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from train.ade20k import UNREADABLE, ClassList, to_rgb
from train.distributed import World
from train.errors import UserError, first_line
from train.inference import Progress, predict_labels, prefetch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ENDINGS = (".png", "_overlay.png")  # of an image's outputs: its labels, the picture to look at
_PANEL, _TEXT, _FAINT = (255, 255, 255), (32, 32, 32), (110, 110, 110)


# ------------------------------------------------------------------------------------------- reading


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given and the images that stand directly in given folders, sorted within each folder.

    Raises UserError where a path does not exist or nothing is left.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith(".")
            )
            if not inside:
                raise UserError(f"{path}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
            images += inside
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not images:
        raise UserError("no images given: name files or folders")
    return list(dict.fromkeys(images))


def read_any_image(path: Path) -> np.ndarray:
    """Decodes an image to (H, W, 3) uint8, upright.

    EXIF's orientation is applied, so a label map is that of the upright image; of several frames the first counts,
    and ``to_rgb`` converts the pixels. Raises UserError naming the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None


# ------------------------------------------------------------------------------------------- drawing


# The benchmark's table writes every word apart ("coffee;table;cocktail;table"), so that nothing in it tells
# where a name of several words ends.
_WORDS_OF_ONE_NAME = (
    *("arcade machine", "bulletin board", "chest of drawers", "coffee table", "conveyer belt", "crt screen"),
    *("dirt track", "kitchen island", "pool table", "screen door", "swimming pool", "swivel chair"),
    *("trade name", "traffic light"),
)


def short_name(name: str, limit: int = 24) -> str:
    """The first synonym of a class name such as "building;edifice", cut to ``limit`` characters."""
    words = name.replace(";", " ").strip()
    for several in _WORDS_OF_ONE_NAME:
        if ";" in name and f"{words} ".startswith(f"{several} "):
            return several
    name = name.split(";")[0].split(",")[0].strip()
    return name if len(name) <= limit else f"{name[: limit - 1].rstrip()}…"


def enlarged(factor: int, image: np.ndarray, *maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """The image (H, W, 3) uint8, interpolated, and maps (H, W), repeated, ``factor`` times as high and wide."""
    if factor == 1:
        return image, *maps
    height, width = image.shape[:2]
    size = (width * factor, height * factor)
    smooth = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return smooth, *(labels.repeat(factor, 0).repeat(factor, 1) for labels in maps)


def enlargement(wanted: int, shape: tuple[int, int], most: int = 4096) -> int:
    """The whole factor ``wanted`` of a picture's size, or what keeps its longer side within ``most`` pixels."""
    return max(1, min(wanted, most // max(shape)))


def grey_tones(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> its luma, (H, W, 1) float32."""
    return (image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def borders(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """(H, W) bool: the pixels with another label up to ``width`` pixels to their right or below them."""
    border = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        border[:, :-step] |= labels[:, :-step] != labels[:, step:]
        border[:-step] |= labels[:-step] != labels[step:]
    return border


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.6, line: int = 1
) -> np.ndarray:
    """Blends class colours over an image: (H, W, 3) uint8.

    The image enters as its grey tones, so that a class keeps the hue that the legend shows; the borders between
    classes are drawn in the darkened class colour.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) of an integer dtype; values outside the palette (the ignored label) stay grey.
        palette: (C, 3) uint8.
        opacity: share of the class colour, 0..1.
        line: pixels that a border is wide.
    """
    labels = labels.astype(np.int64)
    known = (labels >= 0) & (labels < len(palette))
    labels = np.where(known, labels, -1)
    colours = palette[labels].astype(np.float32)
    grey = grey_tones(image)
    blend = opacity * colours + (1 - opacity) * grey
    blend = np.where(borders(labels, line)[..., None], 0.55 * colours, blend)
    return np.where(known[..., None], blend, grey).round().astype(np.uint8)


def classes_by_area(labels: np.ndarray, num_classes: int) -> list[tuple[int, float]]:
    """(class, share of the labelled pixels) of the classes that occur, largest first, ties by index."""
    counts = np.bincount(labels[(labels >= 0) & (labels < num_classes)].ravel(), minlength=num_classes)
    order = sorted(np.flatnonzero(counts), key=lambda c: (-counts[c], c))
    return [(int(c), float(counts[c] / counts.sum())) for c in order]


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships it, so that the legend looks the same everywhere
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def draw_overlay(image: np.ndarray, labels: np.ndarray, classes: ClassList) -> Image.Image:
    """The overlay with a legend at its right: classes present, largest area first, with their shares.

    Arguments as for :func:`overlay`. Small pictures are enlarged by a whole factor to leave room for text.
    """
    factor = enlargement(-(-240 // min(labels.shape)), labels.shape)
    line = max(1, max(labels.shape) // 800)
    picture = Image.fromarray(overlay(*enlarged(factor, image, labels), classes.palette, line=line))
    size = min(max(round(picture.height / 36), 13), 48)
    font, row, margin = _font(size), round(1.75 * size), size
    present = classes_by_area(labels, classes.num_classes)
    entries = [
        (classes.palette[c], short_name(classes.names[c]), "< 0.1 %" if s < 0.001 else f"{100 * s:.1f} %")
        for c, s in present
    ]
    fit = max(1, (picture.height - 2 * margin) // row)
    if len(entries) > 2 * fit:
        rest = len(entries) - 2 * fit + 1
        entries = [*entries[: 2 * fit - 1], (None, f"and {rest} smaller classes", "")]
    columns = [entries[i : i + fit] for i in range(0, len(entries), fit)]
    widths = [
        (max(font.getlength(name) for _, name, _ in part), max(font.getlength(share) for *_, share in part))
        for part in columns
    ]
    swatch, gap = round(1.1 * size), round(0.6 * size)
    panel = sum(round(a + b) + swatch + 3 * gap + margin for a, b in widths) + margin
    sheet = Image.new("RGB", (picture.width + panel, max(picture.height, row + 2 * margin)), _PANEL)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    x = picture.width + margin
    for part, (name_width, share_width) in zip(columns, widths):
        right = x + swatch + gap + round(name_width) + 2 * gap + round(share_width)
        for i, (colour, name, share) in enumerate(part):
            middle = margin + i * row + row // 2
            if colour is not None:
                box = (x, middle - swatch // 2, x + swatch, middle - swatch // 2 + swatch)
                draw.rectangle(box, fill=tuple(int(v) for v in colour), outline=_FAINT)
            draw.text((x + swatch + gap, middle), name, font=font, fill=_TEXT, anchor="lm")
            draw.text((right, middle), share, font=font, fill=_FAINT, anchor="rm")
        x = right + margin
    return sheet


def encode_labels(labels: np.ndarray, num_classes: int, reduce_zero_label: bool = True) -> Image.Image:
    """A label map (H, W) as an annotation stores it: class c as c + 1 with ``reduce_zero_label``, else as c.

    8-bit PNG up to 255 classes, 16-bit above.
    """
    values = labels.astype(np.int64) + int(reduce_zero_label)
    return Image.fromarray(values.astype(np.uint8 if num_classes <= 255 else np.uint16))


# ---------------------------------------------------------------------------------------- predicting


@dataclass
class PredictReport:
    """What became of the images: the files written, and (file, reason) of each that failed."""

    written: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return 1 if self.failed else 0


def output_names(images: Sequence[Path]) -> list[str]:
    """What each image's outputs are called: its stem, or its whole name ("a.jpg") where two images would share a file.

    "a.jpg" and "a_overlay.jpg" would: both write "a_overlay.png". Raises UserError where the whole names clash too.
    """

    def outputs(name: str) -> tuple[str, ...]:
        return tuple(f"{name}{ending}" for ending in ENDINGS)

    writers = Counter(file for image in images for file in outputs(image.stem))
    names = [
        image.stem if all(writers[file] == 1 for file in outputs(image.stem)) else image.name
        for image in images
    ]
    writer: dict[str, Path] = {}
    for image, name in zip(images, names):
        for file in outputs(name):
            first = writer.setdefault(file, image)
            if first != image:
                raise UserError(f"{first} and {image} would both be written as {file}: predict them apart")
    return names


def predict_folder(
    model: nn.Module,
    paths: Sequence[str | Path],
    classes: ClassList,
    cfg,
    output: str | Path,
    *,
    reduce_zero_label: bool = True,
    multiscale: bool = False,
    amp_dtype: torch.dtype | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> PredictReport:
    """Writes ``<stem>.png``, the labels as annotations encode them, and ``<stem>_overlay.png`` for every image.

    A file that cannot be read or written, or that memory does not suffice for, is named on stderr, and the others
    still get done: see the report's ``exit_status``.

    Args:
        model: as in :func:`train.inference.predict_labels`, in eval mode.
        paths: image files and folders of them.
        classes: names and colours of the model's classes.
        cfg: the ``eval`` section of the configuration.
        output: folder, made where it is missing.
        reduce_zero_label: class c is stored as c + 1, as in ADE20K's annotations.
        amp_dtype: dtype of autocast around the model, None for none.
        world: the processes that share the images; None for this one alone.
        progress: called with images done, this process's images, images per second.

    Raises:
        UserError: no images; an output that would overwrite an input, or a file that is no earlier prediction; two
            images of one name. Nothing is written then.
    """
    images = find_images(paths)
    names = output_names(images)
    output = Path(output)
    inputs = {image.resolve() for image in images}
    for name in names:
        targets = [output / f"{name}{ending}" for ending in ENDINGS]
        for target in targets:
            if target.resolve() in inputs:
                raise UserError(
                    f"{target} is an input and would be overwritten: choose another output folder"
                )
        _refuse_to_overwrite(*targets)
    if output.is_file():
        raise UserError(f"--output {output}: is a file; name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror}") from None
    device = next(model.parameters()).device
    world = world or World(device)
    if world.size > 1:  # what one of them writes is no reason for another to stop
        dist.barrier()

    report = PredictReport()
    start = time.monotonic()
    mine = list(zip(images, names))[world.rank :: world.size]
    jobs = prefetch(lambda job: read_any_image(job[0]), mine, workers=2)
    for done, ((path, name), get) in enumerate(jobs, 1):
        try:
            image = get()
            pixels = torch.from_numpy(image).permute(2, 0, 1)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                labels = predict_labels(model, pixels, cfg, multiscale=multiscale)
            labels = labels.cpu().numpy()
            pictures = (
                encode_labels(labels, classes.num_classes, reduce_zero_label),
                draw_overlay(image, labels, classes),
            )
            report.written += _save(pictures, [output / f"{name}{ending}" for ending in ENDINGS])
        except (UserError, MemoryError, RuntimeError) as error:
            if not isinstance(error, UserError):
                if not _out_of_memory(error):
                    raise
                error = UserError(f"{path}: not enough memory for this image ({first_line(error)})")
            report.failed.append((path, str(error)))
            print(f"error: {error}", file=sys.stderr)
        if progress is not None:
            progress(done, len(mine), done / max(time.monotonic() - start, 1e-9))
    return report


def _out_of_memory(error: BaseException) -> bool:
    # torch has no type of its own for the CPU's
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _refuse_to_overwrite(labels: Path, picture: Path) -> None:
    """Raises UserError where one of an image's outputs exists without the other: something else wrote it."""
    if labels.exists() != picture.exists():
        there, lacking = (labels, picture) if labels.exists() else (picture, labels)
        raise UserError(
            f"{there}: may be no earlier prediction ({lacking.name} is not beside it) and would be overwritten: "
            "choose another folder with --output"
        )


def _save(pictures: Sequence[Image.Image], paths: Sequence[Path]) -> Sequence[Path]:
    """Writes an image's PNGs, each of them whole. Raises UserError naming the file."""
    part = {path: path.with_name(f".{path.name}.part") for path in paths}
    try:
        for path, picture in zip(paths, pictures):
            picture.save(part[path], format="PNG")
        for path in paths:
            os.replace(part[path], path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    finally:
        for temporary in part.values():
            temporary.unlink(missing_ok=True)
    return paths
