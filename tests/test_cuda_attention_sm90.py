"""Attention on Hopper's warpgroup products: in the emulator, and on GPUs of compute capability 9.0."""

from types import SimpleNamespace

import pytest
import torch
from attention_checks import check_alignment, check_large_scores, run_cross, run_self
from conftest import PTX

from depict_kernels import measured, ops
from depict_kernels.ops.cuda_kernels import _library, attention
from depict_kernels.testing import check_against_float64, value_and_gradients

DTYPES = [torch.bfloat16, torch.float16]


def peer_self(w, scale=None):
    return ops.subspace_self_attention(w, scale, backend="torch")


def peer_cross(q, w, scale=None):
    return ops.subspace_cross_attention(q, w, scale, backend="torch")


@pytest.fixture
def device(cuda_device):
    """A device on which everything that has the variant uses it during the test."""
    if cuda_device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if PTX and PTX != "sm_90":
        pytest.skip(f"no wgmma in PTX for {PTX}")
    with attention.force_variant(attention.WGMMA):
        yield cuda_device


# Every kernel (56, 104, 128) at its own size and below, around the tiles of 64 keys and blocks of 128 queries,
# and every width of copy.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dim, length", [(5, 65), (50, 130), (56, 64), (64, 65), (100, 1), (100, 130), (104, 7), (128, 130)]
)
def test_self_attention(dim, length, dtype, device):
    torch.manual_seed(dim)
    check_against_float64(run_self, peer_self, [torch.randn(1, length, 1, dim).to(device, dtype)])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dim, queries, keys", [(5, 130, 1), (50, 1, 65), (64, 65, 64), (100, 7, 130), (128, 64, 7)]
)
def test_cross_attention(dim, queries, keys, dtype, device):
    torch.manual_seed(dim)
    q, w = torch.randn(1, queries, 1, dim), torch.randn(1, keys, 1, dim)
    check_against_float64(run_cross, peer_cross, [t.to(device, dtype) for t in (q, w)])


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_scales(scale, device):
    """A scale of 0 must not undo the mask of missing keys; a large one makes one weight 1, the others 0."""
    torch.manual_seed(0)
    w = torch.randn(2, 70, 2, 10).to(device, torch.float16)
    check_against_float64(
        lambda w: run_self(w, scale), lambda w: peer_self(w, scale), [w], gradient_scale=max(1.0, scale)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e8, 1e10, 1e20])
def test_large_scores(size, dtype, device):
    check_large_scores(size, dtype, device, "cuda")


def test_scores_that_rise_slowly(device):
    """Sums are rescaled only when a row's highest score has risen enough: many small steps, then a large one."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(50), dim=0)
    heights = torch.cat([torch.linspace(-8, 8, 330), torch.linspace(20, 60, 30)])
    w = (torch.randn(360, 50) * 0.1 + heights[:, None] * direction)[None, :, None]
    q = (torch.randn(9, 50) * 0.1 + direction * torch.linspace(-1, 2, 9)[:, None])[None, :, None]
    check_against_float64(
        lambda q, w: run_cross(q, w, 1.0),
        lambda q, w: peer_cross(q, w, 1.0),
        [t.to(device, torch.bfloat16) for t in (q, w)],
        gradient_scale=60,  # a gradient of q is a sum of keys of that size that cancel
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_alignment_of_rows(offset, dtype, device):
    check_alignment(offset, dtype, device)


def test_strides(device):
    """Heads before rows, reversed roles of the outer dimensions, and a batch that is one tensor seen twice."""
    torch.manual_seed(0)
    w = torch.randn(3, 2, 20, 100).to(device, torch.bfloat16).transpose(1, 2)
    check_against_float64(run_self, peer_self, [w])
    w = torch.randn(20, 3, 2, 24).to(device, torch.bfloat16).permute(2, 0, 1, 3)
    check_against_float64(run_self, peer_self, [w])
    w = torch.randn(1, 20, 3, 24).to(device, torch.bfloat16)
    assert torch.equal(run_self(w.expand(2, -1, -1, -1)), run_self(w).expand(2, -1, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_order(dtype, monkeypatch, device):
    """Again on a GPU; in the emulator, with the threads in another order, where a missing barrier would show."""
    torch.manual_seed(0)
    w, grad = torch.randn(1, 140, 1, 100).to(device, dtype), torch.randn(1, 140, 1, 100).to(device, dtype)
    results = []
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        results.append(value_and_gradients(run_self, [w], grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_nan_stays_visible(device):
    w = torch.randn(1, 70, 1, 100, device=device).half()
    w[0, 69, 0, 3] = torch.nan
    assert run_self(w).isnan().all()
    q = torch.randn(1, 70, 1, 100, device=device).half()
    q[0, 5] = torch.nan
    assert (
        run_cross(q, q[:, 6:]).isnan().all((0, 2, 3)).nonzero().flatten().cpu() == torch.tensor([5])
    ).all()


def test_nothing_to_do(device):
    assert run_self(torch.zeros(0, 5, 1, 8, dtype=torch.half, device=device)).shape == (0, 5, 1, 8)
    w = torch.zeros(1, 5, 1, 8, dtype=torch.half, device=device)
    assert run_cross(w[:, :0], w).shape == (1, 0, 1, 8)


def test_refuses_what_it_is_not_for(device):
    """That these raise also shows that the variant is not silently replaced by the other one."""
    with pytest.raises(RuntimeError, match="takes float16 and bfloat16, not float32"):
        run_self(torch.zeros(1, 5, 1, 8, device=device))
    w, numbers = torch.zeros(1, 5, 1, 8, dtype=torch.half, device=device), torch.zeros(1, 1, 5, device=device)
    arguments = (w, w, w, numbers, numbers, torch.empty_like(w), 1.0)
    with pytest.raises(RuntimeError, match="for self-attention only"):
        _library.call("attention_backward", *arguments, 1, False, attention.WGMMA, device=w.device)
    with pytest.raises(RuntimeError, match=r"0 \(mma\) or 1 \(wgmma\)"):
        _library.call("attention_backward", *arguments, 0, False, 2, device=w.device)


@pytest.mark.gpu
def test_refuses_other_gpus():
    if torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this GPU has compute capability 9.0")
    if PTX and PTX != "sm_90":
        pytest.skip(f"no wgmma in PTX for {PTX}")
    with attention.force_variant(attention.WGMMA), pytest.raises(RuntimeError, match="9.0"):
        run_self(torch.zeros(1, 5, 1, 8, dtype=torch.half, device="cuda"))


def test_the_table_decides(monkeypatch):
    monkeypatch.setattr(measured, "WGMMA_FROM_HEAD_DIM", {"sm_90": {"forward": 64}})
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def choice(direction, dim, dtype=torch.half, device="cuda"):
        tensor = SimpleNamespace(dtype=dtype, device=SimpleNamespace(type=device), shape=(1, 1, 1, dim))
        return attention._variant(direction, tensor)

    assert choice("forward", 100) == choice("forward", 64) == attention.WGMMA
    assert choice("forward", 63) == choice("self_backward", 100) == attention.MMA
    assert choice("forward", 100, torch.float32) == choice("forward", 100, device="cpu") == attention.MMA
    capability = (8, 0)
    assert choice("forward", 100) == attention.MMA
