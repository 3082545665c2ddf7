"""What backends ``triton`` and ``cuda`` share: the scratch buffer and its bands, bad labels, empty batches."""

import importlib

import pytest
import torch
from upsample_checks import stock

from depict_kernels import ops
from depict_kernels.ops import _tiled_upsample as tiled
from depict_kernels.testing import logits_and_target


@pytest.mark.parametrize("room", range(1, 30))
def test_every_row_is_there_when_it_is_needed(room, monkeypatch):
    monkeypatch.setattr(tiled, "SCRATCH", 10 * room)
    for batch, h in [(1, 1), (1, 7), (2, 1), (3, 4), (4, 2)]:
        held, bands = tiled.bands(batch, h, 10)
        assert 2 <= held <= max(2, room)
        assert (len(bands) == 1) == (batch * (h + 1) <= max(2, room))
        buffer, cells, samples = {}, [], []
        for band in bands:
            for row in range(band.first, band.first + band.rows):
                buffer[row % held] = row
                cells.append(row)
            for row in range(band.first_sample, band.first_sample + band.sample_rows):
                upper = row // h * (h + 1) + row % h
                assert buffer[upper % held] == upper and buffer[(upper + 1) % held] == upper + 1
                samples.append(row)
        assert cells == list(range(batch * (h + 1))) and samples == list(range(batch * h))


# B, C, low, high; reduction, class weights?, label smoothing. Small: the interpreter takes seconds each.
CASES = {
    "some images": ((3, 5, (2, 1), (5, 3)), "mean", True, 0.1),
    "parts of cells": ((1, 2, (2, 1), (35, 3)), "sum", False, 0.0),
    "parts of cells, per pixel": ((2, 3, (1, 1), (18, 3)), "none", False, 0.1),
    "down, per pixel": ((1, 4, (5, 2), (2, 3)), "none", True, 0.0),
    "one row": ((3, 2, (1, 2), (2, 3)), "mean", False, 0.0),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", CASES)
def test_bands_change_no_bit(name, kernels32, monkeypatch):
    case, reduction, weighted, smoothing = CASES[name]
    upsample = importlib.import_module(f"depict_kernels.ops.{kernels32.backend}_kernels.upsample")
    logits, target = logits_and_target(*case, ignored=0.2)
    target[0, 0, 0], target[-1, -1, -1] = 0, 99  # one valid pixel at least, and a bad one
    logits[:, :, 0] *= 60  # tiles that a series cannot hold
    logits, target = logits.to(kernels32.device), target.to(kernels32.device)
    weight = torch.linspace(0.5, 2, case[1], device=kernels32.device) if weighted else None
    upstream = torch.linspace(-1, 1, target.numel(), device=kernels32.device).view(target.shape)
    options = (logits, target, weight, 255, smoothing)
    row_bytes, counts, original = [], [], tiled.bands

    def spy(batch, h, size):
        held, parts = original(batch, h, size)
        row_bytes.append(size)
        counts.append(len(parts))
        return held, parts

    def run():
        loss, grad, report = upsample.cross_entropy_forward(*options, reduction, True)
        if reduction == "none":
            grad = upsample.cross_entropy_backward(upstream, *options)
        return loss, grad, report

    monkeypatch.setattr(tiled, "bands", spy)
    expected = run()
    assert expected[1].isfinite().all() and expected[1].abs().max() > 0
    for rows in (0, 3):  # two are held at least
        monkeypatch.setattr(tiled, "SCRATCH", rows * row_bytes[0])
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    total = case[0] * (case[2][0] + 1)
    assert counts == [1, total, 1 if total <= 3 else -(-total // 2)]


def test_float64_in_bands(triton_device, monkeypatch):
    from depict_kernels.ops.triton_kernels import upsample

    logits, target = logits_and_target(2, 3, (2, 1), (5, 3), dtype=torch.float64)
    options = (logits.to(triton_device), target.to(triton_device), None, 255, 0.1, "mean", True)
    expected = upsample.cross_entropy_forward(*options)
    monkeypatch.setattr(tiled, "SCRATCH", 1)
    torch.testing.assert_close(upsample.cross_entropy_forward(*options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    "grid, size, bands",
    [((32, 32), (512, 512), 1), ((128, 128), (512, 512), None), ((128, 256), (1024, 2048), None)],
    ids=str,
)
def test_the_buffer_stays_within_its_bound(backend, grid, size, bands, monkeypatch):
    """On meta tensors: what the training call of 8 images and 150 classes would launch and allocate."""
    if backend == "triton":
        pytest.importorskip("triton")
    upsample = importlib.import_module(f"depict_kernels.ops.{backend}_kernels.upsample")
    buffers, gathered = set(), []

    def record(samples, scale, grad, size, first, rows):
        buffers.add((id(samples), samples.numel() * samples.element_size()))
        gathered.append(rows)

    kept = []  # no id comes twice
    monkeypatch.setattr(upsample._upsample, "gather", lambda *a: (kept.append(a), record(*a))[1])
    logits, target = torch.empty(8, 150, *grid, device="meta"), torch.empty(8, *size, device="meta").byte()
    if backend == "cuda":
        monkeypatch.setattr(upsample, "call", lambda *_, **__: None)
        upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    else:
        from depict_kernels.ops.triton_kernels import launch

        with launch.recording("sm_90"):
            upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    assert len(buffers) == 1 and buffers.pop()[1] <= tiled.SCRATCH
    assert sum(gathered) == 8 * grid[0]
    assert len(gathered) == 1 if bands == 1 else len(gathered) > 1


def test_bad_labels_through_the_public_operators(kernels32):
    backend, device, _ = kernels32
    logits, target = (t.to(device) for t in logits_and_target(1, 5, (1, 2), (2, 3), ignored=0))
    target[0, 1, 2] = 9
    words = r"target value 9 at \(batch 0, row 1, column 2\)"
    loss = lambda check: ops.upsample_cross_entropy(logits, target, check_targets=check, backend=backend)
    with pytest.raises(ValueError, match=words):
        loss(True)
    assert loss(False).isfinite()
    if device == "cpu":
        with pytest.raises(ValueError, match=words):
            ops.upsample_confusion(logits, target, backend=backend)
    else:
        assert loss(None).isnan()
        with pytest.raises(ValueError, match=words):
            ops.raise_on_bad_target()


def test_empty_batch(kernels32):
    backend, device, _ = kernels32
    logits = torch.zeros(0, 3, 2, 2, device=device, requires_grad=True)
    for shape in ((0, 5, 5), (0, 0, 0)):
        target = torch.zeros(shape, dtype=torch.uint8, device=device)
        for reduction in ("mean", "none"):
            loss = ops.upsample_cross_entropy(logits, target, reduction=reduction, backend=backend)
            loss.sum().backward()
            assert loss.shape == (() if reduction == "mean" else shape) and loss.sum() == 0
        assert ops.upsample_confusion(logits, target, backend=backend).eq(0).all()
    assert logits.grad.shape == logits.shape
    assert ops.upsample_argmax(logits, (5, 5), backend=backend).shape == (0, 5, 5)


def masked_losses(kernels, logits, target, smoothing):
    """Per-pixel loss and gradient: a backend's, and stock torch's in float32 on the CPU."""
    upsample = importlib.import_module(f"depict_kernels.ops.{kernels.backend}_kernels.upsample")
    upstream = torch.ones(target.shape)
    inputs = [t.to(kernels.device) for t in (logits, target)]
    loss, _, _ = upsample.cross_entropy_forward(*inputs, None, 255, smoothing, "none", True)
    grad = upsample.cross_entropy_backward(upstream.to(kernels.device), *inputs, None, 255, smoothing)
    expected = stock(logits, target, torch.float32, upstream, smoothing=smoothing, reduction="none")
    return (loss.cpu(), grad.cpu()), expected


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e30])
def test_each_side_of_an_image_has_classes_of_its_own(value, kernels32):
    """Between the two every logit is huge; classes that are masked alike tie there, as in stock torch."""
    logits = torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 2:4, :, :2] = logits[:, :2, :, 2:] = logits[:, 4] = value
    target = torch.arange(9 * 40).view(1, 9, 40) % 2
    target[..., 20:] += 2
    result, expected = masked_losses(kernels32, logits, target, 0.0)
    assert expected[0].max() < 8
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_smoothing_over_two_masked_classes_is_finite(kernels32):
    """Their sum is no float32, but its share at most pixels is."""
    logits = torch.randn(1, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    logits[0, 3:, 0, 0] = torch.finfo(torch.float32).min
    target = torch.arange(9 * 10).view(1, 9, 10) % 3
    (loss, grad), expected = masked_losses(kernels32, logits, target, 0.1)
    finite = expected[0].isfinite()
    assert finite.any() and not finite.all()
    torch.testing.assert_close(loss[finite], expected[0][finite], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-5)
