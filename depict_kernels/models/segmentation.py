"""A backbone and a decoder as one model; callers never hold upsampled logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depict_kernels import ops
from depict_kernels.backends import check_name
from depict_kernels.models import graphs
from depict_kernels.models.backbone import Backbone

_NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)


class SegmentationModel(nn.Module):
    """``model.backbone`` and ``model.decoder`` joined.

    Images are float (B, 3, H, W), normalised with ``model.mean`` and ``model.std`` (of pixels in [0, 1]). Where
    the patch does not divide H or W they are zero-padded at the right and bottom, the target with
    ignore_index, and label maps are cropped.
    """

    def __init__(self, backbone: Backbone, decoder: nn.Module) -> None:
        super().__init__()
        if backbone.embed_dim != decoder.embed_dim:
            raise ValueError(
                f"the backbone gives embeddings of width {backbone.embed_dim}, the decoder takes {decoder.embed_dim}"
            )
        self.backbone = backbone
        self.decoder = decoder

    @property
    def num_classes(self) -> int:
        return self.decoder.num_classes

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.backbone.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.backbone.std

    @property
    def backend(self) -> str:
        """Backend of every operator in the model; assign to change it."""
        return self.decoder.backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_name(name)
        for module in self.decoder.modules():
            if hasattr(module, "backend"):
                module.backend = name

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters that weight decay should spare."""
        spare = {f"decoder.{name}" for name in self.decoder.no_weight_decay()}
        if hasattr(self.backbone.vit, "no_weight_decay"):
            spare |= {f"backbone.vit.{name}" for name in self.backbone.vit.no_weight_decay()}
        return spare

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that the masks of an image of (height, width) cover: the next multiples of the patch."""
        p = self.patch_size
        return -(-height // p) * p, -(-width // p) * p

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> low-resolution masks (B, C, h, w), h = ceil(H / patch).

        Raises TypeError or ValueError for anything but float (B, 3, H, W).
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor (B, 3, H, W), got {type(images).__name__}; torch.as_tensor makes one"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, normalised as (pixels / 255 - mean) / std, got {images.dtype}"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        height, width = self.padded_size(*images.shape[-2:])
        images = _pad(images, height, width, 0.0)
        patches = self.backbone(images)
        return self.decoder(patches, (height // self.patch_size, width // self.patch_size))

    def loss(
        self,
        images: Tensor,
        target: Tensor,
        ignore_index: int | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        check_targets: bool | None = None,
    ) -> Tensor:
        """Cross-entropy of the upsampled masks with target (B, H, W); arguments as
        :func:`depict_kernels.ops.upsample_cross_entropy`. With "none" the loss is (B, H, W)."""
        if target.shape[-2:] != images.shape[-2:]:
            raise ValueError(
                f"target {tuple(target.shape)} must have the images' height and width {tuple(images.shape[-2:])}"
            )
        if ignore_index is None:
            ignore_index = ops.default_ignore_index(self.num_classes)
        height, width = target.shape[-2:]
        padded = self.padded_size(height, width)
        if padded != (height, width) and target.dtype in _NARROW:
            kind = torch.iinfo(target.dtype)
            if not kind.min <= ignore_index <= kind.max:
                target = target.long()  # the padding must be able to hold ignore_index
        loss = ops.upsample_cross_entropy(
            self(images),
            _pad(target, *padded, ignore_index),
            ignore_index,
            weight,
            label_smoothing,
            reduction,
            check_targets,
            backend=self.backend,
        )
        return loss[:, :height, :width] if reduction == "none" else loss

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.int64, cuda_graph: bool = False) -> Tensor:
        """Label map (B, H, W) at the images' own size; gives no gradient and leaves train/eval mode as it is.

        Args:
            images: (B, 3, H, W), as for :meth:`forward`.
            dtype: of the labels: uint8 (at most 256 classes), int32 or int64.
            cuda_graph: replay the whole prediction as one CUDA graph, captured at the first call with images of a
                shape and dtype, which takes as long as a few predictions. For small batches on a GPU, where launches
                take longer than the kernels. The last 8 kinds are kept; weights may change in place, and where one
                is replaced (``.half()``, ``.to(...)``) the graphs are captured anew. The model must be in evaluation
                mode. Python code in the model (hooks) runs at the capture alone. Within a capture or
                torch.compile, which has mode="reduce-overhead" for this, it does nothing.

        Raises:
            ValueError: ``cuda_graph`` with images on the CPU, a model in training mode, or a weight without memory of
                its own (a wrapper around other tensors, as quantisation makes).
        """
        if cuda_graph and not torch.compiler.is_compiling():
            return graphs.predict(self, images, dtype)
        masks = self(images)
        height, width = images.shape[-2:]
        padded = self.padded_size(height, width)
        labels = ops.upsample_argmax(masks, padded, dtype, backend=self.backend)
        return labels[:, :height, :width]

    def release_cuda_graphs(self) -> None:
        """Frees the GPU memory that :meth:`predict` with ``cuda_graph=True`` keeps."""
        graphs.release(self)


def _pad(x: Tensor, height: int, width: int, value: float) -> Tensor:
    if x.shape[-2:] == (height, width):
        return x
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)
