"""``check-data``: reads a whole data set once, and says what it holds and which files are bad."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from depict_kernels.ops import default_ignore_index
from train.ade20k import (
    ClassList,
    ForeignLabel,
    each_sample,
    exif_orientation,
    foreign,
    list_pairs,
    may_start_at_0,
    read_labels,
    read_pair,
    to_target,
)
from train.errors import UserError
from train.predict import short_name


@dataclass
class SplitReport:
    """What ``check_data`` found in one split."""

    split: str
    images: int
    annotations: int
    pixels: np.ndarray  # (C,) int64 pixels per class
    images_with: np.ndarray  # (C,) int64 images that show it
    ignored: int = 0  # unlabelled pixels
    smallest: tuple[int, int] = (0, 0)  # (H, W) by area
    largest: tuple[int, int] = (0, 0)
    problems: list[str] = field(default_factory=list)  # "path: what is wrong", one per bad file
    foreign: int = 0  # of these, files that hold a label out of range
    warnings: list[str] = field(default_factory=list)  # "path: what to know", of files that are taken


@dataclass
class DataReport:
    """What ``check_data`` found in all splits."""

    splits: list[SplitReport]
    classes: ClassList
    reduce_zero_label: bool = True

    @property
    def problems(self) -> list[str]:
        return [problem for split in self.splits for problem in split.problems]

    @property
    def exit_status(self) -> int:
        return 1 if self.problems else 0

    def text(self) -> str:
        """Counts, the label histogram and every bad file, ready to print."""
        lines = []
        values = _unlabelled(self.classes.num_classes, self.reduce_zero_label)
        for s in self.splits:
            lines.append(
                f"{s.split}: {s.images} images, {s.annotations} annotations, {_bad_files(len(s.problems))}"
            )
            if s.pixels.sum() + s.ignored:
                (h, w), (lh, lw) = s.smallest, s.largest
                lines.append(f"  smallest {w} x {h}, largest {lw} x {lh} pixels (width x height)")
                share = s.ignored / (s.ignored + s.pixels.sum())
                lines.append(f"  unlabelled pixels ({values}): {share:.2%}")
        names = self.classes.names
        width = 24
        unseen = [c for c in range(len(names)) if not any(s.images_with[c] for s in self.splits)]
        left_out = set(unseen) if len(names) > 30 else set()
        lines += ["", "share of the labelled pixels, and images that show the class"]
        heads = "".join(f"{s.split[:20]:>22}" for s in self.splits)
        lines.append(f"{'':5} {'class':{width}}{heads}")
        for c, name in enumerate(names):
            cells = "".join(
                f"{s.pixels[c] / max(1, s.pixels.sum()):>13.3%} {s.images_with[c]:>8}" for s in self.splits
            )
            if c not in left_out:
                lines.append(f"{c:5} {short_name(name, width):{width}}{cells}")
        if unseen:
            some = ", ".join(f"{c} {short_name(names[c], width)}" for c in unseen[:8])
            more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
            lines += ["", f"{len(unseen)} of {len(names)} classes never occur: {some}{more}"]
        lines.append("")
        if self._may_start_at_0():
            lines.append(
                f"warning: label {len(names)}, the last class's, occurs nowhere, {len(names) - 1} does, and some "
                "pixels count as unlabelled: if 0 is the first class, give --data.reduce_zero_label false"
            )
        if self._may_be_0_and_255():
            lines.append(
                "warning: the annotations hold 0 and 255 alone, and 255 counts as unlabelled: in masks of 0 and 255 "
                "write 1 in place of 255"
            )
        lines += [f"warning: {warning}" for split in self.splits for warning in split.warnings]
        lines += self.problems
        lines.append(_bad_files(len(self.problems)))
        return "\n".join(lines)

    def _may_be_0_and_255(self) -> bool:
        """Whether the only class seen is 0 and the rest is 255, as in a binary mask made for looking at."""
        if (
            self.reduce_zero_label
            or self.classes.num_classes > 255
            or not any(s.ignored for s in self.splits)
            or any(s.foreign for s in self.splits)
        ):
            return False
        return [*np.flatnonzero(sum(s.images_with for s in self.splits))] == [0]

    def _may_start_at_0(self) -> bool:
        """Whether labels go up to C - 1 and some are ignored, as they do where 0 is a class and not unlabelled."""
        if not self.reduce_zero_label or not any(s.ignored for s in self.splits):
            return False
        return may_start_at_0(sum(s.images_with for s in self.splits) > 0)


def _unlabelled(num_classes: int, reduce_zero_label: bool) -> str:
    """The annotations' values that count as unlabelled."""
    void = next(void for void in (255, 65535) if void > num_classes - (not reduce_zero_label))
    return f"0 or {void}" if reduce_zero_label else f"{void}"


def _bad_files(count: int) -> str:
    return f"{count or 'no'} bad file{'s' if count > 1 else ''}"


class _Checked(torch.utils.data.Dataset):
    """Pair i as (histogram (C + 1,) with the ignored pixels last, (H, W), problem or None, warning or None).

    There is a histogram too, of the other labels, where the problem is a label out of range; else None with a problem.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], classes: ClassList, reduce_zero_label: bool):
        self.pairs, self.classes, self.reduce_zero_label = pairs, classes, reduce_zero_label

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[np.ndarray | None, tuple[int, int], str | None, str | None]:
        num_classes, problem = self.classes.num_classes, None
        try:
            _, target = read_pair(*self.pairs[i], self.classes, self.reduce_zero_label)
            size = target.shape
        except ForeignLabel as error:  # its other labels are none the worse for it
            problem, labels = str(error), read_labels(self.pairs[i][1])
            size, wrong = labels.shape, foreign(labels, num_classes, self.reduce_zero_label)
            target = to_target(labels[~wrong], num_classes, self.reduce_zero_label)
        except UserError as error:
            return None, (0, 0), str(error), None
        ignored = default_ignore_index(num_classes)
        if ignored < 0:
            target, ignored = np.where(target == ignored, num_classes, target), num_classes
        counts = np.bincount(target.ravel(), minlength=max(256, num_classes + 1))
        counts = np.append(counts[:num_classes], counts[ignored])
        return counts, size, problem, _orientation_warning(self.pairs[i][0])


def _orientation_warning(image: Path) -> str | None:
    orientation = exif_orientation(image)
    if orientation == 1:
        return None
    return (
        f"{image}: EXIF orientation {orientation} is not applied: training and evaluation take image and annotation as "
        "they are stored, while predict turns the image upright; store it upright where the two should agree"
    )


def check_data(
    root: str | Path,
    classes: ClassList,
    splits: tuple[str, ...] = ("training", "validation"),
    reduce_zero_label: bool = True,
    workers: int = 0,
    progress: bool = False,
) -> DataReport:
    """Reads every file of a data set once, with `workers` processes.

    Returns a report with counts, the label histogram and one line for every file that is missing, unreadable,
    of another size than its annotation, or holds a label out of range (its other labels count), and a warning for every
    image with an EXIF orientation. Nothing is printed except, on request, a progress bar. Raises UserError where a
    folder is missing or empty.
    """
    reports = []
    for split in splits:
        images, annotations, missing = list_pairs(Path(root), split)
        counts = (np.zeros(classes.num_classes, np.int64) for _ in range(2))
        report = SplitReport(split, len(images), len(annotations), *counts)
        report.problems = [f"{path}: {message}" for path, message in missing]
        pairs = [(images[stem], annotations[stem]) for stem in images if stem in annotations]
        for counts, size, problem, warning in each_sample(
            _Checked(pairs, classes, reduce_zero_label), workers, f"checking {split}", progress
        ):
            if problem is not None:
                report.problems.append(problem)
                report.foreign += counts is not None
            if counts is None:
                continue
            if warning is not None:
                report.warnings.append(warning)
            report.pixels += counts[:-1]
            report.images_with += counts[:-1] > 0
            report.ignored += int(counts[-1])
            area = size[0] * size[1]
            if not report.smallest[0] or area < report.smallest[0] * report.smallest[1]:
                report.smallest = size
            if area > report.largest[0] * report.largest[1]:
                report.largest = size
        if report.ignored and not report.pixels.any() and not report.foreign:
            folder = Path(root) / "annotations" / split
            unlabelled = _unlabelled(classes.num_classes, reduce_zero_label)
            report.problems.append(
                f"{folder}: no pixel is labelled, in none of the annotations ({unlabelled} everywhere)"
            )
        reports.append(report)
    return DataReport(reports, classes, reduce_zero_label)
