"""ADE20K's folder layout: class lists, reading an image with its annotation, the data set of both.

    <root>/images/<split>/<stem>.jpg            JPEG or PNG, used as 8-bit RGB
    <root>/annotations/<split>/<stem>.png       one label per pixel, same size

In an annotation 0 means unlabelled and 1..C are the classes 0..C-1 (``reduce_zero_label``, ADE20K's way);
without it the values 0..C-1 are the classes themselves. Up to 255 classes an annotation is an 8-bit PNG and a
target is uint8 with 255 ignored; above, it is a 16-bit PNG and a target is int32 with -100 ignored, the same
choice as ``ignore_index=None`` of the operators.

An annotation belongs to the pixels as they are stored: an image's EXIF orientation is not applied, as in the usual
ADE20K pipelines. ``check-data`` (train/check_data.py) names the images that have one.
"""

from __future__ import annotations

import colorsys
import csv
import io
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from depict_kernels.ops import default_ignore_index
from train.errors import UserError, first_line

try:  # three times as fast as PIL, with the same pixels; torchvision means to drop it one day
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# What PIL raises on files that it does not take; of broken chunks its parsers let through whatever they meet.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
    *(EOFError, AssertionError, LookupError, ArithmeticError, TypeError, struct.error, zlib.error),
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
BUILT_IN_CLASSES = {"ade20k": Path(__file__).parent / "data" / "ade20k_classes.csv"}


# ---------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True, eq=False)
class ClassList:
    """The names of the classes 0..C-1 and the colour each is drawn in."""

    names: tuple[str, ...]
    palette: np.ndarray  # (C, 3) uint8
    source: str = "a list"  # where it came from, for messages

    @property
    def num_classes(self) -> int:
        return len(self.names)


def make_palette(count: int) -> np.ndarray:  # (count, 3) uint8
    """Distinct colours for `count` classes, the same on every run.

    Hues step by the golden ratio, so that neighbours in the list are far apart on the colour circle.
    """
    colours = [
        colorsys.hsv_to_rgb(
            (0.05 + i * 0.6180339887) % 1.0, (0.85, 0.6, 0.7)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3]
        )
        for i in range(count)
    ]
    return (np.array(colours).reshape(count, 3) * 255).round().astype(np.uint8)


def load_classes(spec: str | Path) -> ClassList:
    """Reads a class list: ``"ade20k"``, a .csv file or a text file.

    A .csv file has rows ``index,name`` or ``index,name,r,g,b`` with indices 0..C-1 in order and an optional
    heading; a text file has one name per line. Names must be unique, since results are reported by name.
    The built-in list is the scene parsing benchmark's table of 150 classes in its usual colours.

    Raises UserError naming the file and line.
    """
    path = BUILT_IN_CLASSES.get(str(spec), Path(spec))
    if not path.is_file():
        known = ", ".join(BUILT_IN_CLASSES)
        raise UserError(f"class list {spec}: no such file, and the built-in lists are: {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"class list {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None

    names: list[str] = []
    colours: list[list[int]] = []
    if path.suffix.lower() == ".csv":
        rows = csv.reader(io.StringIO(text), strict=True)  # else a quote left open swallows the rows below it
        try:
            table = [[cell.strip() for cell in row] for row in rows]
        except csv.Error as error:
            raise UserError(f"class list {path}, line {rows.line_num}: not valid CSV: {error}") from None
        for number, row in enumerate(table, start=1):
            if not any(row) or (number == 1 and not row[0].lstrip("-").isdigit()):
                continue  # an empty line or the heading
            where = f"class list {path}, line {number}"
            if len(row) not in (2, 5):
                raise UserError(f"{where}: {len(row)} columns, need index,name or index,name,r,g,b")
            if row[0] != str(len(names)):
                raise UserError(f"{where}: index {row[0]!r}, need {len(names)} (0, 1, 2, ... in order)")
            names.append(row[1])
            if len(row) == 5:
                if not all(re.fullmatch(r"\d{1,3}", cell) and int(cell) <= 255 for cell in row[2:]):
                    raise UserError(f"{where}: colour {','.join(row[2:])}, need three numbers from 0 to 255")
                colours.append([int(cell) for cell in row[2:]])
        if colours and len(colours) != len(names):
            raise UserError(
                f"class list {path}: {len(colours)} of {len(names)} rows have a colour, need all or none"
            )
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]

    if not names:
        raise UserError(f"class list {path}: holds no class, need at least one name")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name:
            raise UserError(f"class list {path}: class {index} has an empty name")
        if any(ord(character) < 32 for character in name):
            raise UserError(
                f"class list {path}: class {index} is called {name!r}, need one line of plain text"
            )
        if name in seen:
            raise UserError(f"class list {path}: classes {seen[name]} and {index} are both called {name!r}")
        seen[name] = index
    if len(names) > 65534:
        raise UserError(f"class list {path}: {len(names)} classes, a 16-bit annotation can tell 65534 apart")
    palette = np.array(colours, dtype=np.uint8) if colours else make_palette(len(names))
    return ClassList(tuple(names), palette, str(spec))


# ------------------------------------------------------------------------------------- reading one file


def read_image(path: Path) -> np.ndarray:
    """Decodes a JPEG or PNG to (H, W, 3) uint8, as ``to_rgb`` converts. Raises UserError naming the file."""
    try:
        data = path.read_bytes()
        if data[:3] != b"\xff\xd8\xff":
            if data[:8] != PNG_SIGNATURE:
                raise ValueError("its first bytes are neither's" if data else "the file is empty")
            return to_rgb(_open_png(data))
        if decode_jpeg is None:
            return to_rgb(Image.open(io.BytesIO(data), formats=["JPEG"]))
        # It decodes rows of RGB, so the permute is a view.
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as a JPEG or PNG image ({_reason(error)})") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode as (H, W, 3) uint8: grey becomes RGB, 16-bit grey is scaled to 8, alpha is dropped.

    Raises ValueError for floating-point pixels, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels have no known range: need 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL's convert would clip 16 bits at 255
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return np.array(image.convert("RGB"))


def exif_orientation(path: Path) -> int:
    """1 to 8 as EXIF counts, 1 (upright) also where nothing, or nothing readable, is said."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(0x0112, 1)
    except UNREADABLE:  # the pixels may be fine all the same
        return 1
    return orientation if orientation in range(1, 9) else 1


def read_labels(path: Path) -> np.ndarray:
    """Decodes an annotation PNG to its stored values: (H, W) uint8, or uint16 from a 16-bit file.

    Grey of 8 or 16 bits and palette images (whose indices are the labels) are taken. Raises UserError naming
    the file.
    """
    try:
        data = path.read_bytes()
        with _open_png(data) as image:
            bits, colour_type = data[24], data[25]
            if colour_type == 3 or (bits, colour_type) == (8, 0):
                return np.array(image)
            if (bits, colour_type) == (16, 0):
                return np.array(image, dtype=np.uint16)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as a PNG annotation ({_reason(error)})") from None
    kind = {0: "grey", 2: "RGB", 4: "grey with alpha", 6: "RGBA"}.get(
        colour_type, f"colour type {colour_type}"
    )
    raise UserError(f"{path}: {kind} of {bits} bits, need one channel of 8 or 16 bits, or palette indices")


def _open_png(data: bytes) -> Image.Image:
    """Opens a PNG whose every chunk is whole.

    PIL takes some damaged files for good ones and torchvision's decoder can crash the process on them, so the
    checksums that the format carries are looked at first.
    """
    if data[:8] != PNG_SIGNATURE:
        raise ValueError("no PNG signature" if data else "the file is empty")
    at, kind = 8, b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise ValueError("file is truncated")
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("file is truncated" if len(data) < end + 4 else "checksum of a chunk is wrong")
        at = end + 4
    return Image.open(io.BytesIO(data), formats=["PNG"])


def _reason(error: BaseException) -> str:
    """The useful end of a decoder's message, without its source file."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {2 * Image.MAX_IMAGE_PIXELS} pixels that PIL takes"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return first_line(error).split(".cpp:")[-1].split(", ")[-1]


class ForeignLabel(UserError):
    """An annotation, readable and of its image's size, that holds a label out of range."""


def foreign(labels: np.ndarray, num_classes: int, reduce_zero_label: bool = True) -> np.ndarray:
    """Which of the stored annotation values ``to_target`` refuses: bool of their shape."""
    highest = num_classes if reduce_zero_label else num_classes - 1
    return (labels > highest) & (labels != np.iinfo(labels.dtype).max)


def may_start_at_0(seen: np.ndarray) -> bool:
    """Whether labels end at C - 1, as they do where 0 is a class and not unlabelled; seen[c] is of label c + 1."""
    return not seen[-1] and bool(len(seen) == 1 or seen[-2])


def to_target(labels: np.ndarray, num_classes: int, reduce_zero_label: bool = True) -> np.ndarray:
    """Maps stored annotation values to targets.

    Args:
        labels: (H, W) uint8 or uint16 as stored.
        num_classes: C.
        reduce_zero_label: 0 becomes ignored and 1..C become 0..C-1. Otherwise 0..C-1 stay.
            The type's largest value (255, 65535) is ignored where it is not a class.

    Returns:
        (H, W) uint8 with 255 ignored, or int32 with -100 ignored above 255 classes.

    Raises:
        ValueError: a value out of range; the message names it and how many pixels hold it.
    """
    highest = num_classes if reduce_zero_label else num_classes - 1
    ignored = default_ignore_index(num_classes)
    wide = num_classes > 255
    if not wide and labels.dtype == np.uint8 and labels.max(initial=0) <= highest:
        return labels - np.uint8(1) if reduce_zero_label else labels  # 0 wraps to 255, which is ignored
    void = np.iinfo(labels.dtype).max
    invalid = foreign(labels, num_classes, reduce_zero_label)
    if invalid.any():
        values, counts = np.unique(labels[invalid], return_counts=True)
        others = len(values) - 1
        more = f" and {others} other value{'s' if others > 1 else ''}" if others else ""
        first = 1 if reduce_zero_label else 0
        unlabelled = "0 for unlabelled, " if reduce_zero_label else ""
        shifted = not reduce_zero_label and len(values) == 1 and values[0] == num_classes
        raise ValueError(
            f"label {values[0]} on {counts[0]} pixels{more}: out of range, "
            f"need {unlabelled}{first}..{highest} for {num_classes} classes"
            + ("; are 1..C classes and 0 unlabelled? data.reduce_zero_label true" if shifted else "")
        )
    target = labels.astype(np.int32) - int(reduce_zero_label)
    target[(target < 0) | ((labels == void) & (void > highest))] = ignored
    return target if wide else target.astype(np.uint8)


def read_pair(
    image_path: Path, annotation_path: Path, classes: ClassList, reduce_zero_label: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and target (H, W) as of ``to_target``.

    Raises UserError naming the file that is missing, truncated, of another size or out of range.
    """
    image = read_image(image_path)
    labels = read_labels(annotation_path)
    if image.shape[:2] != labels.shape:
        (h, w), (lh, lw) = image.shape[:2], labels.shape
        text = f"{annotation_path}: {lw} x {lh} pixels, but its image {image_path.name} has {w} x {h}"
        if (lh, lw) == (w, h) and exif_orientation(image_path) >= 5:
            text += (
                "; it fits the image turned by its EXIF orientation, which is not applied: store it upright"
            )
        raise UserError(text)
    try:
        return image, to_target(labels, classes.num_classes, reduce_zero_label)
    except ValueError as error:
        raise ForeignLabel(f"{annotation_path}: {error} (class list: {classes.source})") from None


# ------------------------------------------------------------------------------------------- the data set


class SegmentationFolder:
    """One split of a data set in ADE20K's layout. Sample i is an image and its target.

    Args:
        root: folder that holds ``images/`` and ``annotations/``.
        split: name of the folder below them, e.g. ``"training"``.
        classes: names and colours of the C classes.
        reduce_zero_label: see ``to_target``.
        cache: folder for decoded copies (train/cache.py); built on first use, by one process per machine.

    Raises:
        UserError: a missing or empty folder, or an image without an annotation; the message names it.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: ClassList,
        reduce_zero_label: bool = True,
        cache: str | Path | None = None,
    ):
        self.root, self.split, self.classes = Path(root), split, classes
        self.reduce_zero_label = reduce_zero_label
        images, annotations, problems = list_pairs(self.root, split)
        if problems:
            path, message = problems[0]
            more = f" ({len(problems) - 1} more: `check-data` names them all)" if len(problems) > 1 else ""
            raise UserError(f"{path}: {message}{more}")
        self.names = list(images)
        self._images, self._annotations = list(images.values()), list(annotations.values())
        self._cache = None
        if cache is not None:
            from train.cache import DecodedCache

            self._cache = DecodedCache.open_or_build(self, cache)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return self.classes.num_classes

    @property
    def ignore_index(self) -> int:
        return default_ignore_index(self.num_classes)

    def image_path(self, i: int) -> Path:
        return self._images[i]

    def annotation_path(self, i: int) -> Path:
        return self._annotations[i]

    def decode(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 and target (H, W) from the files themselves, past any cache.

        Raises UserError naming the file that is truncated, of another size or out of range.
        """
        return read_pair(self.image_path(i), self.annotation_path(i), self.classes, self.reduce_zero_label)

    def arrays(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Like ``decode``, but from the cache where there is one; the arrays may then be read-only."""
        return self._cache.read(i) if self._cache is not None else self.decode(i)

    def require_labels(self, count: int | None = None, weights: Sequence[float] | None = None) -> None:
        """Raises UserError where no pixel of the first ``count`` samples counts. Reads up to one that does.

        A pixel counts if it is labelled, with a class whose weight, where there are ``weights``, is not 0.
        """
        idle = [self.ignore_index, *(c for c, weight in enumerate(weights or ()) if weight == 0)]
        targets = (self.arrays(i)[1] for i in range(len(self))[:count])
        if not any(np.isin(target, idle, invert=True).any() for target in targets):
            of = " of a class whose weight is not 0" if len(idle) > 1 else ""
            raise UserError(
                f"{self.root}: no labelled pixel{of} in {self.split}; `python train/run.py check-data` shows what the "
                "annotations hold"
            )

    def read(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, H, W) uint8 and target (H, W) uint8 (int32 above 255 classes), both writable."""
        image, target = self.arrays(i)
        if not image.flags.writeable:
            image, target = image.copy(), target.copy()
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target)


def list_pairs(root: Path, split: str) -> tuple[dict[str, Path], dict[str, Path], list[tuple[Path, str]]]:
    """The images and annotations of a split by stem, in order of their stems, and what is missing.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    found = []
    for kind, suffixes in (("images", IMAGE_SUFFIXES), ("annotations", (".png",))):
        folder = root / kind / split
        if not folder.is_dir():
            # A run's data.root may be relative to another folder.
            here = "" if folder.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"{folder}: no such folder{here}; a data set has {kind}/{split}/ below data.root, which is {root}"
            )
        files = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
        by_stem: dict[str, Path] = {}
        for path in sorted(files):
            if path.stem in by_stem:
                raise UserError(f"{path}: {by_stem[path.stem].name} has the same stem, need one of them only")
            by_stem[path.stem] = path
        found.append(by_stem)
    images, annotations = found
    if not images:
        raise UserError(f"{root / 'images' / split}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    problems = [
        (path, f"has no annotation, expected {root / 'annotations' / split / (stem + '.png')}")
        for stem, path in images.items()
        if stem not in annotations
    ]
    without = {stem: path for stem, path in annotations.items() if stem not in images}
    others = {path.stem: path.name for path in (root / "images" / split).iterdir()} if without else {}
    for stem, path in without.items():
        unread = f"; {others[stem]} is neither JPEG nor PNG" if stem in others else ""
        problems.append((path, f"has no image, expected {root / 'images' / split / (stem + '.jpg')}{unread}"))
    return images, annotations, problems


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_sample(dataset: torch.utils.data.Dataset, workers: int | None, title: str, progress: bool = False):
    """Yields dataset[0], dataset[1], ... computed by `workers` processes (0: here), with a progress bar.

    No more processes than this one may use cores, None for as many: they only decode, and torch warns of more.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=usable_cores() if workers is None else min(workers, usable_cores()),
        collate_fn=as_it_is,
        generator=torch.Generator(),
    )
    if progress:
        from rich.progress import track

        loader = track(loader, title, len(dataset))
    yield from loader


def as_it_is(sample):
    """A collate_fn, where torch would else turn arrays into tensors."""
    return sample
