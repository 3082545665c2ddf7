"""The C++ kernels against float64 torch: accuracy, odd inputs, determinism, memory; on every instruction set."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depict_kernels import extension
from depict_kernels.ops.compiled import upsample as kernels
from depict_kernels.testing import assert_within_budget, max_error

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(extension.load("cpu") is not None, reason=str(extension.load("cpu")))

INSTRUCTION_SETS = ["avx512", "avx2", "baseline"]
IGNORE = 255


def _use(name: str) -> str:
    return torch.ops.depict_kernels_cpu.use_instruction_set(name)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    extension.load("cpu")
    if request.param not in torch.ops.depict_kernels_cpu.instruction_sets().split():
        pytest.skip(f"this processor or build has no {request.param}")
    before = _use("")
    yield _use(request.param)
    _use(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def upsample(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def stock(
    logits, target, dtype, *, upstream=None, ignore_index=IGNORE, weight=None, smoothing=0.0, reduction="mean"
):
    """Loss and gradient of stock torch in `dtype`; upstream is the gradient of reduction "none"."""
    x = logits.detach().to(dtype).requires_grad_()
    loss = F.cross_entropy(
        upsample(x, target.shape[1:]),
        target.long(),
        weight=None if weight is None else weight.to(dtype),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    loss.backward(None if upstream is None else upstream.to(dtype))
    return loss.detach(), x.grad


def compiled(
    logits, target, *, upstream=None, ignore_index=IGNORE, weight=None, smoothing=0.0, reduction="mean"
):
    loss, grad = kernels.cross_entropy_forward(
        logits, target, weight, ignore_index, smoothing, reduction, True
    )
    if reduction == "none":
        assert grad is None
        grad = kernels.cross_entropy_backward(upstream, logits, target, weight, ignore_index, smoothing)
    return loss, grad


def ulps(value, truth):
    return abs(value.double().item() - truth.item()) / (math.ulp(abs(truth.float().item())) * 2**29)


# --- accuracy on the shapes that matter ---


def _smooth(seed, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 150, 4, 4, generator=generator) * 4
    return F.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=True) * sharpness


def _adversarial():
    """Classes that swap over a cell, so that a pixel's sum is far below its cell's, at every threshold."""
    values = torch.tensor([0.0, -19.0, -21.0, -41.0, -43.0, -65.0, -67.0, -88.0, -300.0, -3000.0])
    generator = torch.Generator().manual_seed(5)
    logits = values[torch.randint(0, len(values), (1, 150, 16, 16), generator=generator)]
    logits[:, 1:3] = torch.tensor([0.0, -300.0])[(torch.arange(16)[:, None] + torch.arange(16)) % 2]
    logits[:, 2] = -300.0 - logits[:, 1]
    logits[:, 3] = -20.0
    return logits


def _case(name):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 150, 16, 16, generator=generator)
    target = torch.randint(0, 150, (1, 256, 256), generator=generator)
    if name == "adversarial":
        return _adversarial(), target
    kind, sharpness, *right = name.replace(",", "").split()
    sharpness = float(sharpness.removeprefix("x"))
    logits = _smooth(1, sharpness) if kind == "smooth" else noise * sharpness
    return logits, upsample(logits, (256, 256)).argmax(1) if right else target


KINDS = [f"{kind} x{sharpness}" for kind in ("random", "smooth") for sharpness in (1, 5, 30, 200)]
CASES = [*KINDS, *(f"{kind}, right" for kind in KINDS), "adversarial"]


@functools.cache
def _reference(name):
    logits, target = _case(name)
    return logits, target, stock(logits, target, torch.float64), stock(logits, target, torch.float32)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", ["every class", "every class of one sample", "one class", "both ends"])
def test_samples_masked_with_the_lowest_number(instruction_set, dtype, masked):
    """Class lanes are padded with a low number: no real one may lose against it, and no label may be a padded one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 3, generator=generator, dtype=dtype)
    target = torch.randint(0, 2, (2, 31, 20), generator=generator)
    if masked == "every class":
        logits[:] = -2e38
    elif masked == "every class of one sample":
        logits[:, :, 1, 1] = LOWEST
    elif masked == "one class":
        logits[:, 3] = LOWEST
    else:
        logits[:, 3, 1, 1], logits[:, 4, 0, 2] = LOWEST, -LOWEST
    labels = kernels.argmax(logits, (31, 20), torch.int64)
    assert labels.max() < 5
    exact = upsample(logits.double(), (31, 20))
    best, own = exact.amax(1), exact.gather(1, labels[:, None])[:, 0]
    assert (best - own <= 1e-6 * exact.abs().amax(1)).all()
    count = torch.zeros(5, 5, dtype=torch.int64)
    kernels.confusion(logits, target, IGNORE, count)
    pairs = torch.bincount((target * 5 + labels).flatten(), minlength=25)
    assert torch.equal(count, pairs.view(5, 5))
    if masked != "both ends" and dtype == torch.float32:  # there stock torch overflows
        for result, peer, exact in zip(
            compiled(logits, target), stock(logits, target, dtype), stock(logits, target, torch.float64)
        ):
            assert_within_budget(result, peer, exact)


@pytest.mark.parametrize("size", [(31, 20), (4, 4)], ids=["series", "careful"])
@pytest.mark.parametrize("value", [1e13, -3e38])
def test_unreduced_loss_of_huge_equal_logits(instruction_set, value, size):
    logits = torch.full((1, 4, 3, 3), value)
    loss, _ = kernels.cross_entropy_forward(
        logits, torch.ones(1, *size, dtype=torch.int64), None, IGNORE, 0.0, "none", False
    )
    torch.testing.assert_close(loss, torch.full((1, *size), 4.0).log(), rtol=1e-6, atol=0)  # a few ulp


@pytest.mark.parametrize("name", CASES)
def test_gradient_error_is_at_most_torchs_and_loss_within_one_ulp(name, instruction_set):
    logits, target, (loss64, grad64), (_, grad32) = _reference(name)
    loss, grad = compiled(logits, target)
    assert max_error(grad, grad64) <= max_error(grad32, grad64)
    assert ulps(loss, loss64) <= 1


@pytest.mark.parametrize("sharpness", [1, 5, 30, 200])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_loss_within_one_ulp_for_every_seed(kind, sharpness, instruction_set):
    """One ulp, not the error budget, which stock torch's own error of up to 23 ulp would make empty here. The targets
    are the label map: the loss is as small as a trained model's. At x 200 smooth logits of 2000 have a loss of 0.003;
    the series' rounding, of either sign, then leaves up to 2 ulp (5e-10) on an image this small.
    """
    worst = 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 150, 16, 16, generator=generator) * sharpness
        logits = _smooth(seed, sharpness) if kind == "smooth" else noise
        exact = upsample(logits.double(), (256, 256))
        target = exact.argmax(1)
        loss, _ = kernels.cross_entropy_forward(logits, target, None, IGNORE, 0.0, "mean", False)
        worst = max(worst, ulps(loss, F.cross_entropy(exact, target)))
    assert worst <= (2 if kind == "smooth" and sharpness == 200 else 1)


@pytest.mark.parametrize("first", [0.0, -20.0, -300.0])
@pytest.mark.parametrize("size", [(1, 16), (16, 1), (16, 16), (5, 40), (64, 64)], ids=str)
def test_the_sum_that_vanishes_inside_a_cell(first, size, instruction_set):
    # corners (0 -> -300), (-300 -> 0), (-20, -20): the last pixel's sum is 4e4 times too small and still 2e-9
    rows = torch.tensor([[0.0, -300.0], [-300.0, 0.0], [-20.0, -20.0], [first, first]])
    logits = torch.stack([rows, rows.flip(1)], 1)[None]
    target = torch.arange(size[0] * size[1]).reshape(1, *size) % 4
    truth, peer = stock(logits, target, torch.float64), stock(logits, target, torch.float32)
    for value, p, t in zip(compiled(logits, target), peer, truth):
        assert_within_budget(value, p, t)


def test_steep_cells_of_few_rows(instruction_set):
    # Two classes that trade places over a cell: exponentials shrink by e^-20 from one row or pixel to the next.
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, -20.0, -41.0, -43.0, -65.0, -67.0, -90.0, -1000.0])
    steep = torch.tensor([[0.0, 0.0, -24.4, -65.4], [-23.9, -25.7, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    for i in range(150):
        size = [(6, 18), (10, 7), (18, 50)][i % 3]
        noise = torch.randn(1, 2, 2, 2, generator=generator) * 0.3
        logits = steep if i < 3 else levels[torch.randint(0, 8, (1, 2, 2, 2), generator=generator)] + noise
        target = torch.randint(0, 2, (1, *size), generator=generator)
        truth, peer = (stock(logits, target, dtype) for dtype in (torch.float64, torch.float32))
        for value, p, t in zip(compiled(logits, target), peer, truth):
            assert_within_budget(value, p, t, ulps=8, scale=0.25)


# --- properties ---


@st.composite
def problems(draw):
    classes = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 19, 33, 64, 151]))
    batch = draw(st.integers(1, 2))
    low = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    high = draw(st.tuples(st.integers(1, 45), st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    )
    sharpness = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 12.0, 20.0, 30.0, 200.0]))
    logits = (torch.randn(batch, classes, *low, generator=generator) * sharpness).to(dtype)
    if draw(st.booleans()):  # levels around the thresholds of the careful path
        levels = torch.tensor([0.0, -20.0, -41.0, -43.0, -65.0, -67.0, -90.0, -1000.0])
        picks = torch.randint(0, len(levels), logits.shape, generator=generator)
        logits = levels[picks].to(dtype) + logits / max(sharpness, 1)
    layout = draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed", "expanded"]))
    if layout == "channels last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.full((batch, classes + 3, low[0] * 2, low[1] * 3), torch.nan, dtype=dtype)
        wide[:, 1 : classes + 1, ::2, 1::3] = logits
        logits = wide[:, 1 : classes + 1, ::2, 1::3]
    elif layout == "transposed":
        logits = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif layout == "expanded":
        logits = logits[:1].expand(batch, -1, -1, -1)
    target_dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    target = torch.randint(0, classes, (batch, *high), generator=generator).to(target_dtype)
    runs = draw(st.integers(1, 9))
    target = target[..., torch.arange(high[1]) // runs * runs % high[1]].clone()
    ignored = draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE
    if draw(st.booleans()):
        wide = torch.full((batch, high[0] * 2, high[1] * 2), 77, dtype=target_dtype)
        wide[:, 1::2, ::2] = target
        target = wide[:, 1::2, ::2]
    weight = draw(st.sampled_from(["none", "some", "zeros"]))
    if weight == "none":
        weight = None
    else:
        zeros = weight == "zeros"
        weight = torch.rand(classes, generator=generator) + 0.1
        if zeros:
            weight[torch.rand(classes, generator=generator) < 0.5] = 0
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    upstream = torch.randn(target.shape, generator=generator)
    return logits, target, weight, smoothing, reduction, upstream


def _check_problem(logits, target, weight, smoothing, reduction, upstream):
    options = {"weight": weight, "smoothing": smoothing, "reduction": reduction}
    if reduction == "none":
        options["upstream"] = upstream
    loss, grad = compiled(logits, target, **options)
    inner = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == grad.dtype == inner
    valid = target != IGNORE
    total = (torch.ones(logits.shape[1]) if weight is None else weight)[target[valid].long()].sum()
    if reduction == "mean" and total == 0:  # torch divides by zero here
        assert loss == 0 and not grad.any()
        return
    truth, peer = stock(logits, target, torch.float64, **options), stock(logits, target, inner, **options)
    # A sum over pixels cancels: its terms are as large as logits and coefficients are.
    size = (logits.double().abs().max() * 2 + math.log(logits.shape[1]) + 1).item()
    heaviest = 1.0 if weight is None else max(weight.max().item(), weight.mean().item())
    pixels = {
        "mean": heaviest * valid.sum().item() / max(total.item(), 1e-30),
        "sum": heaviest * valid.sum().item(),
    }
    assert_within_budget(loss, peer[0], truth[0], scale=size * pixels.get(reduction, heaviest), what="loss")
    scale = {"mean": heaviest / max(total.item(), 1e-30), "sum": heaviest, "none": heaviest * 4}[reduction]
    share = max(1.0, target.shape[1] / logits.shape[2]) * max(1.0, target.shape[2] / logits.shape[3])
    # In float64 the truth has the rounding of its own sums.
    ulps = 64 if inner == torch.float64 else 8
    scale *= share * max(1.0, size / 64)
    assert_within_budget(grad, peer[1], truth[1], ulps=ulps, scale=scale, what="gradient")


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_problem_is_within_the_float64_budget(problem):
    _check_problem(*problem)


@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_any_problem_on_other_instruction_sets(name):
    if name not in torch.ops.depict_kernels_cpu.instruction_sets().split():
        pytest.skip(f"this processor or build has no {name}")
    before = _use("")
    _use(name)
    try:

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(problem=problems())
        def run(problem):
            _check_problem(*problem)

        run()
    finally:
        _use(before)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(), integer=st.booleans())
def test_any_label_map_and_confusion(problem, integer):
    logits, target, *_ = problem
    if integer:
        logits = logits.float().clamp(-3, 3).round().to(logits.dtype)  # ties everywhere
    inner = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = tuple(target.shape[1:])
    labels = kernels.argmax(logits, size, torch.int64)
    high = upsample(logits.double(), size)
    rounding = 2 * max_error(upsample(logits.to(inner), size), high)
    rounding += 8 * torch.finfo(inner).eps * logits.double().abs().max().item()
    won = high.gather(1, labels[:, None])[:, 0]
    assert (won >= high.amax(1) - rounding).all()
    if logits.shape[1] <= 255:
        assert torch.equal(kernels.argmax(logits, size, torch.uint8).long(), labels)
    assert torch.equal(kernels.argmax(logits, size, torch.int32).long(), labels)

    classes = logits.shape[1]
    out = torch.arange(classes * classes).reshape(classes, classes)
    expected = out.clone()
    valid = target != IGNORE
    pairs = target[valid].long() * classes + labels[valid]
    expected += torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    kernels.confusion(logits, target, IGNORE, out)
    assert torch.equal(out, expected)


def test_label_map_equals_torch_on_random_and_smooth_logits(instruction_set):
    for logits in (torch.randn(1, 150, 16, 16, generator=torch.Generator().manual_seed(3)), _smooth(4)):
        high = upsample(logits, (256, 256))
        labels = kernels.argmax(logits, (256, 256), torch.int64)
        wrong = labels != high.argmax(1)
        two = upsample(logits.double(), (256, 256)).topk(2, 1).values
        assert ((two[:, 0] - two[:, 1])[wrong] <= 4e-7 * logits.abs().max()).all()
        assert wrong.sum() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 5, 8, 9, 15, 16, 17, 18, 31, 33, 34, 50])
def test_label_map_of_every_width(width, dtype, instruction_set):
    """Cells are taken a vector at a time; integers and sizes that are powers of 2 times the grid make it exact."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(-3, 4, (2, 21, 3, width), generator=generator).to(dtype)
    sizes = [
        (3 * 8, width * 4),
        (3 * 32, width * 16),
        (3, width),
        (6, width // 2 if width % 2 == 0 else width),
    ]
    for size in sizes:
        assert torch.equal(kernels.argmax(logits, size, torch.int64), upsample(logits, size).argmax(1)), size
    wide = torch.full((2, 24, 3, width + 40), torch.nan, dtype=dtype)  # nothing beyond a row counts
    wide[:, 1:22, :, 3 : width + 3] = logits
    part, size = wide[:, 1:22, :, 3 : width + 3], (29, width * 7 + 1)
    assert torch.equal(kernels.argmax(part, size, torch.uint8), kernels.argmax(logits, size, torch.uint8))


@pytest.mark.parametrize("classes", [362, 363, 500])
def test_confusion_of_many_classes(classes, threads):
    """From 363 classes on the threads share one matrix."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 5, 6, generator=generator)
    target = torch.randint(0, classes, (2, 61, 80), generator=generator)
    target[:, 20:40] = 17
    target[:, :, ::7] = -100
    labels = kernels.argmax(logits, (61, 80), torch.int64)
    valid = target != -100
    expected = torch.bincount(target[valid] * classes + labels[valid], minlength=classes**2) + 1
    bad = target.clone()
    bad[1, 50, 3] = classes
    for count in (1, 2, 4):
        threads(count)
        out = torch.ones(classes, classes, dtype=torch.int64)
        kernels.confusion(logits, target, -100, out)
        assert torch.equal(out.flatten(), expected)
        with pytest.raises(ValueError, match=rf"value {classes} at \(batch 1, row 50, column 3\)"):
            kernels.confusion(logits, bad, -100, out)
        assert torch.equal(out.flatten(), expected)


def test_ties_go_to_the_lowest_class(instruction_set):
    logits = torch.zeros(1, 37, 3, 3)
    logits[:, 5] = logits[:, 20] = 1.0
    assert (kernels.argmax(logits, (50, 50), torch.int64) == 5).all()
    assert (kernels.argmax(torch.zeros(1, 37, 3, 3), (50, 50), torch.int64) == 0).all()


@pytest.mark.parametrize("reduction, smoothing", [("mean", 0.0), ("sum", 0.1), ("none", 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(  # scales whose source coordinates torch's float64 has exactly
    "low, high",
    [((33, 35), (132, 70)), ((47, 18), (188, 72)), ((70, 5), (35, 20)), ((150, 16), (300, 64))],
    ids=str,
)
def test_bands_of_several_cell_rows(low, high, dtype, reduction, smoothing, instruction_set):
    """From 32 rows on consecutive cell rows go together; the last band is short, and some cell rows have no pixel."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 37, *low, generator=generator, dtype=dtype)
    logits[1] *= 30
    target = torch.randint(0, 37, (2, *high), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    weight = torch.rand(37, generator=generator) + 0.1 if smoothing else None
    upstream = torch.randn(target.shape, generator=generator)
    _check_problem(logits, target, weight, smoothing, reduction, upstream)


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


def test_label_map_of_nan_logits_follows_torch():
    logits = torch.randn(1, 20, 6, 6)
    logits[0, 7, 2, 3] = logits[0, 11, 2, 3] = math.nan
    logits[0, 3, 4, 4] = math.inf
    labels = kernels.argmax(logits, (96, 96), torch.int64)
    assert torch.equal(labels, upsample(logits, (96, 96)).argmax(1))


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
        with pytest.raises(ValueError, match=rf"value {wrong} at \(batch 1, row 13, column 59\)"):
            call()
    assert not out.any()


def test_extreme_int64_labels_touch_nothing():
    logits = torch.randn(1, 4, 3, 3)
    for value in (2**63 - 1, -(2**63), 2**32, 2**31, 4):
        target = torch.zeros(1, 9, 9, dtype=torch.int64)
        target[0, 8, 8] = value
        with pytest.raises(ValueError, match=str(value)):
            kernels.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)


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
