"""Weights of the official Segmenter and DEPICT code, loaded strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from depict_kernels.models.depict import DepictDecoder
from depict_kernels.models.segmentation import SegmentationModel
from depict_kernels.models.segmenter import LinearDecoder, SegmenterDecoder

_COMMON = [(r"cls_emb$", "class_embed")]
_LAYER = [
    (r"norm\.", "norm."),
    (r"fn\.proj$", "proj"),
    (r"fn\.step_size$", "step"),
]


def _depict_rules(mode: str) -> list[tuple[str, str]]:
    rules = list(_COMMON)
    nets = {"net": "layers"} if mode == "sa" else {"snet": "layers", "cnet": "cross_layers"}
    for theirs, ours in nets.items():
        rules += [(rf"{theirs}\.layers\.(\d+)\.{old}", rf"{ours}.\1.{new}") for old, new in _LAYER]
    if mode == "sa":
        rules.append((r"decoder_norm\.", "norm."))
    else:
        rules += [(r"snorm\.", "norm."), (r"cnorm\.", "cross_norm.")]
    return rules


def _rules(decoder: nn.Module) -> list[tuple[str, str]]:
    if isinstance(decoder, DepictDecoder):
        return _depict_rules(decoder.mode)
    if isinstance(decoder, SegmenterDecoder):
        return [*_COMMON, (r"decoder_norm\.", "norm.")]
    if isinstance(decoder, LinearDecoder):
        return []
    raise TypeError(f"no upstream weights are known for {type(decoder).__name__}")


def load_upstream_decoder(decoder: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads the decoder weights of the official code into ours, strictly.

    Args:
        decoder: :class:`DepictDecoder` (upstream keys cls_emb, net.layers.{i}.norm.*,
            net.layers.{i}.fn.{proj,step_size}, decoder_norm.*, mask_norm.*; for "ca" snet, cnet, snorm, cnorm
            in place of net and decoder_norm), :class:`SegmenterDecoder` or :class:`LinearDecoder`.
        state_dict: upstream's, with or without the prefix "decoder."; other parts of a whole model's
            state dict ("encoder.*") are left alone.

    Raises:
        ValueError: naming missing and unexpected keys and shapes that differ, some of each. Nothing is loaded then.
    """
    if any(key.startswith("decoder.") for key in state_dict):
        prefix = "decoder."
        state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    rules = [(re.compile(rf"^{old}"), new) for old, new in _rules(decoder)]
    own = decoder.state_dict()
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        name = key
        for pattern, new in rules:
            name, count = pattern.subn(new, name)
            if count:
                break
        if name.endswith(".step") or name == "step":
            value = value.reshape(1) if value.numel() == 1 else value
        if name in renamed:
            raise ValueError(f"{origin[name]} and {key} are both {name} of {type(decoder).__name__}")
        renamed[name], origin[name] = value, key
    _check(own, renamed, origin, type(decoder).__name__)
    decoder.load_state_dict(renamed)


def load_upstream_checkpoint(model: SegmentationModel, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a whole official Segmenter or DEPICT model ("encoder.*" and "decoder.*"), strictly.

    Args:
        model: built with ``upstream_backbone=True``, since upstream's ViT differs from timm's in LayerNorm's
            eps and in how it resizes position embeddings, and with the ``img_size`` it was trained at.
        state_dict: upstream's ``checkpoint["model"]``. The encoder's ImageNet classifier is dropped.

    Raises:
        ValueError: the model is not in upstream's style, or keys or shapes differ (some are named).
    """
    if not model.backbone.upstream_style:
        raise ValueError(
            "build the model with create_model(..., upstream_backbone=True) to load upstream weights"
        )
    if not any(key.startswith("encoder.") for key in state_dict):
        own = any(key.startswith("backbone.") for key in state_dict)
        hint = (
            "this library's own weights go through model.load_state_dict"
            if own
            else "checkpoint['model'] has them"
        )
        raise ValueError(f"no key begins with 'encoder.', as the official code's do: {hint}")
    encoder = {
        k.removeprefix("encoder."): v
        for k, v in state_dict.items()
        if k.startswith("encoder.") and not re.match(r"encoder\.head(_dist)?\.", k)
    }
    vit = model.backbone.vit
    strays = [key for key in state_dict if not key.startswith(("encoder.", "decoder."))]
    _check(vit.state_dict(), encoder, {k: f"encoder.{k}" for k in encoder}, type(vit).__name__, strays)
    load_upstream_decoder(model.decoder, state_dict)
    vit.load_state_dict(encoder)


def _check(
    own: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    origin: Mapping[str, str],
    what: str,
    strays: Sequence[str] = (),
) -> None:
    missing = [f"missing {key}" for key in own if key not in new]
    unexpected = [f"unexpected {key}" for key in (*(origin[key] for key in new if key not in own), *strays)]
    shapes = [
        f"{origin[key]} has shape {tuple(new[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own
        if key in new and own[key].shape != new[key].shape
    ]
    if problems := [*_some(missing), *_some(unexpected), *_some(shapes)]:
        raise ValueError(f"these weights do not fit {what}: {'; '.join(problems)}")


def _some(problems: list[str], most: int = 5) -> list[str]:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return problems[:most] + more
