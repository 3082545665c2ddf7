"""Coding rates, principal components, spans, coherence and noise: against closed forms and numpy."""

import math

import numpy as np
import pytest
import torch

from depict_kernels import analysis
from depict_kernels.models import DepictDecoder, LinearDecoder, SegmenterDecoder


def orthogonal(d, seed=0):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()).Q


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (1, 5), (5, 1), (2, 3, 6, 4)])
@pytest.mark.parametrize("eps", [analysis.EPS, 0.1])
def test_coding_rate_is_its_formula(shape, eps):
    z = torch.randn(shape)
    x = z.double().numpy()
    n, d = shape[-2:]
    expected = 0.5 * np.linalg.slogdet(np.eye(d) + d / (n * eps**2) * np.swapaxes(x, -1, -2) @ x)[1]
    rate = analysis.coding_rate(z, eps)
    assert rate.dtype == torch.float64 and rate.shape == shape[:-2]
    np.testing.assert_allclose(rate.numpy(), expected, rtol=1e-12)


def test_one_embedding_and_rotations():
    z = torch.randn(1, 6)
    z /= z.norm()
    assert analysis.coding_rate(z, 0.5).item() == pytest.approx(0.5 * math.log(1 + 6 / 0.25))
    many = torch.randn(9, 6).double()
    turned = analysis.coding_rate(many @ orthogonal(6))
    torch.testing.assert_close(turned, analysis.coding_rate(many))


@pytest.mark.parametrize(("length", "eps"), [(1e6, analysis.EPS), (1e9, analysis.EPS), (1.0, 1e-8)])
def test_coding_rate_of_one_direction_at_any_length(length, eps):
    z = length * torch.randn(50, 1).double() @ torch.nn.functional.normalize(torch.randn(1, 8)).double()
    expected = 0.5 * math.log1p(8 / (50 * eps**2) * z.square().sum().item())
    assert analysis.coding_rate(z, eps).item() == pytest.approx(expected, rel=1e-3 if eps > 0.1 else 0.05)


def test_rate_reduction_is_largest_for_orthogonal_classes():
    labels = torch.tensor([0] * 8 + [255] * 8)  # any integers are labels
    basis = torch.eye(6).double()
    apart = torch.randn(16, 6).double()
    apart[:8, 3:], apart[8:, :3] = 0, 0
    mixed = torch.cat([apart[:8], apart[8:] @ basis.roll(3, 0)])  # both classes in one subspace
    apart, mixed = analysis.unit_length(apart), analysis.unit_length(mixed)
    reduction = lambda z: (analysis.coding_rate(z) - analysis.class_coding_rate(z, labels)).item()
    assert reduction(apart) > 2 * reduction(mixed) > 0
    one = torch.zeros(16, dtype=torch.long)
    torch.testing.assert_close(analysis.class_coding_rate(apart, one), analysis.coding_rate(apart))
    by_hand = 0.5 * (analysis.coding_rate(apart[:8]) + analysis.coding_rate(apart[8:]))
    torch.testing.assert_close(analysis.class_coding_rate(apart, labels), by_hand)


def test_rate_in_subspaces_does_not_depend_on_their_bases():
    z, proj = torch.randn(2, 11, 12), torch.randn(3 * 4, 12)
    rate = analysis.subspace_coding_rate(z, analysis.subspace_bases(proj, 3))
    other = torch.cat([torch.randn(4, 4) @ head for head in proj.chunk(3)])  # other rows, the same spans
    torch.testing.assert_close(analysis.subspace_coding_rate(z, analysis.subspace_bases(other, 3)), rate)
    parts = [torch.linalg.qr(head.double().T).Q for head in proj.chunk(3)]
    torch.testing.assert_close(rate, sum(analysis.coding_rate(z.double() @ u) for u in parts))
    whole = analysis.subspace_coding_rate(z, [orthogonal(12)])  # all of the space
    torch.testing.assert_close(whole, analysis.coding_rate(z))


@pytest.mark.parametrize("n, d", [(30, 5), (4, 9), (1, 3)])
def test_explained_variance_is_that_of_the_covariance(n, d):
    x = torch.randn(2, n, d)
    shares = analysis.explained_variance(x)
    assert shares.shape == (2, min(n, d))
    for one, share in zip(x.double().numpy(), shares.numpy()):
        centred = one - one.mean(0)
        values = np.linalg.eigvalsh(centred.T @ centred)[::-1][: min(n, d)]
        expected = values / values.sum() if n > 1 else np.zeros(1)
        np.testing.assert_allclose(share, expected, atol=1e-12)


def test_effective_rank_counts_equal_directions():
    x = torch.cat([torch.eye(8)[:3], -torch.eye(8)[:3]])  # three directions of equal variance
    assert analysis.effective_rank(analysis.explained_variance(x)).item() == pytest.approx(3)
    assert analysis.effective_rank(analysis.explained_variance(torch.ones(4, 8))).item() == 1  # exp(0)


def test_span_energy_is_the_projected_share():
    x = torch.randn(40, 10) * torch.logspace(0, -2, 10)
    principal = torch.linalg.svd(x.double()).Vh[:3]
    share, best = analysis.span_energy(x, torch.randn(3, 3).double() @ principal)
    torch.testing.assert_close(share, best)
    assert 0.9 < share < 1
    vectors = torch.randn(3, 10)
    share, best = analysis.span_energy(x, vectors)
    projector = torch.linalg.pinv(vectors.double()) @ vectors.double()
    torch.testing.assert_close(share, (x.double() @ projector).square().sum() / x.double().square().sum())
    assert share < best
    twice = analysis.span_energy(x, torch.cat([vectors, 2 * vectors, torch.zeros(1, 10)]))
    torch.testing.assert_close(torch.stack(twice), torch.stack([share, best]))
    assert analysis.span_energy(x, torch.zeros(2, 10))[0] == 0


def test_coherence():
    vectors = torch.randn(2, 5, 7)
    expected = torch.nn.functional.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1).abs()
    torch.testing.assert_close(analysis.coherence(vectors).float(), expected)
    torch.testing.assert_close(analysis.coherence(3 * orthogonal(4)), torch.eye(4).double())
    assert analysis.coherence(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]
    tiny = analysis.coherence(1e-200 * torch.eye(3).double())
    torch.testing.assert_close(tiny, torch.eye(3).double())


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: analysis.coding_rate(torch.zeros(3)), ValueError, r"\(\.\.\., N, D\).*\(3,\)"),
        (lambda: analysis.coding_rate(torch.zeros(0, 3)), ValueError, "N and D at least 1"),
        (lambda: analysis.class_coding_rate(torch.ones(3, 2), [0, 1, 1]), TypeError, "must be a tensor.*list"),
        (lambda: analysis.subspace_bases(torch.ones(6, 4), 0), ValueError, "H = 0"),
        (lambda: analysis.coding_rate(torch.zeros(2, 3), 0.0), ValueError, "eps must be above 0"),
        (lambda: analysis.coding_rate(torch.tensor([[math.nan]])), ValueError, "NaN"),
        (lambda: analysis.coding_rate([[1.0]]), TypeError, "real tensor.*list"),
        (lambda: analysis.coding_rate(torch.zeros(2, 2, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: analysis.class_coding_rate(torch.ones(3, 2), torch.zeros(2)), ValueError, r"\(3,\)"),
        (lambda: analysis.class_coding_rate(torch.ones(1, 3, 2), torch.zeros(1)), ValueError, r"\(N, D\)"),
        (lambda: analysis.subspace_coding_rate(torch.ones(3, 4), [torch.eye(5)]), ValueError, r"\(4, rank\).*\(5, 5\)"),
        (lambda: analysis.subspace_bases(torch.ones(7, 4), 2), ValueError, "H = 2"),
        (lambda: analysis.span_energy(torch.ones(3, 4), torch.ones(2, 5)), ValueError, r"\(C, 4\)"),
        (lambda: analysis.span_energy(torch.zeros(3, 4), torch.ones(2, 4)), ValueError, "all zero"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def decoders():
    return {
        "sa": DepictDecoder(5, 24, "sa", depth=3, num_heads=2, head_dim=8),
        "ca": DepictDecoder(5, 24, "ca", depth=2, num_heads=2, head_dim=8, cross_depth=1, cross_head_dim=4),
        "segmenter": SegmenterDecoder(5, 24, num_heads=2),
    }


@pytest.mark.parametrize("name", ["sa", "ca", "segmenter"])
def test_layer_embeddings_are_those_of_the_images(name):
    decoder = decoders()[name].eval()
    patches = torch.randn(2, 9, 24)
    seen, compared = analysis.layer_embeddings(decoder, patches)
    layers = decoder.layers if name != "segmenter" else decoder.blocks
    assert [x.shape for x in seen] == [(2, 9, 24)] * (len(layers) + 1)
    assert not any(x.requires_grad for x in seen)
    images, classes = decoder.embeddings(patches)
    assert compared[0].equal(images) and compared[1].equal(classes)
    if name == "segmenter":
        torch.testing.assert_close(seen[0], decoder.proj_dec(patches))
        torch.testing.assert_close(decoder.norm(seen[-1]) @ decoder.proj_patch, images)
    else:
        assert torch.equal(seen[0], patches)
        torch.testing.assert_close(decoder.norm(seen[-1]), images)
    if name == "ca":
        torch.testing.assert_close(layers[1](layers[0](patches)), seen[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_layer_embeddings_leave_no_hooks_after_an_error():
    decoder = decoders()["sa"]
    with pytest.raises(RuntimeError):
        analysis.layer_embeddings(decoder, torch.randn(2, 9, 23))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
    for without in (LinearDecoder(5, 24), DepictDecoder(5, 24, depth=0)):
        with pytest.raises(ValueError, match="no self-attention layers"):
            analysis.layer_embeddings(without, torch.randn(2, 9, 24))


def test_noise_is_what_it_says_and_is_taken_back():
    decoder = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200))
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    drawn = {}
    for seed in (0, 0, 1):
        with analysis.perturbed(decoder, 0.02, seed) as same:
            assert same is decoder
            noise = torch.cat([(p - before[k]).flatten() for k, p in decoder.named_parameters()])
            assert decoder[1].running_var.equal(before["1.running_var"])
        assert noise.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(noise.mean().item()) < 0.02 * 4 / math.sqrt(noise.numel())
        assert all(value.equal(before[key]) for key, value in decoder.state_dict().items())
        drawn.setdefault(seed, []).append(noise)
    assert drawn[0][0].equal(drawn[0][1]) and not drawn[0][0].equal(drawn[1][0])
    with analysis.perturbed(decoder, 0.0):
        assert all(value.equal(before[key]) for key, value in decoder.state_dict().items())
    with pytest.raises(KeyError), analysis.perturbed(decoder, 1e30):
        raise KeyError
    assert all(value.equal(before[key]) for key, value in decoder.state_dict().items())
    for sigma in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma"), analysis.perturbed(decoder, sigma):
            pass


def test_noise_spares_what_half_precision_rounds():
    linear = torch.nn.Linear(8, 8).half()
    before = linear.weight.detach().clone()
    with analysis.perturbed(linear, 1.0):
        assert linear.weight.dtype == torch.float16 and not linear.weight.equal(before)
    assert linear.weight.equal(before)


def test_noise_counts_once_where_parameters_share_memory():
    tied = torch.nn.Sequential(torch.nn.Linear(300, 200, bias=False), torch.nn.Linear(200, 300, bias=False))
    tied[1].weight = torch.nn.Parameter(tied[0].weight.detach().T)
    before = tied[0].weight.detach().clone()
    with analysis.perturbed(tied, 0.02):
        assert (tied[0].weight - before).std().item() == pytest.approx(0.02, rel=0.02)
        assert tied[1].weight.equal(tied[0].weight.T)
    assert tied[0].weight.equal(before)
