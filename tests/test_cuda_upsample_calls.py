"""Calls of the CUDA upsample kernels: repeats, launches, memory, what they refuse; in the emulator without a GPU."""

import pytest
import torch
from upsample_checks import IGNORE, kernel, make, weights

from depict_kernels import backends, ops
from depict_kernels.ops.cuda_kernels import _library, upsample
from depict_kernels.testing import value_and_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def everything(logits, target):
    upstream = torch.linspace(-1, 1, target.numel(), device=logits.device).view(target.shape)
    counts = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.int64, device=logits.device)
    weight = weights(logits.shape[1], logits.device)
    return (
        *kernel(logits, target, weight=weight, smoothing=0.1),
        *kernel(logits, target, upstream, weight, 0.1, "none"),
        upsample.argmax(logits, tuple(target.shape[1:]), torch.int64),
        upsample.confusion(logits, target, IGNORE, counts),
        counts,
    )


def mixed_problem(device):
    """Series and direct tiles, tiles of one label and of many, bad and ignored labels."""
    logits, target = make((2, 200, (3, 3), (37, 44)), device, smooth=True)
    logits[:, :, 0] *= 60
    target[1] = torch.randint(0, 200, target.shape[1:], generator=torch.Generator().manual_seed(3))
    target[1, 20, 20] = 300
    return logits, target


def test_repeats_are_bitwise_equal(cuda_device):
    problem = mixed_problem(cuda_device)
    torch.testing.assert_close(everything(*problem), everything(*problem), rtol=0, atol=0)


def test_order_of_threads_does_not_matter(monkeypatch, cuda_device):
    """A missing barrier would show: the emulator runs the threads in another order for every seed."""
    if cuda_device != "cpu":
        pytest.skip("the GPU chooses its own order")
    results = []
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        results.append(everything(*mixed_problem("cpu")))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_training_step_and_nothing_synchronises():
    logits, target = make((2, 19, (4, 4), (64, 64)), "cuda")
    other = torch.randn_like(logits)
    step = lambda x: kernel(x, target, smoothing=0.1)
    expected = step(other)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(logits)
    logits.copy_(other)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_launches(monkeypatch, cuda_device):
    """The kernels run, and only those that are needed."""
    names, original = [], _library.call
    spy = lambda name, *rest, device: (names.append(name), original(name, *rest, device=device))[1]
    monkeypatch.setattr(upsample, "call", spy)

    def launched(function):
        names.clear()
        function()
        return [name.removeprefix("upsample_") for name in names]

    logits, target = make((1, 3, (1, 2), (4, 5)), cuda_device)
    loss = lambda x, reduction: ops.upsample_cross_entropy(x, target, reduction=reduction, backend="cuda")
    forward = ["pack", "cross_entropy", "finish"]
    leaf = logits.clone().requires_grad_()
    assert launched(lambda: loss(logits, "mean")) == forward
    assert launched(lambda: loss(leaf, "mean").backward()) == [*forward, "gather"]
    backward = ["pack", "cross_entropy", "gather"]
    assert launched(lambda: loss(leaf, "none").sum().backward()) == [*forward, *backward]
    assert launched(lambda: ops.upsample_argmax(logits, (4, 5), backend="cuda")) == ["pack", "labels"]


def test_backward_twice_and_a_loss_scaler(cuda_device):
    logits, target = make((1, 5, (2, 2), (16, 16)), cuda_device, dtype=torch.float16)
    leaf = logits.clone().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, target, backend="cuda")
    (first,) = torch.autograd.grad(loss * 2.0**16, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2.0**16, leaf)
    assert torch.equal(first, second)
    assert torch.equal(first, (kernel(logits, target)[1] * 2.0**16).half())


def test_float64_is_refused(cuda_device):
    logits, target = make((1, 3, (2, 2), (4, 4)), cuda_device, dtype=torch.float64)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        ops.upsample_cross_entropy(logits, target, backend="cuda")


def test_too_many_cells_are_refused(cuda_device):
    """The kernels count tiles and the pixels of an axis in 32 bits."""
    call = lambda shape, size: torch.ops.depict_kernels_cuda_emulated.upsample_gather(
        torch.empty(1, 4, 1), None, torch.empty(1).expand(shape), *size, 0, 1, 0
    )
    if cuda_device != "cpu":
        pytest.skip("one check for both builds")
    with pytest.raises(RuntimeError, match="split the batch"):
        call((70_000, 3, 256, 256), (512, 512))
    with pytest.raises(RuntimeError, match="longer than"):
        call((1, 3, 1, 1), (4, 2**31))


def test_opcheck_and_compile(cuda_device):
    logits, target = make((1, 4, (2, 3), (5, 6)), cuda_device)
    weight = weights(4, cuda_device)
    library = torch.ops.depict_kernels
    for reduction in ("mean", "none"):
        arguments = (
            logits.clone().requires_grad_(),
            target,
            weight,
            255,
            0.1,
            reduction,
            True,
            False,
            "cuda",
        )
        torch.library.opcheck(library.upsample_cross_entropy.default, arguments)
    torch.library.opcheck(library.upsample_argmax.default, (logits, (5, 6), torch.uint8, "cuda"))
    out = torch.zeros(4, 4, dtype=torch.int64, device=cuda_device)
    torch.library.opcheck(library.upsample_confusion.default, (logits, target, 255, out, "cuda"))

    def f(x):
        loss = ops.upsample_cross_entropy(x, target, label_smoothing=0.1, check_targets=False, backend="cuda")
        counts = ops.upsample_confusion(x, target, backend="cuda")
        return loss * counts.diagonal().sum() + ops.upsample_argmax(x, (5, 6), backend="cuda").sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, [logits]), value_and_gradients(f, [logits]), rtol=0, atol=0
    )


def test_extra_memory_is_a_small_share_of_the_upsampled_logits(monkeypatch):
    """On meta tensors: what the training call allocates, 8 x 150 x 32 x 32 logits and 512 x 512 pixels."""
    sizes = {}

    def record(name, *arguments, device):
        for t in arguments:
            if isinstance(t, torch.Tensor):
                sizes[id(t)] = t.numel() * t.element_size(), t  # kept, so that no id comes twice

    monkeypatch.setattr(upsample, "call", record)
    logits = torch.empty(8, 150, 32, 32, device="meta")
    target = torch.empty(8, 512, 512, dtype=torch.uint8, device="meta")
    upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    extra = sum(size for size, t in sizes.values() if t is not logits and t is not target)
    assert extra < 0.03 * 8 * 150 * 512 * 512 * 4
