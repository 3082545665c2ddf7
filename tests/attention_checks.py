"""What the tests of several attention kernels ask."""

import torch

from depict_kernels import ops
from depict_kernels.testing import assert_within_budget, value_and_gradients


def run_self(w, scale=None):
    return ops.subspace_self_attention(w, scale, backend="cuda")


def run_cross(q, w, scale=None):
    return ops.subspace_cross_attention(q, w, scale, backend="cuda")


def check_alignment(offset, dtype, device):
    """The same numbers at addresses that allow copies of 2 to 16 bytes give the same bits."""
    torch.manual_seed(0)
    w, grad = torch.randn(2, 33, 3, 16).to(device, dtype), torch.randn(2, 33, 3, 16).to(device, dtype)

    def shifted(t):
        memory = torch.full((2, 33, 3, 16 + 8 + offset), torch.nan, dtype=t.dtype, device=t.device)
        memory[..., offset : offset + 16] = t
        return memory[..., offset : offset + 16]

    expected = value_and_gradients(run_self, [w], grad)
    leaf = shifted(w).requires_grad_()
    out = run_self(leaf)
    actual = out.detach(), torch.autograd.grad(out, leaf, shifted(grad))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_large_scores(size, dtype, device, backend):
    """Scores of about ``size``, positive and negative: one weight is 1 and the others are 0."""
    torch.manual_seed(0)
    q, w = torch.randn(1, 9, 2, 16).to(device, dtype), torch.randn(1, 70, 2, 16).to(device, dtype)
    for scale in (size, -size):
        truth = ops.subspace_cross_attention(q.double(), w.double(), scale, backend="torch")
        out = ops.subspace_cross_attention(q, w, scale, backend=backend)
        assert_within_budget(out, truth.to(dtype), truth)
