"""Models that the training pipeline saved: read whole, or as the start of another one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from depict_kernels.models.factory import create_model
from depict_kernels.models.segmentation import SegmentationModel

FORMAT = "depict_kernels checkpoint 1"  # another number where files lack what a reader needs
_POSITIONS = "backbone.vit.pos_embed"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of the training pipeline, in CPU memory. Nothing in it is executed (``weights_only``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, damaged (torch reads past a wrong checksum) or no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        last = path.with_name("last.pt")
        beside = f"; {last} is there" if path.name == "best.pt" and last.exists() else " or run folder"
        raise FileNotFoundError(f"{path}: no such checkpoint{beside}")
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a readable checkpoint: it is damaged, or holds more than tensors and plain values"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch.load reads an arbitrary file as one of several formats
        # Of the others' texts (of a text file it is its first letter's number) nobody would learn anything.
        told = isinstance(error, (OSError, RuntimeError)) and str(error).strip()
        reason = told.splitlines()[0] if told else "it is damaged, or no file that torch.save wrote"
        raise ValueError(f"{path}: not a readable checkpoint: {reason}") from None
    if damaged:
        raise ValueError(f"{path}: is damaged: the checksum of its part {damaged} is wrong")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a checkpoint of this version of the trainer ('format' is not {FORMAT!r})"
        )
    if missing := [key for key in ("model", "config", "classes", "step") if key not in state]:
        raise ValueError(f"{path}: is damaged: it lacks {', '.join(missing)}")
    return state


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint's run evaluates: the moving average of the weights where it keeps one."""
    return state.get("ema") or state["model"]


def load_model(path: str | Path, *, backend: str = "auto") -> SegmentationModel:
    """The trained model of a run folder (its ``best.pt``) or of a checkpoint file, on the CPU, in eval mode.

    ``model.mean`` and ``model.std`` normalise its images. Class names are in the run folder's ``classes.csv``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the file is damaged or no checkpoint of this version's training pipeline.
    """
    path = _file(path)
    state = read_checkpoint(path)
    model = described_model(state["config"], len(state["classes"]), backend=backend)
    try:
        model.load_state_dict(weights_of(state))
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its configuration: {error}") from None
    return model.eval()


def described_model(config: Mapping[str, Any], num_classes: int, **options: Any) -> SegmentationModel:
    """The model of a run's configuration; ``options`` are :func:`create_model`'s others (backend and weights)."""
    made = config["model"]
    keys = ("drop_path_rate", "upstream_backbone", "backbone", "backbone_kwargs", "decoder_kwargs")
    size = made["img_size"] or config["data"]["crop_size"]
    return create_model(
        made["name"], num_classes, img_size=size, **{key: made[key] for key in keys}, **options
    )


def start_from(model: SegmentationModel, path: str | Path) -> list[str]:
    """Takes over the weights of a run folder's best model, or of a checkpoint file, to train on from.

    Where the number of classes differs, the tensors with a row per class (class embeddings and the LayerNorm over
    classes, or the linear decoder's head) stay as they are in ``model``; position embeddings for another image size are
    resized.

    Returns:
        The names of the tensors that stayed as they were.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or of another backbone or decoder: the first tensors that do not fit are named, and
            nothing is loaded.
    """
    path = _file(path)
    state = read_checkpoint(path)
    weights, config = dict(weights_of(state)), state["config"]
    own, kept = model.state_dict(), []
    if len(state["classes"]) != model.num_classes:
        kept = [f"decoder.{name}" for name in model.decoder.class_parameters]
        weights |= {name: own[name] for name in kept if name in weights}
    if _POSITIONS in weights and _POSITIONS in own:
        weights[_POSITIONS] = _resized(weights[_POSITIONS], model, config)
    if wrong := misfits(weights, own):
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise ValueError(
            f"{path}: checkpoint of another model (its {config['model']['name']} has other sizes or parts): "
            f"{'; '.join(wrong[:2])}{more}"
        )
    model.load_state_dict(weights)
    return kept


def misfits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``weights`` from being loaded into a model whose state dict is ``own``, a tensor each."""
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)}, this model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in weights]
    return wrong + [f"{name} is not part of this model" for name in weights if name not in own]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / "best.pt" if path.is_dir() else path


def _resized(positions: Tensor, model: SegmentationModel, config: Mapping[str, Any]) -> Tensor:
    """positions (1, prefix + h * w, D) for the model's own grid; as they are where patch or width differ."""
    vit, patch = model.backbone.vit, model.patch_size
    size = config["model"]["img_size"] or config["data"]["crop_size"]
    height, width = (size, size) if isinstance(size, int) else size
    grid = [-(-height // patch), -(-width // patch)]
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    if positions.shape[1:] != (prefix + grid[0] * grid[1], vit.pos_embed.shape[2]):
        return positions
    return resample_abs_pos_embed(positions, list(vit.patch_embed.grid_size), grid, prefix)
