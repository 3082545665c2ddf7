"""Losses as modules, for use in any segmentation model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from depict_kernels import ops


class UpsampleCrossEntropyLoss(nn.Module):
    """Drop-in for ``nn.CrossEntropyLoss`` behind a bilinear upsampling, which it does itself and never stores.

    Give it the model's low-resolution logits (B, C, h, w) and the full-resolution target (B, H, W). Arguments
    as in :func:`depict_kernels.ops.upsample_cross_entropy`; ``weight`` (C,), a tensor or numbers, moves with the
    module.

    Raises TypeError where weight is neither a tensor nor numbers, ValueError for an unknown reduction or a smoothing
    outside of [0, 1].
    """

    def __init__(
        self,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        check_targets: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if weight is not None:
            try:
                weight = torch.as_tensor(weight)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"weight must be a tensor (C,) or C numbers, got {weight!r}") from error
        ops.upsample.check_options(reduction, label_smoothing)
        self.register_buffer("weight", weight)  # saved, as nn.CrossEntropyLoss has it
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.check_targets = check_targets
        self.backend = backend

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(
            logits,
            target,
            self.ignore_index,
            self.weight,
            self.label_smoothing,
            self.reduction,
            self.check_targets,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
