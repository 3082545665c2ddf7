"""The DEPICT decoder (Wen and Li, NeurIPS 2024, arXiv 2411.03033): attention derived from compression.

MSSA shapes the principal subspace of the image embeddings; MSCA turns class queries into bases of it; the
mask head projects the image embeddings on those bases. No MLP, no dropout, one projection per layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depict_kernels import ops


def check_count(name: str, value: int, least: int) -> None:
    """Raises TypeError where a size is no integer, ValueError where it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_mask_classes(num_classes: int) -> None:
    """:func:`check_count` for a mask head that normalises over the classes, which needs a few of them to say much.

    Warns of one class, whose masks are constant, and of two, whose masks are plus and minus one.
    """
    check_count("num_classes", num_classes, 1)
    if num_classes < 3:
        masks = (
            "constant, so that nothing is learnt"
            if num_classes == 1
            else "plus and minus one, which train badly"
        )
        warnings.warn(
            f"num_classes={num_classes}: the mask head normalises over the classes, and its masks of so few are "
            f"{masks}; segmenter_linear_* (LinearDecoder) has no such head",
            stacklevel=3,
        )


class _SubspaceAttention(nn.Module):
    """One shared projection P (H * d, D) as query, key, value and (transposed) output map, one step size."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        backend: str = "auto",
        step_init: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.backend = backend
        self.norm = nn.LayerNorm(embed_dim)
        self.proj = nn.Parameter(torch.randn(num_heads * head_dim, embed_dim) * embed_dim**-0.5)
        # One axis, as upstream has it: FSDP shards no scalars.
        self.step = nn.Parameter(torch.randn(1) if step_init is None else torch.tensor([float(step_init)]))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, H, d): what the projection yields without a copy."""
        return F.linear(x, self.proj).unflatten(-1, (self.num_heads, self.head_dim))

    def _add_step(self, x: Tensor, o: Tensor) -> Tensor:
        # The step scales the small matrix: no pass over the tokens, none of whose products is kept for backward.
        return x + o.flatten(2) @ (self.step * self.proj)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, backend={self.backend!r}"


class SubspaceSelfAttention(_SubspaceAttention):
    """MSSA: x <- x + step * softmax(w w^T / sqrt(d)) w P with w = LN(x) P^T (arXiv 2411.03033, eq. 7)."""

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        o = ops.subspace_self_attention(self._heads(self.norm(x)), backend=self.backend)
        return self._add_step(x, o)


class SubspaceCrossAttention(_SubspaceAttention):
    """MSCA: q <- q + step * softmax(v w^T / sqrt(d)) w P with v = q P^T, w = LN(x) P^T; q is not normalised."""

    def forward(self, q: Tensor, x: Tensor, w: Tensor | None = None) -> Tensor:
        """q (B, C, D), x (B, N, D) -> (B, C, D); w (B, N, H, d) where :func:`project_keys` made it from x."""
        if w is None:
            (w,) = project_keys([self], x)
        return self._add_step(q, ops.subspace_cross_attention(self._heads(q), w, backend=self.backend))


def project_keys(layers: Sequence[SubspaceCrossAttention], x: Tensor) -> Sequence[Tensor]:
    """x (B, N, D) -> w = LN(x) P^T (B, N, H, d) of every layer: one normalisation, one product.

    The layers' LayerNorms differ in their affine part alone, which folds into the projection:
    (z * gamma + beta) P^T = z (gamma * P)^T + P beta.
    """
    if not layers:
        return ()
    first = layers[0]
    z = F.layer_norm(x, x.shape[-1:], eps=first.norm.eps)
    weight = torch.cat([layer.proj * layer.norm.weight for layer in layers])
    bias = torch.cat([layer.proj @ layer.norm.bias for layer in layers])
    w = F.linear(z, weight, bias).unflatten(-1, (len(layers), first.num_heads, first.head_dim))
    return w.unbind(2)


class DepictDecoder(nn.Module):
    """DEPICT-SA or DEPICT-CA: patch embeddings to class masks.

    ``mode="sa"`` appends the C class embeddings to the patches and runs ``depth`` MSSA layers on all N + C
    tokens, then one LayerNorm. ``mode="ca"`` runs ``depth`` MSSA layers on the patches, LayerNorm, then
    ``cross_depth`` MSCA layers with the class embeddings as queries, LayerNorm.

    Args:
        num_classes: C; of one or two the masks say little, which a warning tells.
        embed_dim: D of the backbone.
        mode: "sa" or "ca".
        depth, num_heads, head_dim: of the MSSA layers.
        cross_depth, cross_head_dim: of the MSCA layers; not used by "sa".
        backend: of the operators, see :mod:`depict_kernels.backends`.
        step_init: first value of every layer's step size; None draws them from a normal distribution, as the
            official code does. A small value starts every layer near the identity (as LayerScale does), which
            is what a backbone without pretrained weights needs: a drawn step near minus one over the gain
            of P^T P cancels the embeddings.
    """

    class_parameters = ("class_embed", "mask_norm.weight", "mask_norm.bias")  # with a row per class

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        mode: str = "sa",
        depth: int = 3,
        num_heads: int = 3,
        head_dim: int = 100,
        cross_depth: int = 3,
        cross_head_dim: int = 50,
        backend: str = "auto",
        step_init: float | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("sa", "ca"):
            raise ValueError(f"mode must be 'sa' or 'ca', got {mode!r}")
        check_mask_classes(num_classes)
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "cross_head_dim": cross_head_dim}
        for name, size in sizes.items():
            check_count(name, size, 1)
        for name, size in {"depth": depth, "cross_depth": cross_depth}.items():
            check_count(name, size, 0)
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.mode = mode
        self.class_embed = nn.Parameter(torch.empty(1, num_classes, embed_dim))
        nn.init.trunc_normal_(self.class_embed, std=0.02)
        self.layers = nn.ModuleList(
            SubspaceSelfAttention(embed_dim, num_heads, head_dim, backend, step_init) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        if mode == "ca":
            self.cross_layers = nn.ModuleList(
                SubspaceCrossAttention(embed_dim, num_heads, cross_head_dim, backend, step_init)
                for _ in range(cross_depth)
            )
            self.cross_norm = nn.LayerNorm(embed_dim)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.backend = backend

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare, as timm's models have it."""
        return {"class_embed"} | {name for name, _ in self.named_parameters() if name.endswith(".step")}

    def embeddings(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches (B, N, D) -> what the mask head compares: patches (B, N, D) and classes (B, C, D)."""
        classes = self.class_embed.expand(patches.shape[0], -1, -1)
        if self.mode == "sa":
            x = torch.cat([patches, classes.to(patches.dtype)], dim=1)
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            return x[:, : -self.num_classes], x[:, -self.num_classes :]
        for layer in self.layers:
            patches = layer(patches)
        patches = self.norm(patches)
        for layer, w in zip(self.cross_layers, project_keys(self.cross_layers, patches)):
            classes = layer(classes, patches, w)
        return patches, self.cross_norm(classes)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches (B, N, D), grid (h, w) with N = h * w in row-major order -> masks (B, C, h, w)."""
        patches, classes = self.embeddings(patches)
        norm = self.mask_norm
        return ops.mask_logits(patches, classes, norm.weight, norm.bias, grid, norm.eps, backend=self.backend)
