"""create_model and the list of names, in the way of timm."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from torch import nn

from depict_kernels.backends import check_name
from depict_kernels.models.backbone import Backbone
from depict_kernels.models.depict import DepictDecoder
from depict_kernels.models.segmentation import SegmentationModel
from depict_kernels.models.segmenter import LinearDecoder, SegmenterDecoder

_BACKBONES = {size: f"vit_{size}_patch16_384" for size in ("tiny", "small", "base", "large")}
_DECODERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "depict_sa": (DepictDecoder, {"mode": "sa"}),
    "depict_ca": (DepictDecoder, {"mode": "ca"}),
    "segmenter_mask": (SegmenterDecoder, {}),
    "segmenter_linear": (LinearDecoder, {}),
}
_MODELS = {f"{decoder}_vit_{size}": (decoder, size, {}) for decoder in _DECODERS for size in _BACKBONES}
# The paper's FLOPs for ViT-L fit 6 MSSA layers, where upstream's code has 3.
_MODELS["depict_sa_vit_large_depth6"] = ("depict_sa", "large", {"depth": 6})
_MODELS["depict_ca_vit_large_depth6"] = ("depict_ca", "large", {"depth": 6})


def list_models(filter: str = "*") -> list[str]:
    """Names that :func:`create_model` takes, sorted; ``filter`` is a wildcard pattern as in timm."""
    return sorted(fnmatch.filter(_MODELS, filter))


def create_model(
    name: str,
    num_classes: int = 150,
    pretrained: bool = False,
    *,
    backend: str = "auto",
    checkpoint_path: str | None = None,
    img_size: int | tuple[int, int] = 512,
    drop_path_rate: float = 0.0,
    upstream_backbone: bool = False,
    backbone: str | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    decoder_kwargs: dict[str, Any] | None = None,
) -> SegmentationModel:
    """Builds a segmentation model: a timm ViT and a decoder.

    Args:
        name: one of :func:`list_models`.
        num_classes: C.
        pretrained: load timm's ImageNet weights into the backbone; raises where they cannot be had.
        backend: of all operators, see :mod:`depict_kernels.backends`.
        checkpoint_path: local file with the backbone's weights instead of a download.
        img_size: what the position embedding is built for, pixels.
        drop_path_rate: stochastic depth of the backbone.
        upstream_backbone: LayerNorm eps and position resizing of Segmenter's own ViT (see :class:`Backbone`).
        backbone: any timm ViT instead of the one in the name, for example "vit_base_patch14_reg4_dinov2".
        backbone_kwargs: passed to timm (depth, embed_dim, num_heads, patch_size, ...).
        decoder_kwargs: passed to the decoder (depth, head_dim, ...).

    Raises:
        ValueError: unknown name (the nearest is suggested), backbone or backend.
        PretrainedWeightsError: weights were asked for and cannot be had.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {hint}list_models() gives all names")
    check_name(backend)
    kind, size, options = _MODELS[name]
    vit = Backbone(
        backbone or _BACKBONES[size],
        img_size=img_size,
        pretrained=pretrained,
        checkpoint_path=checkpoint_path,
        drop_path_rate=drop_path_rate,
        upstream_style=upstream_backbone,
        **(backbone_kwargs or {}),
    )
    decoder_class, fixed = _DECODERS[kind]
    decoder = decoder_class(
        num_classes, vit.embed_dim, backend=backend, **{**fixed, **options, **(decoder_kwargs or {})}
    )
    return SegmentationModel(vit, decoder)
