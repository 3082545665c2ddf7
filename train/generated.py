"""A generated data set in ADE20K's layout and format, so that the whole pipeline runs where ADE20K is not.

Every image is a landscape: sky, mountains, sea, ground, and things standing on it or floating above it. No
class can be told from a pixel's colour and position, because colours are drawn anew for every image:

* texture tells ploughed field, paving and gravel apart, and the sea (rippled) from the sky (same colours);
* shape tells house, tree, tent, tyre and crate apart, all in colours drawn from one distribution;
* position tells a ball on the ground from the same disc in the sky, a balloon; shape tells it from a kite;
* colour, with shape, tells a stop sign (red diamond) from an info sign (blue diamond).

Unlabelled (0) are the outlines of things, as in hand-made annotations, and birds and rocks of no class.
Lengths are in units of 1/128 of the image's shorter side.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.ade20k import SegmentationFolder, each_sample, load_classes
from train.errors import UserError
from train.metrics import SegmentationMetrics

VERSION = 2  # part of the recorded parameters: a change of the scenes makes new images
RECORD = "generated.json"
CLASSES = (
    ("sky", (135, 190, 235)),
    ("sea", (25, 90, 160)),
    ("mountain", (120, 110, 130)),
    ("ploughed field", (150, 110, 50)),
    ("paving", (190, 180, 170)),
    ("gravel", (100, 95, 90)),
    ("house", (200, 120, 80)),
    ("tree", (40, 130, 50)),
    ("tent", (240, 160, 40)),
    ("tyre", (40, 40, 45)),
    ("crate", (180, 140, 90)),
    ("ball", (230, 80, 170)),
    ("balloon", (150, 80, 220)),
    ("kite", (120, 220, 80)),
    ("stop sign", (220, 30, 40)),
    ("info sign", (40, 80, 240)),
)
AIR = np.float32([[0.45, 0.65, 0.9], [0.75, 0.6, 0.6], [0.6, 0.65, 0.7], [0.3, 0.45, 0.7]])
EARTH = np.float32([[0.5, 0.4, 0.25], [0.35, 0.5, 0.25], [0.5, 0.5, 0.5], [0.6, 0.55, 0.42]])
RED, BLUE = (0.8, 0.1, 0.12), (0.12, 0.2, 0.8)
LABELS = {name: index + 1 for index, (name, _) in enumerate(CLASSES)}  # as stored: 0 is unlabelled


class Scene:
    """An image being painted from back to front, with its labels."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.unit = min(height, width) / 128
        self.height, self.width = height / self.unit, width / self.unit
        y, x = np.mgrid[:height, :width].astype(np.float32)
        self.y, self.x = (y + 0.5) / self.unit, (x + 0.5) / self.unit  # pixel centres in units
        self.rng = rng
        self.image = np.zeros((height, width, 3), np.float32)  # RGB in 0..1
        self.labels = np.zeros((height, width), np.uint8)

    def around(self, x: float, y: float, size: float) -> Scene:
        """The part that a thing of this size standing at (x, y) can reach, sharing this scene's pixels."""
        part = copy.copy(self)
        rows = slice(*(max(0, int(v * self.unit)) for v in (y - 1.3 * size, y + 0.2 * size + 2)))
        columns = slice(*(max(0, int(v * self.unit)) for v in (x - 0.8 * size, x + 0.8 * size + 2)))
        for name in ("x", "y", "image", "labels"):
            setattr(part, name, getattr(self, name)[rows, columns])
        part.height, part.width = (side / self.unit for side in part.labels.shape)
        return part

    def paint(
        self, distance: np.ndarray, colour: np.ndarray, label: str | None, outline: bool = False
    ) -> None:
        """Covers where distance (H, W) < 0, in units; its edge is one pixel soft.

        Args:
            colour: (3,) or (H, W, 3).
            label: class name, or None for unlabelled.
            outline: leave the pixels that the edge mixes unlabelled.
        """
        pixels = distance * self.unit
        cover = np.clip(0.5 - pixels, 0, 1)[..., None]
        self.image += cover * (colour - self.image)
        if outline:
            self.labels[pixels < 0.75] = 0
        self.labels[pixels < (-0.75 if outline else 0)] = LABELS[label] if label else 0

    def waves(self, period: float, angle: float) -> np.ndarray:
        """Sine (H, W) in -1..1 along a direction; a slow bend keeps it from looking printed."""
        along = np.cos(angle) * self.x + np.sin(angle) * self.y
        across = np.cos(angle) * self.y - np.sin(angle) * self.x
        bend = self.rng.uniform(0, 2 * np.pi)
        return np.sin(
            2 * np.pi * (along + np.sin(across / 22 + bend)) / period + self.rng.uniform(0, 2 * np.pi)
        )

    def speckle(self, size: float) -> np.ndarray:
        """Smooth noise (H, W) with grains of `size` units, about -1..1."""
        h, w = (int(np.ceil(side / size)) + 2 for side in (self.height, self.width))
        grains = Image.fromarray(self.rng.uniform(-1, 1, (h, w)).astype(np.float32))
        grains = grains.resize(
            (int(w * size * self.unit) + 1, int(h * size * self.unit) + 1), Image.Resampling.BICUBIC
        )
        return np.asarray(grains)[: self.labels.shape[0], : self.labels.shape[1]]

    def ridge(self, base: float, height: float, period: float) -> np.ndarray:
        """A hilly line: y (1, W) of a silhouette around `base`."""
        line = np.zeros_like(self.x[:1])
        for octave in (1, 2, 4):
            wave = np.abs(np.sin(np.pi * octave * self.x[:1] / period + self.rng.uniform(0, np.pi)))
            line += wave * height / octave
        return base - line / 1.75

    def colour(self) -> np.ndarray:
        """Any colour (3,): the same distribution for every thing whose class its colour must not give away.

        Half of them are the signs' red and blue, so that these do not give the signs away either.
        """
        if self.rng.random() < 0.5:
            return self.signal(RED if self.rng.random() < 0.5 else BLUE)
        low, high = self.rng.uniform(0.05, 0.45), self.rng.uniform(0.55, 0.95)
        return self.rng.permutation(np.array([low, self.rng.uniform(low, high), high])).astype(np.float32)

    def signal(self, colour: tuple[float, float, float]) -> np.ndarray:
        """A sign's red or blue (3,), more or less bright."""
        return np.clip(np.float32(colour) * np.float32(self.rng.uniform(0.8, 1.2)), 0, 1)


def _background(scene: Scene) -> float:
    """Paints sky, sea, mountains and ground; returns the y where the ground begins."""
    rng, y = scene.rng, scene.y
    horizon = rng.uniform(0.25, 0.5) * scene.height
    above = AIR[rng.integers(len(AIR))] * rng.uniform(0.8, 1.1)
    fade = np.clip(y / horizon, 0, 1)[..., None] * rng.uniform(0.1, 0.3)
    clouds = np.clip(scene.speckle(26) - 0.1, 0, 1)[..., None] * rng.uniform(0, 0.5)
    scene.paint(y - 1e3, np.clip(above + fade + clouds, 0, 1), "sky")

    if rng.random() < 0.7:
        peaks = scene.ridge(horizon, rng.uniform(14, 30), rng.uniform(50, 110))
        shade = np.clip((y - peaks) / 30, 0, 1)[..., None] * 0.15
        scene.paint(peaks - y, np.clip(_tone(rng) * 0.9 + shade, 0, 1), "mountain")

    shore = horizon + (rng.uniform(12, 34) if rng.random() < 0.65 else 0)
    if shore > horizon:
        ripples = scene.waves(rng.uniform(5, 7), np.pi / 2 + rng.uniform(-0.06, 0.06))
        scene.paint(horizon - y, np.clip(_tone(rng) + 0.13 * ripples[..., None], 0, 1), "sea")

    slope = rng.uniform(-0.12, 0.12)
    edge = shore + slope * (scene.x - scene.width / 2)
    region = edge - y
    order = rng.permutation(3)
    for number, kind in enumerate(order[: rng.integers(2, 4)]):
        scene.paint(region, *_ground(scene, kind))
        if number == 0:  # the next pieces lie right of and below slanting lines
            angle, middle = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.7) * scene.width
            region = np.maximum(region, middle + np.tan(angle) * (y - scene.height * 0.7) - scene.x)
        else:
            middle = rng.uniform(0.65, 0.85) * scene.height
            region = np.maximum(edge - y, middle + rng.uniform(-0.4, 0.4) * (scene.x - scene.width / 2) - y)
    return float(shore + abs(slope) * scene.width / 2)


def _tone(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) of anything below the sky: earths, greens, greys, and the sky's own at dusk or by day."""
    tones = EARTH if rng.random() < 0.6 else AIR
    return tones[rng.integers(len(tones))] * rng.uniform(0.75, 1.2) + rng.uniform(-0.06, 0.06, 3).astype(
        np.float32
    )


def _ground(scene: Scene, kind: int) -> tuple[np.ndarray, str]:
    """Colour (H, W, 3) and class name of a piece of ground: the colours agree, the textures do not."""
    rng = scene.rng
    if kind == 0:
        name, texture = "ploughed field", scene.waves(rng.uniform(6, 8), rng.uniform(-1.1, 1.1))
    elif kind == 1:
        name, angle, period = "paving", rng.uniform(0, np.pi / 2), rng.uniform(10, 13)
        joints = np.maximum(scene.waves(period, angle), scene.waves(period, angle + np.pi / 2))
        texture = 0.5 - 2.2 * np.clip(joints - 0.6, 0, 1)
    else:
        name, texture = "gravel", np.clip(2.2 * scene.speckle(3.2), -1, 1)
    light = 0.04 * scene.speckle(40)
    return np.clip(_tone(rng) + (rng.uniform(0.12, 0.2) * texture + light)[..., None], 0, 1), name


# ---- things: each paints itself standing at (x, y) with a height of `size` units


def _polygon(scene: Scene, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance (H, W), negative inside a convex polygon with corners (x, y) in clockwise order."""
    distance = np.full_like(scene.x, -np.inf)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        nx, ny = by - ay, ax - bx
        distance = np.maximum(distance, ((scene.x - ax) * nx + (scene.y - ay) * ny) / np.hypot(nx, ny))
    return distance


def _box(scene: Scene, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.maximum.reduce([left - scene.x, scene.x - right, top - scene.y, scene.y - bottom])


def _disc(scene: Scene, x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(scene.x - x, scene.y - y) - radius


def _shaded(scene: Scene, colour: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """A round thing's colour (H, W, 3), lit from the upper left."""
    light = 1 - np.hypot(scene.x - x + radius * 0.4, scene.y - y + radius * 0.4) / (radius * 1.6)
    return np.clip(colour * (0.75 + 0.45 * np.clip(light, -0.5, 1))[..., None], 0, 1)


def _house(scene: Scene, x: float, y: float, size: float) -> None:
    wall, roof, half, eaves = scene.colour(), scene.colour() * 0.8, size * 0.5, y - size * 0.55
    body = _box(scene, x - half, eaves - size * 0.06, x + half, y)  # no seam below the roof
    gable = _polygon(scene, [(x, y - size), (x + half * 1.2, eaves), (x - half * 1.2, eaves)])
    colour = np.where((gable < 0)[..., None], roof, wall)
    for offset in (-0.55, 0.15):
        pane = _box(
            scene, x + half * offset, eaves + size * 0.13, x + half * (offset + 0.4), eaves + size * 0.32
        )
        colour = np.where((pane < 0)[..., None], np.float32([0.15, 0.17, 0.22]), colour)
    scene.paint(np.minimum(body, gable), colour, "house", outline=True)


def _tree(scene: Scene, x: float, y: float, size: float) -> None:
    leaves, crown = scene.colour() * 0.9, y - size * 0.62
    lobes = [(0, 0, 0.3), (-0.2, 0.1, 0.22), (0.2, 0.1, 0.22), (0, -0.17, 0.22)]
    shape = np.minimum.reduce([_disc(scene, x + size * a, crown + size * b, size * r) for a, b, r in lobes])
    trunk = _box(scene, x - size * 0.06, crown, x + size * 0.06, y)
    mottled = leaves * (0.95 + 0.25 * scene.speckle(3.5))[..., None]
    bark = np.float32([0.3, 0.2, 0.12])
    colour = np.where((shape < 0)[..., None], np.clip(mottled, 0, 1), bark)
    scene.paint(np.minimum(shape, trunk), colour, "tree", outline=True)


def _tent(scene: Scene, x: float, y: float, size: float) -> None:
    colour, half = scene.colour(), size * 0.62
    shape = _polygon(scene, [(x, y - size), (x + half, y), (x - half, y)])
    door = _polygon(scene, [(x, y - size * 0.5), (x + half * 0.3, y), (x - half * 0.3, y)])
    lit = np.where((scene.x < x)[..., None], colour, colour * 0.8)
    scene.paint(shape, np.where((door < 0)[..., None], colour * 0.3, lit), "tent", outline=True)


def _tyre(scene: Scene, x: float, y: float, size: float) -> None:
    radius, middle = size * 0.36, y - size * 0.5
    ring = np.abs(_disc(scene, x, middle, radius)) - size * 0.15
    scene.paint(ring, _shaded(scene, scene.colour(), x, middle, size * 0.5), "tyre", outline=True)


def _crate(scene: Scene, x: float, y: float, size: float) -> None:
    colour, half = scene.colour(), size * 0.42
    u, v = (scene.x - x) / half, (scene.y - (y - half)) / half
    planks = (np.maximum(np.abs(u), np.abs(v)) > 0.78) | (np.abs(u - v) < 0.22)
    shade = np.where(planks[..., None], colour * 0.65, colour)
    scene.paint(_box(scene, x - half, y - 2 * half, x + half, y), shade, "crate", outline=True)


def _ball(scene: Scene, x: float, y: float, size: float, label: str = "ball") -> None:
    radius = size * 0.42
    scene.paint(
        _disc(scene, x, y - radius, radius),
        _shaded(scene, scene.colour(), x, y - radius, radius),
        label,
        outline=True,
    )


def _kite(scene: Scene, x: float, y: float, size: float) -> None:
    left, right, top, cross = x - size * 0.34, x + size * 0.34, y - size, y - size * 0.62
    shape = _polygon(scene, [(x, top), (right, cross), (x, y), (left, cross)])
    one, other = scene.colour(), scene.colour()
    chequered = (scene.x < x) ^ (scene.y < cross)
    scene.paint(shape, np.where(chequered[..., None], one, other), "kite", outline=True)


def _sign(scene: Scene, x: float, y: float, size: float, label: str) -> None:
    size *= 1.15
    colour = scene.signal(RED if label == "stop sign" else BLUE)
    half, middle = size * 0.34, y - size * 0.66
    pole = _box(scene, x - size * 0.05, middle, x + size * 0.05, y)
    scene.paint(pole, np.float32([0.35, 0.35, 0.37]), None)
    diamond = (np.abs(scene.x - x) + np.abs(scene.y - middle) - half) / np.sqrt(2)
    rim = (diamond > -half * 0.2)[..., None]
    colour = np.where(rim, np.float32([0.92, 0.92, 0.9]), colour)
    scene.paint(diamond, colour, label, outline=True)


_SIGNS = [functools.partial(_sign, label=label) for label in ("stop sign", "info sign")]
THINGS = (_house, _tree, _tent, _tyre, _crate, _ball, *_SIGNS)


def make_scene(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image (H, W, 3) uint8 and its annotation (H, W) uint8: 0 unlabelled, 1..16 the classes."""
    scene = Scene(height, width, rng)
    shore = _background(scene)

    for x in rng.permutation(np.linspace(0.18, 0.82, 3))[: rng.integers(0, 4)]:
        size = rng.uniform(26, 38)
        top = rng.uniform(0.02, max(0.03, shore / scene.height - size / 110))
        x, y = (x + rng.uniform(-0.06, 0.06)) * scene.width, top * scene.height + size * 0.85
        part = scene.around(x, y, size)
        if rng.random() < 0.5:
            _ball(part, x, y, size, "balloon")
        else:
            _kite(part, x, y, size)

    columns = max(3, round(3.4 * scene.width / scene.height))  # a place each, so that little is hidden
    count = rng.integers(columns - 1, columns + 2)
    feet = np.sort(rng.uniform(min(shore + 14, scene.height - 12), scene.height - 3, count))
    for y, place in zip(feet, rng.permutation(count)):
        x = (place + rng.uniform(0.25, 0.75)) / count * scene.width
        size = rng.uniform(34, 46) * (0.75 + 0.4 * (y - shore) / max(1.0, scene.height - shore))
        part = scene.around(x, y, size)
        shadow = np.hypot((part.x - x) / (size * 0.5), (part.y - y) / (size * 0.12)) - 1
        part.image *= 1 - 0.35 * np.clip(-shadow * 2, 0, 1)[..., None]
        THINGS[rng.integers(len(THINGS))](part, x, y, size)

    for _ in range(rng.integers(0, 3)):  # rocks and birds of no class
        x, y, radius = rng.uniform(0, scene.width), rng.uniform(0, scene.height), rng.uniform(3, 7)
        part = scene.around(x, y + 2 * radius, 4 * radius)
        lumpy = np.hypot((part.x - x) / 1.5, part.y - y) - radius * (1 + 0.3 * part.speckle(6))
        part.paint(lumpy, np.full(3, rng.uniform(0.1, 0.35), np.float32), None)

    light = rng.uniform(0.85, 1.12) * scene.image + 0.02 * rng.standard_normal(scene.image.shape, np.float32)
    return (np.clip(light, 0, 1) * 255).round().astype(np.uint8), scene.labels


# ------------------------------------------------------------------------------------------- on disk


class _Painting(torch.utils.data.Dataset):
    """Paints scene i of a split into its two files; value: None, or a UserError."""

    def __init__(self, images: Path, annotations: Path, count: int, seed: tuple[int, int], size):
        self.images, self.annotations, self.count = images, annotations, count
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> UserError | None:
        image, labels = make_scene(*self.size, np.random.default_rng([*self.seed, i]))
        try:
            Image.fromarray(image).save(self.images / f"scene_{i:06d}.jpg", quality=90)
            Image.fromarray(labels).save(self.annotations / f"scene_{i:06d}.png")
        except OSError as error:
            return UserError(f"{self.images}: cannot be written: {error.strerror or error}")
        return None


def generate(
    root: str | Path,
    seed: int = 0,
    train_images: int = 600,
    val_images: int = 80,
    size: tuple[int, int] = (128, 128),
    workers: int | None = None,
) -> Path:
    """Writes the data set, unless it stands there already, made with the same parameters.

    Args:
        root: its folder. A folder that this function did not make is never touched.
        seed: image i of a split depends on (seed, split, i) alone.
        size: (H, W) in pixels, at least 32 each.
        workers: processes that paint; None takes one per core. The result does not depend on it.

    Returns:
        the root: images/, annotations/, classes.csv and generated.json with the parameters.

    Raises:
        UserError: a folder with something else in it.
    """
    root = Path(root)
    wanted = {
        "version": VERSION,
        "seed": seed,
        "training": train_images,
        "validation": val_images,
        "size": list(size),
    }
    record = root / RECORD

    def stands() -> bool:
        try:
            return json.loads(record.read_text()) == wanted
        except (OSError, ValueError):  # missing, or damaged
            return False

    if stands():
        return root
    if not record.is_file() and root.exists() and any(root.iterdir()):
        raise UserError(
            f"{root}: holds files that were not generated here (no {RECORD}); name an empty folder"
        )

    root.parent.mkdir(parents=True, exist_ok=True)
    making = root.with_name(f"{root.name}.making-{os.getpid()}")
    try:
        for number, split in enumerate(("training", "validation")):
            images, annotations = making / "images" / split, making / "annotations" / split
            images.mkdir(parents=True)
            annotations.mkdir(parents=True)
            job = _Painting(images, annotations, wanted[split], (seed, number), size)
            for error in each_sample(job, workers, f"painting {split}"):
                if error is not None:
                    raise error
        rows = [f"{i},{name},{r},{g},{b}" for i, (name, (r, g, b)) in enumerate(CLASSES)]
        (making / "classes.csv").write_text("\n".join(["index,name,r,g,b", *rows]) + "\n")
        (making / RECORD).write_text(json.dumps(wanted, indent=1) + "\n")
        if stands():  # another process was faster, and may train on it already
            return root
        if root.exists():
            shutil.rmtree(root)
        os.replace(making, root)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


# ------------------------------------------------------------------------------------ per-pixel baseline


def pixel_baseline(root: str | Path) -> float:
    """mIoU on the validation split of a classifier that sees one pixel's colour and position.

    A table of class frequencies over 12 levels of each colour channel, 16 rows and 4 columns of the image,
    counted on the training split and blurred along every axis, so that bins without a pixel take after their
    neighbours. The better of the most frequent class and the most over-represented one per bin is reported:
    the second does better by rare classes, which mIoU counts as much as the frequent ones.
    """
    root = Path(root)
    classes = load_classes(root / "classes.csv")
    count = classes.num_classes
    shape = (12, 12, 12, 16, 4)

    def bins(image: np.ndarray) -> np.ndarray:  # (H, W) bin numbers
        h, w = image.shape[:2]
        r, g, b = (image[..., c].astype(np.int64) * 12 // 256 for c in range(3))
        rows, columns = np.arange(h)[:, None] * 16 // h, np.arange(w)[None] * 4 // w
        return (((r * 12 + g) * 12 + b) * 16 + rows) * 4 + columns

    cells = int(np.prod(shape))
    table = np.zeros(count * cells, np.float32)
    training = SegmentationFolder(root, "training", classes)
    keys: list[np.ndarray] = []
    for i in range(len(training)):
        image, target = training.decode(i)
        seen = target != training.ignore_index
        keys.append(target[seen].astype(np.int64) * cells + bins(image)[seen])
        if len(keys) == 64 or i + 1 == len(training):  # one pass over the table for many images
            table += np.bincount(np.concatenate(keys), minlength=table.size)
            keys.clear()
    table = table.reshape(count, cells)
    frequency = table.sum(1)
    table = table.reshape(count, *shape)
    for axis in range(1, table.ndim):
        padded = np.concatenate([table.take([0], axis), table, table.take([-1], axis)], axis)
        n = table.shape[axis]
        before, after = padded.take(range(n), axis), padded.take(range(2, n + 2), axis)
        table = 0.15 * before + 0.7 * table + 0.15 * after
    table = table.reshape(count, -1)

    validation = SegmentationFolder(root, "validation", classes)
    scores = []
    for weight in (np.ones(count), 1 / np.maximum(frequency, 1)):
        best = (table * weight[:, None].astype(np.float32)).argmax(0)
        metrics = SegmentationMetrics(count)
        for i in range(len(validation)):
            image, target = validation.decode(i)
            metrics.update(torch.from_numpy(best[bins(image)]), torch.from_numpy(target))
        scores.append(metrics.results()["miou"])
    return max(scores)
