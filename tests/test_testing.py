"""The checker is checked with planted errors."""

import pytest
import torch

from depict_kernels.testing import assert_within_budget, check_against_float64, logits_and_target, max_error


def test_max_error_counts_nan_and_wrong_infinities():
    truth = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    assert max_error(truth.float(), truth) == 0
    assert max_error(torch.tensor([1.0, 0.0, torch.inf]), truth) == torch.inf
    assert max_error(torch.tensor([torch.nan, torch.nan, torch.inf]), truth) == torch.inf
    assert max_error(torch.tensor([1.0, torch.nan, -torch.inf]), truth) == torch.inf
    assert max_error(torch.tensor([1.5, torch.nan, torch.inf]), truth) == 0.5


def test_max_error_rejects_another_shape():
    with pytest.raises(AssertionError, match="shape"):
        max_error(torch.zeros(2, 1), torch.zeros(1, 2))


def test_budget_scales_with_the_peers_error():
    truth = torch.ones(3, dtype=torch.float64)
    peer = torch.full((3,), 1.01)
    assert_within_budget(torch.full((3,), 1.019), peer, truth)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_within_budget(torch.full((3,), 1.021), peer, truth)


def test_budget_rejects_another_dtype():
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(torch.ones(1).half(), torch.ones(1), torch.ones(1).double())


@pytest.mark.parametrize("planted", ["none", "output", "second gradient", "nan"])
def test_planted_errors_are_found(planted):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            out = a * b
            if planted == "output":
                out[3] *= 1.0001
            if planted == "nan":
                out[-1] = torch.nan
            return out

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad * b, grad * a * (1.0001 if planted == "second gradient" else 1.0)

    inputs = [torch.randn(50), torch.randn(50)]
    if planted == "none":
        check_against_float64(Product.apply, torch.mul, inputs)
        return
    with pytest.raises(AssertionError, match="gradient 1" if "gradient" in planted else "output"):
        check_against_float64(Product.apply, torch.mul, inputs)


def test_logits_and_target_agree_when_smooth():
    logits, target = logits_and_target(2, 7, (8, 8), (64, 64), smooth=True, ignored=0.25)
    label = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").argmax(1)
    ignored = (target == 255).float().mean().item()
    assert 0.2 < ignored < 0.3
    assert (label == target)[target != 255].float().mean() > 0.999


def test_poisoned_memory_fills_empty(poisoned_memory):
    assert torch.empty(100).isnan().all()
