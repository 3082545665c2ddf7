"""Any plain timm ViT as a backbone: images to a grid of patch embeddings."""

from __future__ import annotations

import difflib
import inspect
import os
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depict_kernels.ops._library import pair


class PretrainedWeightsError(RuntimeError):
    """Pretrained weights were asked for and cannot be had; training from scratch is never the silent answer."""


class Backbone(nn.Module):
    """A timm ViT (plain, DeiT, DINOv2 with registers, ...) without its head.

    Args:
        name: timm model name, for example "vit_small_patch16_384".
        img_size: side length or (H, W) the position embedding is built for, rounded up to the patch; other
            sizes resize it on the fly. None keeps the model's own.
        pretrained: load timm's weights for ``name``.
        checkpoint_path: a local file with those weights (.pth, .safetensors, .npz) instead of a download;
            position embeddings of another size are resized, a classifier is dropped.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        upstream_style: LayerNorm eps 1e-5 and bilinear resizing of the position embedding, as Segmenter's and
            DEPICT's own ViT has it, where timm has 1e-6 and antialiased bicubic. Needed to reproduce
            their checkpoints.
        **kwargs: passed to timm, for example depth, embed_dim, num_heads, patch_size.

    Raises:
        ValueError: unknown name (the nearest is suggested), not a ViT, or one for images of one size only.
        PretrainedWeightsError: the weights cannot be loaded; says how to go on.
    """

    def __init__(
        self,
        name: str,
        img_size: int | tuple[int, int] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_path_rate: float = 0.0,
        upstream_style: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models('vit*') lists ViTs"
            raise ValueError(f"unknown backbone {name!r}{hint}")
        options = {"num_classes": 0, **kwargs}
        with torch.device("meta"):
            probe = timm.create_model(name, **options)
        patch = _patch_size(name, probe)
        if img_size is not None:
            square = isinstance(img_size, int)
            height, width = (img_size, img_size) if square else pair("img_size", img_size)
            options["img_size"] = (_round_up(height, patch), _round_up(width, patch))
        options |= {"dynamic_img_size": True, "drop_path_rate": drop_path_rate}
        self.vit = _create(name, pretrained, checkpoint_path, options)
        if getattr(self.vit, "attn_pool", None) is not None:
            self.vit.attn_pool = None  # a pooling head would be parameters without gradient
        self.patch_size = patch
        self.embed_dim = self.vit.num_features
        self.upstream_style = upstream_style
        if upstream_style:
            if type(self.vit).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
                raise ValueError(
                    f"upstream_style is for plain and distilled ViTs, not {type(self.vit).__name__}"
                )
            for module in self.vit.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-5
        config = self.vit.pretrained_cfg
        self.mean = tuple(float(v) for v in config.get("mean", (0.5, 0.5, 0.5)))
        self.std = tuple(float(v) for v in config.get("std", (0.5, 0.5, 0.5)))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), H and W multiples of the patch -> patch embeddings (B, N, D), row-major."""
        vit = self.vit
        if self.upstream_style:
            x = self._upstream_embed(vit.patch_embed(images))
            x = vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(x))))
        else:
            x = vit.forward_features(images)
        if isinstance(vit.norm, nn.Identity):
            x = vit.fc_norm(x)  # average-pooled ViTs normalise after pooling; here it is per patch
        return x[:, vit.num_prefix_tokens :]

    def _upstream_embed(self, x: Tensor) -> Tensor:
        """Adds prefix tokens and the position embedding, resized bilinearly: x (B, h, w, D) -> (B, N, D)."""
        vit = self.vit
        prefix = [vit.cls_token, getattr(vit, "dist_token", None), getattr(vit, "reg_token", None)]
        prefix = [t.expand(x.shape[0], -1, -1) for t in prefix if t is not None]
        grid = x.shape[1:3]
        count = 0 if vit.no_embed_class else vit.num_prefix_tokens
        pos = vit.pos_embed
        if tuple(grid) != tuple(vit.patch_embed.grid_size):
            patches = pos[:, count:].mT.unflatten(-1, vit.patch_embed.grid_size)
            patches = F.interpolate(patches, size=tuple(grid), mode="bilinear", align_corners=False)
            pos = torch.cat([pos[:, :count], patches.flatten(2).mT], dim=1)
        x = x.flatten(1, 2)
        if vit.no_embed_class:
            return vit.pos_drop(torch.cat([*prefix, x + pos], dim=1))
        return vit.pos_drop(torch.cat([*prefix, x], dim=1) + pos)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _patch_size(name: str, vit: nn.Module) -> int:
    """Side of what one embedding stands for, in pixels: of a hybrid the stem's stride times the patch."""
    ratio = getattr(getattr(vit, "patch_embed", None), "feat_ratio", None)
    if ratio is None or not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks"):
        raise ValueError(f"backbone {name!r} is not a plain ViT: it has no patch embedding and prefix tokens")
    taken = inspect.signature(type(vit)).parameters.values()
    if not any(p.name == "dynamic_img_size" or p.kind is p.VAR_KEYWORD for p in taken):
        raise ValueError(
            f"backbone {name!r} takes images of one size only: timm's {type(vit).__name__} has no dynamic_img_size"
        )
    height, width = ratio(as_scalar=False)
    if height != width:
        raise ValueError(
            f"backbone {name!r} has patches of {(height, width)}; only square ones are supported"
        )
    return int(height)


def _create(name: str, pretrained: bool, checkpoint_path: str | None, options: dict) -> nn.Module:
    if not pretrained and checkpoint_path is None:
        return timm.create_model(name, **options)
    go_on = (
        "give a local file of these weights (checkpoint_path=FILE / --model.checkpoint_path FILE) or "
        "train from scratch on purpose (pretrained=False / --model.pretrained false)"
    )
    overlay = None
    if checkpoint_path is not None:
        if not Path(checkpoint_path).is_file():
            raise PretrainedWeightsError(f"there is no file {checkpoint_path}: {go_on}")
        overlay = {"file": str(checkpoint_path), "hf_hub_id": None, "url": ""}
    else:
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise PretrainedWeightsError(f"timm has no pretrained weights for {name!r}: {go_on}")
        if reason := _why_no_hub(config):
            raise PretrainedWeightsError(
                f"the pretrained weights of {name!r} are not in the local cache and {reason}: {go_on}"
            )
    try:
        # timm loads what fits and only logs what does not. From one seed, whatever the weights did not bring is
        # equal in a model without them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = timm.create_model(name, **options)
            torch.manual_seed(0)
            vit = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:
        # Every failure of a download or of reading a file means the same to the caller; the cause is chained.
        source = f"from {checkpoint_path}" if checkpoint_path is not None else "from the hub"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error):  # advice that must not be followed
            reason = "not a file of weights: it is damaged, or holds more than tensors and plain values"
        raise PretrainedWeightsError(
            f"could not load pretrained weights of {name!r} {source} ({reason}): {go_on}"
        ) from error
    missing = [
        key
        for (key, a), b in zip(fresh.named_parameters(), vit.parameters())
        if a.ndim >= 2 and torch.equal(a, b)
    ]
    if missing:
        raise PretrainedWeightsError(
            f"the weights of {name!r} lack {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} "
            f"({len(missing)} parameters): {go_on}"
        )
    return vit


# What the HTTP clients of huggingface_hub (httpx, before 1.0 requests) call a connection that did not come about.
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}


def _why_no_hub(config: Any, pauses: tuple[float, ...] = (1.0, 2.0)) -> str | None:
    """Why the weights of timm's ``config`` cannot come from the Hugging Face hub, if nobody answers there.

    timm asks for two files and huggingface_hub makes six attempts for each, three quarters of a minute without a
    network. A hub that answers, however slowly or badly, is left to their retries, and so are weights in the cache.
    """
    if not config.hf_hub_id or config.file or os.environ.get("TIMM_USE_OLD_CACHE", "0") != "0":
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return None
    url = huggingface_hub.hf_hub_url(repository, files[0], revision=revision or None)
    for pause in (*pauses, None):
        try:
            huggingface_hub.get_hf_file_metadata(url)  # one attempt, of HF_HUB_ETAG_TIMEOUT seconds at most
            return None
        except Exception as error:
            if type(error).__name__ not in _NO_CONNECTION:
                return None
            reason = f"{'/'.join(url.split('/')[:3])} cannot be reached ({error})"
        if pause is not None:
            time.sleep(pause)
    return reason
