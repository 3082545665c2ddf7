"""Pixel accuracy, mean accuracy and IoU from one confusion matrix that is streamed over the whole split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from depict_kernels.ops import default_ignore_index


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise ratio in float64, NaN where the denominator is 0."""
    return numerator.double() / torch.where(denominator == 0, torch.nan, denominator.double())


def _value(x: Tensor) -> float | None:
    return None if x.isnan() else x.item()


def iou_lines(results: dict, most: int = 30) -> list[str]:
    """IoU per class for the console: the classes that have one, in their order, or of more the lowest ``most``."""
    known = {name: value for name, value in results["iou_per_class"].items() if value is not None}
    lowest = dict(sorted(known.items(), key=lambda item: item[1])[:most])
    shown = known if len(known) <= most else lowest
    head = "IoU of each class" if shown is known else f"IoU of the lowest {most} of {len(known)} classes"
    lines = [f"  {head}", *(f"    {value:.4f}  {name}" for name, value in shown.items())]
    absent = [name for name, value in results["iou_per_class"].items() if value is None]
    if absent:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        lines.append(f"    neither annotated nor predicted: {', '.join(absent[:8])}{more}")
    return lines


class SegmentationMetrics:
    """Scores of label maps against targets, by the definitions of the ADE20K benchmark.

    One int64 matrix counts (target, label) over every valid pixel of the split, so that the scores depend
    neither on the order of the images nor on which process saw which. torchmetrics' confusion matrix
    accumulates; the scores are formed here, since its Jaccard index gives a number where a class that
    occurs on neither side has none, and would not share its matrix with the two accuracies.

    Args:
        num_classes: C.
        class_names: C names, all different: the keys of ``iou_per_class``.
        device: where the matrix lives (NCCL reduces only tensors on the GPU).
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        class_names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
        self.num_classes = num_classes
        self.class_names = class_names
        self.ignore_index = default_ignore_index(num_classes)
        # validate_args would sort all pixels to find foreign values, which update does for less; a sync inside
        # compute() would hang as soon as one process alone asks for the results.
        self._matrix = MulticlassConfusionMatrix(
            num_classes, ignore_index=self.ignore_index, validate_args=False, sync_on_compute=False
        ).to(device)

    @property
    def confusion(self) -> Tensor:
        """(C, C) int64, rows = target, columns = label; ``upsample_confusion`` may add into it."""
        return self._matrix.confmat

    def update(self, labels: Tensor, target: Tensor) -> None:
        """Adds label maps: ``labels`` and ``target`` of one shape and any integer dtypes.

        Raises ValueError where the shapes differ, or a target is neither a class nor ``ignore_index``.
        """
        if labels.shape != target.shape:
            raise ValueError(
                f"label map {tuple(labels.shape)} and target {tuple(target.shape)} differ in size"
            )
        device = self.confusion.device
        # uint8 has no room for -100 or 300.
        labels, target = labels.to(device), target.to(device, torch.int64)
        foreign = (target != self.ignore_index) & ((target < 0) | (target >= self.num_classes))
        if foreign.any():
            value = target[foreign][0].item()
            raise ValueError(
                f"target value {value} is neither a class (0..{self.num_classes - 1}) "
                f"nor the ignored {self.ignore_index}"
            )
        self._matrix.update(labels, target)

    def results(self) -> dict:
        """{"miou", "pixel_accuracy", "mean_accuracy": float | None, "iou_per_class": {name: float | None}}.

        All in 0..1. IoU of class c is n_cc / (targets c + labels c - n_cc). A class that occurs neither as
        target nor as label is None and left out of mIoU; one that is only ever predicted counts as 0. The
        mean accuracy is over the classes that occur as targets. None where no pixel was valid.
        """
        n = self.confusion.cpu()
        hits, targets, labels = n.diagonal(), n.sum(1), n.sum(0)
        iou = _ratio(hits, targets + labels - hits)
        return {
            "miou": _value(iou.nanmean()),
            "pixel_accuracy": _value(_ratio(hits.sum(), n.sum())),
            "mean_accuracy": _value(_ratio(hits, targets).nanmean()),
            "iou_per_class": {name: _value(value) for name, value in zip(self.class_names, iou)},
        }
