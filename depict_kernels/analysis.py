"""What a decoder does to its embeddings, in the terms that DEPICT was derived in.

Coding rates measure how much room embeddings take (Yu et al., NeurIPS 2020, arXiv 2006.08558), within subspaces as in
CRATE (Yu et al., NeurIPS 2023, arXiv 2306.01129); PCA, spans and coherence say whether class embeddings are bases of
the image embeddings' principal subspace (Wen and Li, NeurIPS 2024, arXiv 2411.03033); :func:`perturbed` is that paper's
test of robustness. Everything is computed in float64 and gives no gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = math.sqrt(0.5)  # arXiv 2006.08558's distortion for embeddings of unit length: eps^2 = 0.5


def _double(name: str, x: Tensor, ndim: int | None = None) -> Tensor:
    """x (..., N, D) as float64. Raises TypeError for anything but a real tensor, ValueError for other shapes or NaN."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(
            f"{name} must be a real tensor (..., N, D), got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.ndim < 2 or 0 in x.shape[-2:] or ndim not in (None, x.ndim):
        shape = "(..., N, D)" if ndim is None else "(N, D)"
        raise ValueError(f"{name} must be {shape} with N and D at least 1, got {tuple(x.shape)}")
    x = x.detach().double()
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return x


def coding_rate(z: Tensor, eps: float = EPS) -> Tensor:
    """R(Z) = 1/2 logdet(I + D / (N eps^2) Z^T Z), in nats: what coding the rows up to a distortion of eps takes.

    It depends on the embeddings' length, so that they are compared at one: :func:`unit_length`.

    Args:
        z: (..., N, D), N embeddings.
        eps: root mean square distortion of an embedding, above 0.

    Returns:
        (...) float64.

    Raises:
        TypeError, ValueError: z is no finite real tensor (..., N, D), or eps is not above 0.
    """
    z = _double("z", z)
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    n, d = z.shape[-2:]
    return (math.sqrt(d / n) / eps * torch.linalg.svdvals(z)).square().log1p().sum(-1) / 2


def class_coding_rate(z: Tensor, labels: Tensor, eps: float = EPS) -> Tensor:
    """R(Z | labels): :func:`coding_rate` of each class's embeddings alone, averaged over the embeddings.

    ``coding_rate(z) - class_coding_rate(z, labels)`` is the coding rate reduction of arXiv 2006.08558: large where
    classes lie in different directions and each one in few.

    Args:
        z: (N, D).
        labels: (N,) integers; leave unlabelled embeddings out of both.

    Returns:
        Scalar, float64.
    """
    z = _double("z", z, 2)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor ({len(z)},), got {type(labels).__name__}")
    if labels.shape != z.shape[:1]:
        raise ValueError(f"labels must be ({len(z)},), one for each embedding, got {tuple(labels.shape)}")
    groups = [z[labels == label] for label in labels.unique()]
    return sum(len(group) / len(z) * coding_rate(group, eps) for group in groups)


def subspace_bases(proj: Tensor, num_heads: int) -> list[Tensor]:
    """Orthonormal bases of the subspaces that the heads' rows of a layer's shared projection span.

    Args:
        proj: (H * d, D).

    Returns:
        H of (D, rank) float64.
    """
    proj = _double("proj", proj, 2)
    if num_heads < 1 or len(proj) % num_heads:
        raise ValueError(f"proj must be (H * d, D) with H = {num_heads}, got {tuple(proj.shape)}")
    return [_basis(head) for head in proj.chunk(num_heads)]


def subspace_coding_rate(z: Tensor, bases: Sequence[Tensor], eps: float = EPS) -> Tensor:
    """Sum over heads of R(Z U_h), with a layer's U_h of :func:`subspace_bases`.

    Args:
        z: (..., N, D).
        bases: (D, rank) each, with orthonormal columns.

    Returns:
        (...) float64.
    """
    z = _double("z", z)
    for basis in bases:
        if len(basis) != z.shape[-1]:
            raise ValueError(f"bases must be ({z.shape[-1]}, rank) each, got {tuple(basis.shape)}")
    return sum(coding_rate(z @ basis, eps) for basis in bases)


def explained_variance(x: Tensor) -> Tensor:
    """Shares of the variance that the principal components have, largest first: (..., N, D) -> (..., min(N, D)).

    All zero where the rows are equal.
    """
    x = _double("x", x)
    variance = torch.linalg.svdvals(x - x.mean(-2, keepdim=True)).square()
    total = variance.sum(-1, keepdim=True)
    return variance / torch.where(total > 0, total, 1)


def effective_rank(shares: Tensor) -> Tensor:
    """exp of the entropy of ``shares`` (..., K), as of :func:`explained_variance`: how many equal ones they are worth.

    (Roy and Vetterli, EUSIPCO 2007; they take singular values, whose squares these are.)
    """
    return torch.special.entr(shares).sum(-1).exp()


def span_energy(x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the squared length of x that lies in the span of ``vectors``, and the most that so many directions hold.

    Args:
        x: (N, D), not all zero.
        vectors: (C, D); linearly dependent ones count once.

    Returns:
        Two float64 scalars in 0..1; equal where the span is x's principal subspace.
    """
    x, vectors = _double("x", x, 2), _double("vectors", vectors, 2)
    if vectors.shape[1] != x.shape[1]:
        raise ValueError(f"vectors must be (C, {x.shape[1]}), got {tuple(vectors.shape)}")
    basis = _basis(vectors)
    energy = torch.linalg.svdvals(x).square()
    if not energy.sum() > 0:
        raise ValueError("x is all zero: no share of it lies anywhere")
    inside = (x @ basis).square().sum()
    return inside / energy.sum(), energy[: basis.shape[1]].sum() / energy.sum()


def coherence(vectors: Tensor) -> Tensor:
    """|cosine| of every pair: (..., C, D) -> (..., C, C), the identity where they are orthogonal. Of a zero vector: 0.

    Random directions have sqrt(2 / (pi D)) on the average.
    """
    unit = unit_length(vectors)
    return (unit @ unit.mT).abs().clamp(max=1)


def unit_length(x: Tensor) -> Tensor:
    """x (..., N, D) in float64 with every vector divided by its length; zero stays zero."""
    x = _double("x", x)
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)


def _basis(vectors: Tensor) -> Tensor:
    """(C, D) -> (D, rank): orthonormal columns that span the same."""
    _, lengths, rows = torch.linalg.svd(vectors, full_matrices=False)
    tolerance = max(vectors.shape) * torch.finfo(vectors.dtype).eps * lengths[0]
    return rows[lengths > tolerance].mT


@torch.no_grad()
def layer_embeddings(decoder: nn.Module, patches: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The image embeddings on their way through a decoder's self-attention layers, and what its mask head compares.

    Args:
        decoder: a DepictDecoder or SegmenterDecoder.
        patches: (B, N, D), what it is given.

    Returns:
        A (B, N, D) tensor for each layer, what enters it, and a last one, what leaves the last of them; class
        embeddings among the tokens are cut off. Then the decoder's ``embeddings(patches)``: of the image (B, N, D) and
        of the classes (B, C, D).

    Raises:
        ValueError: the decoder has no such layers.
    """
    layers = getattr(decoder, "layers", None) or getattr(decoder, "blocks", None)
    if not layers:
        raise ValueError(
            f"{type(decoder).__name__} has no self-attention layers; depict_* and segmenter_mask_* have"
        )
    seen: list[Tensor] = []
    n = patches.shape[1]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :n])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, out: seen.append(out[:, :n])))
    try:
        return seen, decoder.embeddings(patches)
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def perturbed(module: nn.Module, sigma: float, seed: int = 0) -> Iterator[nn.Module]:
    """Adds Gaussian noise of standard deviation ``sigma`` to every parameter for the time of the ``with``.

    The noise depends on ``seed`` and the parameters' order and shapes alone, not on their device. Afterwards they
    are bit for bit what they were. Raises ValueError for a sigma that is negative, NaN or infinite.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    # Parameters that share their memory are one, whatever the objects: noise twice would be more than sigma.
    distinct = {parameter.data_ptr(): parameter for parameter in module.parameters()}.values()
    before = [(parameter, parameter.detach().clone()) for parameter in distinct]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter, _ in before:
                parameter += sigma * torch.randn(parameter.shape, generator=generator).to(parameter)
        yield module
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
