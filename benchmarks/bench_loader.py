"""Images per second and core of the training loader against the plain order of stock torchvision v2.

    python benchmarks/bench_loader.py [--root DATA] [--rounds N]

Plain order, all on the CPU: decode, resize image and annotation, crop (drawn again while one class fills 75 %),
flip, photometric distortion, to float, normalise. Ours is what the worker does: decode or read the cache, crop,
resize; the batch is handed over in uint8. Flip, distortion and normalisation are then done for a whole batch
on the training device, where they cost a GPU about nothing; so that nothing is hidden, their cost on this CPU
is printed too, with the ratio that a machine without an accelerator sees.

One thread, 512 x 512 crops, the images of DATA over and over (default: ADE20K's three sample images). The ways
are timed in turns, so that a change of the machine's load meets all of them; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torchvision import io, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import cpu_name
from train.ade20k import SegmentationFolder, load_classes, read_labels
from train.loader import train_loader
from train.transforms import CROP_TRIES, DeviceAugment, resized_size

ROOT = Path(__file__).parents[2] / "shared" / "ade20k_sample" / "ADEChallengeData2016"
CROP, BASE, SCALE, SHARE, BATCH = (512, 512), 512, (0.5, 2.0), 0.75, 8


class PlainOrder:
    """The usual pipeline, written with torchvision.transforms.v2; per-sample work as a data set would do it."""

    def __init__(self, folder: SegmentationFolder):
        self.folder = folder
        self.rng = np.random.default_rng(0)
        self.colours = v2.Compose(
            [
                v2.RandomPhotometricDistort(p=0.5),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __call__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = tv_tensors.Image(io.read_image(str(self.folder.image_path(i)), io.ImageReadMode.RGB))
        labels = read_labels(self.folder.annotation_path(i))
        mask = tv_tensors.Mask(torch.from_numpy(labels - np.uint8(1))[None])
        r = self.rng.uniform(*SCALE)
        size = list(resized_size(*image.shape[-2:], BASE * r, 4 * BASE * r))
        image = F.resize(image, size, antialias=False)
        mask = F.resize(mask, size, interpolation=v2.InterpolationMode.NEAREST)
        for _ in range(CROP_TRIES):
            params = v2.RandomCrop(CROP, pad_if_needed=True).make_params([mask])
            top, left = params["top"], params["left"]
            crop = mask[..., top : top + CROP[0], left : left + CROP[1]]
            counts = np.unique(crop.numpy()[crop.numpy() != 255], return_counts=True)[1]
            if len(counts) > 1 and counts.max() / counts.sum() < SHARE:
                break
        image, mask = image[..., top : top + CROP[0], left : left + CROP[1]], crop
        if self.rng.random() < 0.5:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        image = self.colours(tv_tensors.Image(image))
        padding = [0, 0, CROP[1] - image.shape[-1], CROP[0] - image.shape[-2]]
        return F.pad(image, padding), F.pad(mask, padding, fill=255)


def measure(root: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds per image: "plain", "jpeg", "cache" (both worker side) and "device"."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes = load_classes("ade20k")
    data = SimpleNamespace(crop_size=CROP, base_size=BASE, scale=SCALE, max_class_share=SHARE, flip=0.5)
    data.photometric_distortion, data.batch_size, data.workers = True, BATCH, 0
    with tempfile.TemporaryDirectory() as cache:
        folder = SegmentationFolder(root, "training", classes)
        loaders = {
            "jpeg": train_loader(folder, data, seed=0),
            "cache": train_loader(SegmentationFolder(root, "training", classes, cache=cache), data, seed=0),
        }
        plain, augment = PlainOrder(folder), DeviceAugment([0.5] * 3, [0.5] * 3)
        times: dict[str, list[float]] = {"plain": [], "jpeg": [], "cache": [], "device": []}
        for turn in range(rounds + 1):
            start = time.perf_counter()
            images, targets = zip(*(plain(i % len(folder)) for i in range(BATCH)))
            torch.stack(images), torch.stack(targets)
            spent = {"plain": time.perf_counter() - start}
            for name, loader in loaders.items():
                start = time.perf_counter()
                batch = next(loader)
                spent[name] = time.perf_counter() - start
            start = time.perf_counter()
            augment(batch)
            spent["device"] = time.perf_counter() - start
            if turn:  # the first turn warms up
                for name, value in spent.items():
                    times[name].append(value / BATCH * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="a data set in ADE20K's layout")
    parser.add_argument("--rounds", type=int, default=30, help="batches of 8 images per way")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    if not args.root.is_dir():
        print(f"skipped: {args.root} is missing; name a data set with --root", file=sys.stderr)
        return 0
    ms = measure(args.root, args.rounds)
    print(
        f"one thread, torch {torch.__version__}, {args.rounds} batches of {BATCH} images of {args.root.name}"
    )
    print(f"{'':34} {'ms/image':>9} {'images/s':>9} {'ratio':>6}   needed")
    rows = [
        ("plain order, decode to normalised", ms["plain"], ""),
        ("worker side, from JPEG", ms["jpeg"], ">= 4"),
        ("worker side, from the cache", ms["cache"], ">= 10"),
        ("device side, on this CPU", ms["device"], ""),
        ("JPEG, both sides on this CPU", ms["jpeg"] + ms["device"], ""),
    ]
    for name, value, needed in rows:
        print(f"{name:34} {value:9.2f} {1e3 / value:9.1f} {ms['plain'] / value:6.1f}   {needed}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"torch": torch.__version__, "cpu": cpu_name(), "rounds": args.rounds, "ms_per_image": ms}
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if ms["plain"] / ms["jpeg"] >= 4 and ms["plain"] / ms["cache"] >= 10 else 1


if __name__ == "__main__":
    raise SystemExit(main())
