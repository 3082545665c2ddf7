"""The C++ kernels on odd and on large inputs: threads, special numbers, labels, memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cpp_problems import compiled, needs_extension, ulps
from upsample_checks import IGNORE, stock, upsample

from depict_kernels.ops.compiled import upsample as kernels
from depict_kernels.testing import assert_within_budget, max_error

ROOT = Path(__file__).resolve().parents[1]

pytestmark = needs_extension


# --- determinism ---


@pytest.mark.parametrize("low", [9, 75])  # one cell row in a band, and four
def test_bitwise_equal_over_threads(low, threads):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 70, low, 11, generator=generator) * torch.tensor([1.0, 30.0])[:, None, None, None]
    target = torch.randint(0, 70, (2, 130, 121), generator=generator)
    upstream = torch.randn(target.shape, generator=generator)
    results = []
    for count in (1, 2, 4):
        threads(count)
        confusion = torch.zeros(70, 70, dtype=torch.int64)
        kernels.confusion(logits, target, IGNORE, confusion)
        results.append(
            [
                *compiled(
                    logits,
                    target,
                    smoothing=0.1,
                    weight=torch.rand(70, generator=torch.Generator().manual_seed(2)),
                ),
                *compiled(logits, target, reduction="none", upstream=upstream),
                kernels.argmax(logits, (130, 121), torch.uint8),
                confusion,
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# --- odd inputs ---


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "low, high",
    [
        ((1, 1), (7, 5)),
        ((5, 7), (3, 2)),
        ((4, 4), (1, 9)),
        ((6, 1), (6, 1)),
        ((40, 3), (17, 8)),
        ((140, 2), (50, 9)),
    ],
    ids=str,
)
def test_every_output_element_is_written(low, high):
    logits = torch.randn(2, 6, *low)
    target = torch.full((2, *high), IGNORE)
    assert not compiled(logits, target)[1].any()
    target[0] = 3
    loss, grad = compiled(logits, target)
    assert loss.isfinite() and grad.isfinite().all() and not grad[1].any()
    loss, grad = compiled(logits, target, reduction="none", upstream=torch.ones(target.shape))
    assert loss.isfinite().all() and grad.isfinite().all() and not loss[1].any()
    assert (kernels.argmax(logits, high, torch.int64) < 6).all()


def test_empty_batch():
    logits, target = torch.zeros(0, 5, 3, 3), torch.zeros(0, 6, 6, dtype=torch.int64)
    loss, grad = compiled(logits, target)
    assert loss == 0 and grad.shape == logits.shape
    assert kernels.argmax(logits, (6, 6), torch.uint8).shape == (0, 6, 6)
    out = torch.ones(5, 5, dtype=torch.int64)
    kernels.confusion(logits, target, IGNORE, out)
    assert (out == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 4)], ids=str)
def test_nan_and_infinity_give_a_nan_loss(value, place, instruction_set):
    logits = torch.randn(1, 20, 5, 5)
    logits[0, 7, place[0], place[1]] = value
    target = torch.zeros(1, 40, 40, dtype=torch.int64)
    loss, grad = compiled(logits, target)
    assert loss.isnan() and grad.isnan().any()
    single, _ = compiled(logits, target, reduction="none", upstream=torch.ones(1, 40, 40))
    expected, _ = stock(logits, target, torch.float32, reduction="none", upstream=torch.ones(1, 40, 40))
    inner = slice(4, 36)  # at the borders torch multiplies by a weight of zero
    assert torch.equal(single[:, inner, inner].isnan(), expected[:, inner, inner].isnan())


def test_minus_infinity_is_a_class_that_cannot_be(instruction_set):
    logits = torch.randn(1, 20, 6, 6)
    logits[0, 7, 2, 3] = -math.inf
    target = torch.zeros(1, 96, 96, dtype=torch.int64)
    loss, grad = compiled(logits, target)
    truth, peer = stock(logits, target, torch.float64), stock(logits, target, torch.float32)
    assert truth[0].isfinite()
    assert_within_budget(loss, peer[0], truth[0])
    finite = truth[1].isfinite()
    assert_within_budget(grad[finite], peer[1][finite], truth[1][finite])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_bad_label_is_named_and_the_first_one(dtype, threads):
    threads(4)
    logits = torch.randn(3, 90, 7, 7)
    target = torch.full((3, 50, 60), 89, dtype=dtype)
    wrong = 120 if dtype in (torch.uint8, torch.int8) else -7000
    target[2, 0, 0] = target[1, 40, 3] = target[1, 13, 59] = wrong
    out = torch.zeros(90, 90, dtype=torch.int64)
    calls = [
        lambda: kernels.cross_entropy_forward(logits, target, None, -100, 0.0, "mean", True),
        lambda: kernels.cross_entropy_forward(logits, target, None, -100, 0.1, "none", False),
        lambda: kernels.confusion(logits, target, -100, out),
    ]
    for call in calls:
        result = call()
        report = result[-1] if isinstance(result, tuple) else result
        assert report.tolist() == [1, wrong, 1, 13, 59]
    assert not out.any()


def test_extreme_int64_labels_touch_nothing():
    logits = torch.randn(1, 4, 3, 3)
    for value in (2**63 - 1, -(2**63), 2**32, 2**31, 4):
        target = torch.zeros(1, 9, 9, dtype=torch.int64)
        target[0, 8, 8] = value
        report = kernels.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)[-1]
        assert report.tolist() == [1, value, 0, 8, 8]


def test_ignore_index_may_be_a_class():
    logits, target = torch.randn(1, 5, 4, 4), torch.randint(0, 5, (1, 30, 30))
    truth, peer = (stock(logits, target, dtype, ignore_index=2) for dtype in (torch.float64, torch.float32))
    for value, p, t in zip(compiled(logits, target, ignore_index=2), peer, truth):
        assert_within_budget(value, p, t)


# --- size ---


def test_more_than_two_to_the_31_upsampled_elements():
    generator = torch.Generator().manual_seed(0)
    size, classes = 4000, 150  # 2.4e9 elements
    logits = torch.randn(1, classes, 8, 8, generator=generator)
    target = torch.full((1, size, size), IGNORE, dtype=torch.uint8)
    rows = torch.tensor([0, 1, 249, 250, 251, 1777, 3749, 3750, 3998, 3999])
    target[0, rows] = torch.randint(0, classes, (len(rows), size), generator=generator, dtype=torch.uint8)
    loss, grad = compiled(logits, target)

    x = logits.double().requires_grad_()
    weights = upsample(torch.eye(8, dtype=torch.float64)[None, :, :, None], (size, 1))[
        0, :, :, 0
    ]  # (8, size)
    some = torch.einsum("cij,ir,jx->rcx", x[0], weights[:, rows], weights)  # a tile of the upsampled logits
    truth = F.cross_entropy(some, target[0, rows].long())
    truth.backward()
    y = logits.clone().requires_grad_()
    some = torch.einsum("cij,ir,jx->rcx", y[0], weights[:, rows].float(), weights.float())
    peer = F.cross_entropy(some, target[0, rows].long())
    peer.backward()
    assert ulps(loss, truth) <= 1
    assert_within_budget(grad, y.grad, x.grad)

    # All pixels valid, logits constant in space: loss and gradient in closed form.
    flat = logits[:, :, :1, :1].expand(1, classes, 8, 8)
    loss, grad = compiled(flat, torch.full_like(target, 149))
    log_p = flat[0, :, 0, 0].double().log_softmax(0)
    assert ulps(loss, -log_p[149]) <= 1
    expected = log_p.exp() - F.one_hot(torch.tensor(149), classes)
    assert max_error(grad.double().sum((0, 2, 3)), expected) < 1e-6


_MEMORY = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from depict_kernels.ops.compiled import upsample as kernels

def measure(size):
    torch.set_num_threads(2)
    small = torch.randn(1, 5, 2, 2)
    kernels.cross_entropy_forward(small, torch.zeros(1, 9, 9, dtype=torch.uint8), None, 255, 0.0, "mean", True)
    logits, target = torch.randn(2, 150, 32, 32), torch.full((2, size, size), 3, dtype=torch.uint8)
    status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    kernels.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    print((status("VmHWM") - before) / 1024, flush=True)

for size in (512, 2048):
    if os.fork() == 0:
        measure(size)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_image():
    command = [sys.executable, "-c", _MEMORY, str(ROOT)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    at_512, at_2048 = map(float, output.split())
    assert 1 < at_512 < 16  # MiB, gradient included; the upsampled logits alone would take 300 and 4800
    assert at_2048 < at_512 + 2
