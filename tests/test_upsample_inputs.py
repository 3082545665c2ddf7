"""The upsample operators' arguments, and torch's transforms: what is taken, what is refused and in which words."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from depict_kernels import UpsampleCrossEntropyLoss, backends, ops
from depict_kernels.testing import logits_and_target


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, t: ops.upsample_cross_entropy(x, t.float()), TypeError, "must be uint8, int8"),
        (lambda x, t: ops.upsample_cross_entropy(x.long(), t), TypeError, "must be a float16"),
        (lambda x, t: ops.upsample_cross_entropy(x[0], t), ValueError, r"\(B, C, h, w\)"),
        (lambda x, t: ops.upsample_cross_entropy(x, t[:1]), ValueError, "B = 2"),
        (lambda x, t: ops.upsample_cross_entropy(x, t, reduction="avg"), ValueError, "mean, sum, none"),
        (lambda x, t: ops.upsample_cross_entropy(x, t, label_smoothing=1.5), ValueError, "label_smoothing"),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, weight=torch.ones(3)),
            ValueError,
            r"weight must be \(5,\)",
        ),
        (lambda x, t: ops.upsample_argmax(x, (0, 4)), ValueError, "size"),
        (
            lambda x, t: ops.upsample_argmax(x, (4.7, 4)),
            TypeError,
            r"size\[0\] must be an integer, got 4\.7",
        ),
        (lambda x, t: ops.upsample_argmax(x, (4, "4")), TypeError, r"size\[1\] must be an integer, got '4'"),
        (
            lambda x, t: ops.upsample_argmax(x, (4,)),
            ValueError,
            r"size must be two integers \(height, width\), got \(4,\)",
        ),
        (lambda x, t: ops.upsample_argmax(x, 4), ValueError, "size must be two integers"),
        (lambda x, t: ops.upsample_argmax(x, (1, 4, 4)), ValueError, "size must be two integers"),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, 1.5),
            TypeError,
            r"ignore_index must be an integer, got 1\.5",
        ),
        (lambda x, t: ops.upsample_confusion(x, t, 255.0), TypeError, "ignore_index must be an integer"),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, 2**70),
            ValueError,
            rf"ignore_index must be an integer of 64 bits, got {2**70}",
        ),
        (lambda x, t: UpsampleCrossEntropyLoss(ignore_index=-(2**63) - 1)(x, t), ValueError, "ignore_index"),
        (
            lambda x, t: ops.upsample_confusion(x, t, 2**63),
            ValueError,
            "ignore_index must be an integer of 64",
        ),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, weight=[1.0] * 5),
            TypeError,
            r"weight must be a tensor, got list; torch\.as_tensor makes one",
        ),
        (
            lambda x, t: ops.upsample_cross_entropy({"out": x, "aux": x}, t),
            TypeError,
            "logits must be a tensor, got dict; pass the one of its values that is meant .'out', 'aux'.",
        ),
        (
            lambda x, t: ops.upsample_cross_entropy(x[:, :1], torch.ones_like(t)),
            ValueError,
            "neither a class in .0, 1. nor ignore_index .255.; cross-entropy takes a logit per class",
        ),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, weight=np.ones(5)),
            TypeError,
            "weight must be a tensor, got ndarray",
        ),
        (
            lambda x, t: ops.upsample_cross_entropy(x, t, weight=torch.ones(5, dtype=torch.complex64)),
            TypeError,
            "weight must be real, got torch.complex64",
        ),
        (lambda x, t: UpsampleCrossEntropyLoss(reduction="avg"), ValueError, "mean, sum, none, got 'avg'"),
        (lambda x, t: UpsampleCrossEntropyLoss(label_smoothing=1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (
            lambda x, t: UpsampleCrossEntropyLoss({0: 1.0}),
            TypeError,
            r"weight must be a tensor \(C,\) or C numbers, got {0: 1.0}",
        ),
        (
            lambda x, t: ops.upsample_argmax(x.tolist(), (4, 4)),
            TypeError,
            "logits must be a tensor, got list",
        ),
        (lambda x, t: ops.upsample_cross_entropy(x, t.numpy()), TypeError, "target must be a tensor"),
        (lambda x, t: ops.upsample_confusion(x, t, out=[0]), TypeError, "out must be a tensor, got list"),
        (lambda x, t: ops.upsample_argmax(x, (4, 4), torch.int16), TypeError, "uint8, int32 or int64"),
        (lambda x, t: ops.upsample_argmax(torch.zeros(1, 300, 2, 2), (4, 4), torch.uint8), ValueError, "300"),
        (lambda x, t: ops.upsample_confusion(x, t, out=torch.zeros(5, 5)), ValueError, "int64"),
        (
            lambda x, t: ops.upsample_confusion(x, t, out=torch.zeros(1, 5, dtype=torch.int64).expand(5, 5)),
            ValueError,
            "expanded",
        ),
        (
            lambda x, t: ops.upsample_confusion(x, t, out=torch.zeros(9, dtype=torch.int64).unfold(0, 5, 1)),
            ValueError,
            r"every count once, got .* strides \(1, 1\)",
        ),
    ],
)
def test_bad_input(call, error, words):
    logits, target = logits_and_target(2, 5, (2, 2), (4, 4))
    with pytest.raises(error, match=words):
        call(logits, target)


NOT_DENSE = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "nested, jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "torch.sparse_coo": torch.Tensor.to_sparse,
    "torch._mkldnn": torch.Tensor.to_mkldnn,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what these kinds of tensors will become
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_tensor_that_is_not_dense_is_refused_in_one_sentence(kind):
    if kind == "torch._mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    logits, target = logits_and_target(2, 5, (2, 2), (4, 4))
    other = NOT_DENSE[kind](logits)
    words = f"must be a dense tensor, got a {kind.partition(',')[0]} one"
    for call in (
        lambda: ops.upsample_cross_entropy(other, target),
        lambda: ops.upsample_argmax(other, (4, 4)),
        lambda: ops.upsample_confusion(logits, other),
        lambda: ops.subspace_self_attention(other),
        lambda: ops.mask_logits(other, *torch.ones(3, 5), (2, 2)),
    ):
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_every_kind_of_integer_is_taken(run):
    logits, target = logits_and_target(2, 5, (2, 2), (6, 4))
    target = target.clamp(max=4)  # 255, ignored by default, is none of the classes
    target[0, 0, 0] = 3

    def f(x, t, image):
        size = (image.shape[-2] * 2, image.shape[-1])  # torch.SymInt under torch.compile
        return ops.upsample_cross_entropy(x, t, 3), ops.upsample_argmax(x, size)

    call = f
    if run == "compiled":
        torch.compiler.reset()
        call = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
    loss, labels = call(logits, target, torch.zeros(3, 4))
    assert labels.shape == (2, 6, 4)
    if run == "compiled":
        other = (logits, target, torch.zeros(5, 7))
        torch.testing.assert_close(call(*other), f(*other))
    for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert ops.upsample_cross_entropy(logits, target, three).equal(loss)
        assert ops.upsample_argmax(logits, [three + three, 4]).equal(labels)
        assert ops.upsample_argmax(logits, torch.Size((6, 4))).equal(labels)


def test_transforms_that_kernels_do_not_know_take_torch_or_raise():
    logits, target = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 9, 7))

    def loss(x, backend="auto"):
        return ops.upsample_cross_entropy(x, target, backend=backend)

    x = logits.clone().requires_grad_()
    loss(x).backward()
    assert torch.allclose(torch.func.grad(loss)(logits), x.grad, atol=1e-7)
    direction = torch.randn_like(logits)
    expected = (x.grad * direction).sum()
    assert torch.allclose(torch.func.jvp(loss, (logits,), (direction,))[1], expected, atol=1e-6)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, direction)
        assert torch.allclose(forward_ad.unpack_dual(loss(dual)).tangent, expected, atol=1e-6)
        assert torch.equal(ops.upsample_argmax(dual, (9, 7)), ops.upsample_argmax(logits, (9, 7)))
        with pytest.raises(backends.BackendUnavailable, match="forward-mode"):
            loss(dual, "reference")
    with pytest.raises(backends.BackendUnavailable, match=r"torch\.func\.grad"):
        torch.func.grad(lambda x: loss(x, "reference"))(logits)


def test_a_dual_number_that_enters_compiled_code_keeps_its_tangent():
    """A graph compiled without one holds the kernel, which has no forward mode: torch looks at the code again."""
    logits, target = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 9, 7))
    direction, forward_ad = torch.randn_like(logits), torch.autograd.forward_ad
    torch.compiler.reset()
    loss = torch.compile(lambda x: ops.upsample_cross_entropy(x, target), backend="aot_eager")
    value = loss(logits)
    stock = lambda x: F.cross_entropy(F.interpolate(x, size=(9, 7), mode="bilinear"), target)
    expected = torch.func.jvp(stock, (logits,), (direction,))[1]
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, direction)))
    torch.testing.assert_close(primal, value)
    torch.testing.assert_close(tangent, expected)
    assert loss(logits).equal(value)  # the first graph again


def test_transforms_seen_through_vmap():
    logits, target = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 9, 7))
    each = lambda x, y, **kw: ops.upsample_cross_entropy(x[None], y[None], **kw)
    total = lambda x, **kw: torch.vmap(lambda *pair: each(*pair, **kw))(x, target).sum()
    x = logits.clone().requires_grad_()
    sum(each(*pair) for pair in zip(x, target)).backward()
    torch.testing.assert_close(torch.func.grad(total)(logits), x.grad)
    slope = torch.func.jvp(total, (logits,), (logits,))[1]
    torch.testing.assert_close(slope, (x.grad * logits).sum())
    with pytest.raises(backends.BackendUnavailable, match="forward-mode"):
        torch.func.jvp(lambda x: total(x, backend="reference"), (logits,), (logits,))


TRACKED = {
    "queries": (ops.subspace_cross_attention, ((1, 3, 2, 8), (1, 4, 2, 8)), 0),
    "keys": (ops.subspace_cross_attention, ((1, 3, 2, 8), (1, 4, 2, 8)), 1),
    **{
        name: (lambda *t, **kw: ops.mask_logits(*t, (2, 2), **kw), ((1, 4, 8), (1, 3, 8), (3,), (3,)), i)
        for i, name in enumerate(("patches", "classes", "weight", "bias"))
    },
}


@pytest.mark.parametrize("name", TRACKED)
def test_forward_mode_is_noticed_on_every_input(name):
    """A registered operator would drop the tangent: the derivative would be 0."""
    operator, shapes, position = TRACKED[name]
    inputs = [torch.randn(shape) for shape in shapes]

    def f(x):
        return operator(*inputs[:position], x, *inputs[position + 1 :], backend="reference")

    for transform in (lambda: torch.func.jvp(f, (inputs[position],), (inputs[position],)),
                      lambda: torch.func.grad(lambda x: f(x).sum())(inputs[position])):  # fmt: skip
        with pytest.raises(backends.BackendUnavailable, match="Available: auto, torch"):
            transform()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_weight_that_wants_a_gradient_is_refused(backend):
    logits, target = torch.randn(1, 3, 2, 2), torch.randint(0, 3, (1, 4, 4))
    weight = torch.ones(3, requires_grad=True)
    loss = lambda w: ops.upsample_cross_entropy(logits, target, weight=w, backend=backend)
    with pytest.raises(ValueError, match=r"pass weight\.detach\(\)"):
        loss(weight)
    with torch.no_grad():
        assert loss(weight).isfinite()
    assert not loss(weight.detach()).requires_grad
    if backend == "reference":
        with pytest.raises(backends.BackendUnavailable, match="forward-mode"):
            torch.func.jvp(loss, (weight.detach(),), (weight.detach(),))


def test_vmap_with_a_gradient_takes_stock_operators():
    """A batched tensor hides that autograd follows it: a registered operator would make no gradient."""
    logits = torch.randn(3, 4, 5, 5, requires_grad=True)
    target = torch.randint(0, 4, (3, 9, 9))
    loss = lambda x, t, backend="auto": ops.upsample_cross_entropy(x[None], t[None], backend=backend)
    (grad,) = torch.autograd.grad(torch.vmap(loss)(logits, target).sum(), logits)
    (expected,) = torch.autograd.grad(sum(loss(x, t) for x, t in zip(logits, target)), logits)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(backends.BackendUnavailable, match="vmap with gradient"):
        torch.vmap(lambda x, t: loss(x, t, "reference"))(logits, target)
