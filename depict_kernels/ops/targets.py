"""Targets: which values are valid, and what happens to the others (numbers policy, design of the loss).

No kernel reads or writes out of bounds because of a label. On the CPU a bad label raises at once. On a GPU
that would need a host sync: the label counts as ignored, the loss becomes NaN, and the first bad value and
its position go to a buffer on the device that :func:`raise_on_bad_target` reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from depict_kernels._constant import constant_in_graphs

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_records: dict[torch.device, Tensor] = {}


def default_ignore_index(num_classes: int) -> int:
    """255 up to 255 classes and -100 above, so that class 255 of a large label set is never dropped silently."""
    return 255 if num_classes <= 255 else -100


def check_target_tensor(logits: Tensor, target: Tensor) -> None:
    """Raises TypeError or ValueError unless target is an integer (B, H, W) that fits logits (B, C, h, w)."""
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be uint8, int8, int16, int32 or int64, got {target.dtype}")
    if target.ndim != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"target must be (B, H, W) with B = {logits.shape[0]} as in logits {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and target on {target.device}; move one of them")
    if target.shape[0] > 0 and (target.shape[1] == 0 or target.shape[2] == 0):
        raise ValueError(f"target must have at least one pixel, got {tuple(target.shape)}")


def sanitize_target(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """target (B, H, W) of integers -> (contiguous int64 target with bad labels ignored, report).

    The report is int64 (5,): [1 if any label is bad, first bad value, its b, y, x]. No host sync.
    """
    target = target.long().contiguous()
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if target.numel() == 0:
        return target, torch.zeros(5, dtype=torch.int64, device=target.device)
    flat = bad.flatten()
    first = flat.to(torch.uint8).argmax()
    height, width = target.shape[-2:]
    position = [first // (height * width), first // width % height, first % width]
    value = target.flatten().gather(0, first[None])[0]  # an index without axes would be waited for
    report = torch.stack([flat.any().long(), value, *position])
    return torch.where(bad, ignore_index, target), report * report[0]


def bad_target_message(report: list[int], num_classes: int, ignore_index: int) -> str:
    """The error text for a report of :func:`sanitize_target`."""
    _, value, b, y, x = report
    return (
        f"target value {value} at (batch {b}, row {y}, column {x}) is neither a class in [0, {num_classes}) "
        f"nor ignore_index ({ignore_index})"
        + ("; cross-entropy takes a logit per class, the background's too" if num_classes == 1 else "")
    )


def raise_if_bad(report: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError if a report of :func:`sanitize_target` names a bad label. Synchronises with the device."""
    values = report.tolist()
    if values[0]:
        raise ValueError(bad_target_message(values, num_classes, ignore_index))


torch.library.define(
    "depict_kernels::scan_target",
    "(Tensor target, int num_classes, int ignore_index, bool raise_now) -> (Tensor, Tensor)",
)


@torch.library.impl("depict_kernels::scan_target", "CompositeExplicitAutograd")
def _scan_target(target: Tensor, num_classes: int, ignore_index: int, raise_now: bool):
    clean, report = sanitize_target(target, num_classes, ignore_index)
    if raise_now:
        raise_if_bad(report, num_classes, ignore_index)
    return clean.clone() if clean is target else clean, report


@torch.library.register_fake("depict_kernels::scan_target")
def _(target, num_classes, ignore_index, raise_now):
    return target.new_empty(target.shape, dtype=torch.int64), target.new_empty(5, dtype=torch.int64)


torch.library.define("depict_kernels::record_bad_target", "(Tensor(a!) record, Tensor report) -> ()")


@torch.library.impl("depict_kernels::record_bad_target", "CompositeExplicitAutograd")
def _record_bad_target(record: Tensor, report: Tensor) -> None:
    record.copy_(torch.where(record[0] > 0, record, report))  # the first record stays until it is read


@torch.library.register_fake("depict_kernels::record_bad_target")
def _(record, report):
    return None


def _record_under_vmap(info, in_dims, record: Tensor, report: Tensor):
    reports = report.movedim(in_dims[1], 0)
    first = reports[:, 0].argmax().expand(1, reports.shape[1])
    return torch.ops.depict_kernels.record_bad_target(record, reports.gather(0, first)[0]), None


torch.library.register_vmap("depict_kernels::record_bad_target", _record_under_vmap)


@constant_in_graphs  # made while compiling, not in the graph, whose first call would be another one
def _make_record(device: torch.device) -> bool:
    """Makes the device's buffer where there is none; returns whether it did."""
    if device in _records:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the record of bad labels cannot be made while a CUDA graph is being captured; call the loss (or "
            f"upsample_confusion) once on {device} before the capture, as its warm-up, or pass check_targets=False"
        )
    # An evaluation may come first: training could not write to an inference tensor.
    with torch.inference_mode(False):
        _records.setdefault(device, torch.zeros(5, dtype=torch.int64, device=device))  # one of all threads
    return True


def record_bad_target(report: Tensor) -> None:
    """Keeps the first bad label's report in the buffer of its device, without a host sync.

    The buffer is made at first use and stays where it is, so that a CUDA graph writes to it at every replay. A capture
    cannot make it: the zeros would be part of the graph, and every replay would forget what was recorded.

    Reports without values (fake or meta tensors, of a trace or an estimate) leave no record. Under torch.vmap b, y, x
    are those within the first sample that has a bad label.

    Raises RuntimeError for a first use inside of a capture.
    """
    # (Of what is compiled the tensors are real when it runs.)
    if report.device.type == "meta" or (not torch.compiler.is_dynamo_compiling() and is_fake(report)):
        return
    _make_record(report.device)
    torch.ops.depict_kernels.record_bad_target(_records[report.device], report)


def raise_on_bad_target() -> None:
    """Raises ValueError if a loss met a label that is neither a class nor ignored since the last call.

    Synchronises with each GPU on which a loss was computed; call it where the program waits anyway, for
    example when it logs. It sees what replays of CUDA graphs recorded; call it outside of captures.
    """
    for device, record in _records.items():
        report = record.tolist()
        if report[0]:
            record.zero_()
            _, value, b, y, x = report
            raise ValueError(
                f"target value {value} at (batch {b}, row {y}, column {x}) of a batch on {device} is neither "
                "a class nor ignore_index; the loss of that batch is NaN"
            )
