"""Segmenter's decoders (Strudel et al., ICCV 2021, arXiv 2105.05633): the black-box counterpart of DEPICT."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from depict_kernels import ops
from depict_kernels.models.depict import check_count, check_mask_classes


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SegmenterDecoder(nn.Module):
    """Segmenter's mask transformer: standard Transformer blocks on patches and class embeddings.

    Args:
        num_classes: C, at least 1.
        embed_dim: D of the backbone; also the decoder's width.
        depth: number of Transformer blocks.
        num_heads: of the blocks; None means embed_dim // 64 as upstream.
        drop_rate: dropout in the blocks.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of the mask head, see :mod:`depict_kernels.backends`.
    """

    class_parameters = ("class_embed", "mask_norm.weight", "mask_norm.bias")  # with a row per class

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        depth: int = 2,
        num_heads: int | None = None,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_mask_classes(num_classes)
        check_count("depth", depth, 0)
        if num_heads is not None:
            check_count("num_heads", num_heads, 1)
        num_heads = num_heads or max(1, embed_dim // 64)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.proj_dec = nn.Linear(embed_dim, embed_dim)
        self.class_embed = nn.Parameter(torch.empty(1, num_classes, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                qkv_bias=True,
                proj_drop=drop_rate,
                attn_drop=drop_rate,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=1e-5),  # upstream's, where timm's default is 1e-6
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.proj_patch = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim**-0.5)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.backend = backend
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.class_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare, as timm's models have it."""
        return {"class_embed"}

    def embeddings(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches (B, N, D) -> what the mask head compares: patches (B, N, D) and classes (B, C, D)."""
        x = self.proj_dec(patches)
        classes = self.class_embed.expand(x.shape[0], -1, -1)
        x = torch.cat([x, classes.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return (
            x[:, : -self.num_classes] @ self.proj_patch,
            x[:, -self.num_classes :] @ self.proj_classes,
        )

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches (B, N, D), grid (h, w) with N = h * w in row-major order -> masks (B, C, h, w)."""
        patches, classes = self.embeddings(patches)
        norm = self.mask_norm
        return ops.mask_logits(patches, classes, norm.weight, norm.bias, grid, norm.eps, backend=self.backend)


class LinearDecoder(nn.Module):
    """Segmenter's linear baseline: one affine map per patch. ``backend`` is accepted for uniformity; unused."""

    class_parameters = ("head.weight", "head.bias")

    def __init__(self, num_classes: int, embed_dim: int, backend: str = "auto") -> None:
        super().__init__()
        check_count("num_classes", num_classes, 1)
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.backend = backend
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare: none."""
        return set()

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches (B, N, D), grid (h, w) with N = h * w in row-major order -> masks (B, C, h, w)."""
        if patches.shape[-1] != self.embed_dim or patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"patches must be (B, {grid[0] * grid[1]}, {self.embed_dim}) for grid {tuple(grid)}, "
                f"got {tuple(patches.shape)}"
            )
        return self.head(patches).mT.unflatten(-1, grid).contiguous()
