"""Stock operators a few classes at a time: what auto takes for the upsample operators where no kernel serves."""

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import largest_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depict_kernels import backends, ops
from depict_kernels.ops.stock import upsample as stock
from depict_kernels.testing import logits_and_target, value_and_gradients

SIZE = (24, 40)


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda n: f"{n} classes at a time")
def a_few_classes(request, monkeypatch):
    """No kernels; five classes in two images go through in parts."""
    monkeypatch.setattr(backends, "_AUTO_CPU", ())
    monkeypatch.setattr(stock, "CPU_CHUNK", request.param * 2 * 4 * SIZE[0] * SIZE[1])


@pytest.fixture
def problem():
    return logits_and_target(2, 5, (3, 5), SIZE, ignored=0.1)


def interpolated(logits):
    return F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)


def assert_same_loss(logits, target, **options):
    ours = lambda x: ops.upsample_cross_entropy(x, target, **options)
    plain = lambda x: ops.upsample_cross_entropy(x, target, backend="torch", **options)
    torch.testing.assert_close(
        value_and_gradients(ours, [logits]),
        value_and_gradients(plain, [logits]),
        rtol=1e-5,
        atol=1e-6,
        equal_nan=True,
    )


@pytest.mark.parametrize("need_grad", [False, True])
def test_no_array_holds_more_classes_than_asked_for(monkeypatch, need_grad):
    logits, target = logits_and_target(2, 50, (3, 5), SIZE)
    pixels = SIZE[0] * SIZE[1]  # of one image
    monkeypatch.setattr(stock, "CPU_CHUNK", 4 * 4 * pixels)
    options = (torch.rand(50), 255, 0.1, "mean", need_grad)
    assert largest_tensor(lambda: stock.cross_entropy_forward(logits, target, *options)) == 4 * pixels
    assert largest_tensor(lambda: stock.argmax(logits, SIZE, torch.int64)) == 4 * pixels
    counts = torch.zeros(50, 50, dtype=torch.int64)
    assert largest_tensor(lambda: stock.confusion(logits, target, 255, counts)) == 4 * pixels
    plain = largest_tensor(lambda: ops.upsample_cross_entropy(logits, target, backend="torch"))
    assert plain == 2 * 50 * pixels  # which the record does see


def test_auto_takes_it_above_a_size_and_stays_plain_below(monkeypatch, problem):
    logits, target = problem
    logits.requires_grad_()
    monkeypatch.setattr(backends, "_AUTO_CPU", ())
    plain = lambda **kw: "NllLoss" in graph_of(ops.upsample_cross_entropy(logits, target, **kw))
    assert plain()
    monkeypatch.setattr(stock, "CPU_CHUNK", 5 * 2 * 4 * SIZE[0] * SIZE[1] - 1)
    assert not plain()
    assert plain(backend="torch")  # who names it gets what autograd sees through
    with backends.use_backend("torch"):
        assert plain()


def graph_of(loss) -> str:
    """Names of the nodes that autograd goes through."""
    names, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [after for after, _ in node.next_functions if after is not None]
    return " ".join(names)


def test_forward_mode_takes_the_plain_composition(a_few_classes, problem):
    logits, target = problem
    loss = lambda x: ops.upsample_cross_entropy(x, target)
    direction = torch.randn_like(logits)
    _, ours = torch.func.jvp(loss, (logits,), (direction,))
    _, (grad,) = value_and_gradients(loss, [logits])
    torch.testing.assert_close(ours, (grad * direction).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_compiled_transforms_lose_no_tangent(backend, problem):
    """Registered operators know no forward mode: a compiled one would give 0."""
    logits, target = problem
    if reason := backends.why_unavailable("cpp", "upsample_cross_entropy", "cpu", torch.float32):
        pytest.skip(reason)
    loss = lambda x: ops.upsample_cross_entropy(x, target, backend=backend)
    transforms = {
        "jvp": lambda x: torch.func.jvp(loss, (x,), (x,))[1],
        "jacfwd": lambda x: torch.func.jacfwd(loss)(x),
        "grad": lambda x: torch.func.grad(loss)(x),
    }
    for transform in transforms.values():
        torch.compiler.reset()
        compiled = torch.compile(transform, backend="aot_eager")
        if backend == "auto":
            torch.testing.assert_close(compiled(logits), transform(logits))
        else:
            with pytest.raises(Exception, match="forward-mode differentiation"):
                compiled(logits)
    torch.compiler.reset()


def test_images_go_one_by_one(monkeypatch, a_few_classes):
    """What a pixel needs beside the upsampled logits grows with one image, not with the batch."""
    logits, target = logits_and_target(6, 5, (3, 5), SIZE)
    options = (None, 255, 0.1)
    assert largest_tensor(lambda: stock.cross_entropy_forward(logits, target, *options, "mean", True)) == max(
        logits.numel(), min(5, stock.CPU_CHUNK // (4 * SIZE[0] * SIZE[1])) * SIZE[0] * SIZE[1]
    )
    batch = stock.cross_entropy_forward(logits, target, *options, "sum", True)
    single = [
        stock.cross_entropy_forward(x, t, *options, "sum", True)
        for x, t in zip(logits.split(1), target.split(1))
    ]
    torch.testing.assert_close(batch[0], sum(loss for loss, _, _ in single))
    assert torch.equal(batch[1], torch.cat([grad for _, grad, _ in single]))


def test_tiny_class_weights(a_few_classes, problem):
    """One over their sum would be infinite."""
    logits, target = problem
    assert_same_loss(logits, target.clamp(max=4), weight=torch.full((5,), 2e-41))


def test_compiled_graphs_keep_it_whatever_the_size(monkeypatch, problem):
    """No guard on how large the upsampled logits are: a new image size compiles nothing anew."""
    monkeypatch.setattr(backends, "_AUTO_CPU", ())
    called = []

    def backend(graph, inputs):
        called.append(str(graph.graph))
        return graph.forward

    torch.compiler.reset()
    logits, target = problem
    loss = torch.compile(ops.upsample_cross_entropy, fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(loss(logits, target), ops.upsample_cross_entropy(logits, target))
    big = target.repeat_interleave(40, 1).repeat_interleave(40, 2)
    assert 4 * 5 * big.numel() > stock.CPU_CHUNK
    torch.testing.assert_close(loss(logits, big), ops.upsample_cross_entropy(logits, big))
    assert len(called) == 1 and "depict_kernels.upsample_cross_entropy" in called[0]
    torch.compiler.reset()


def test_classes_of_minus_infinity_take_no_part(a_few_classes, problem):
    """Also where all classes of one part are masked; and where the target is one of them, the loss is infinite."""
    logits, target = problem
    logits[:, :2] = -torch.inf
    target[target < 2] = 3
    assert_same_loss(logits, target)
    target[0, 0, 0] = 1
    assert_same_loss(logits, target, reduction="none")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_logits_reach_the_loss_but_not_ignored_pixels(a_few_classes, problem, value):
    logits, target = problem
    logits[0, 3, 0, 0] = value
    assert_same_loss(logits, target, reduction="none")
    target[0, :14, :14] = 255
    loss, (grad,) = value_and_gradients(lambda x: ops.upsample_cross_entropy(x, target), [logits])
    assert loss.isfinite() and grad.isfinite().all()


def test_logits_far_from_zero_keep_their_differences(a_few_classes, problem):
    logits, target = problem
    assert_same_loss(logits.round() + 3e4, target, label_smoothing=0.2)


def test_weights_are_summed_in_the_precision_of_the_gradient(a_few_classes, problem):
    logits, target = problem
    weight = torch.tensor([0.1, 0.7, 1.3, 0.3, 0.9])  # float32, for float64 logits
    loss = lambda backend: lambda x: ops.upsample_cross_entropy(x, target, None, weight, 0.3, backend=backend)
    ours, (grad,) = value_and_gradients(loss("auto"), [logits.double()])
    expected, (expected_grad,) = value_and_gradients(loss("torch"), [logits.double()])
    torch.testing.assert_close((ours, grad), (expected, expected_grad), rtol=1e-12, atol=1e-14)


def test_ties_and_what_is_not_finite_have_the_labels_of_stock_torch(a_few_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (2, 5, 3, 5), generator=generator).float()  # many ties
    logits[0, 1, 0, 0] = logits[0, 4, 0, 0] = torch.nan
    logits[1, 2, 1, 1] = torch.inf
    logits[1, 0, 2, 2] = -torch.inf
    assert torch.equal(ops.upsample_argmax(logits, SIZE), interpolated(logits).argmax(1))


def test_second_derivative_names_the_way_to_one(a_few_classes, monkeypatch, problem):
    monkeypatch.setattr(stock, "CPU_CHUNK", 1)
    logits, target = problem
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(ops.upsample_cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        grad.sum().backward()


class NoSumOfAnImage(TorchDispatchMode):
    """What torch says on a GPU under use_deterministic_algorithms."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nll_loss2d_forward.default and args[3] != 0:
            raise RuntimeError(
                "nll_loss2d_forward_out_cuda_template does not have a deterministic implementation"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_deterministic_algorithms_are_all_it_asks_for(problem, reduction):
    logits, target = problem
    weight = torch.rand(5, generator=torch.Generator().manual_seed(0))
    loss = lambda x: ops.upsample_cross_entropy(
        x, target, weight=weight, label_smoothing=0.1, reduction=reduction, backend="torch"
    )
    usual = value_and_gradients(loss, [logits])
    torch.use_deterministic_algorithms(True)
    try:
        with NoSumOfAnImage():
            found = value_and_gradients(loss, [logits])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, usual)
