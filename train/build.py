"""The data sets and the model that a configuration describes: shared by training, evaluation, prediction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from depict_kernels import backends
from depict_kernels.models import PretrainedWeightsError, SegmentationModel, start_from
from depict_kernels.models.checkpoints import described_model, read_checkpoint
from train.ade20k import BUILT_IN_CLASSES, ClassList, SegmentationFolder, load_classes
from train.config import to_dict
from train.distributed import World, on_main
from train.errors import UserError, first_line
from train.schema import Config, Generate

GENERATED = Path("data/generated")

# Operators that a decoder runs with model.backend, by the first words of the model's name.
_OPERATORS = {
    "depict_sa": ("subspace_self_attention", "mask_logits"),
    "depict_ca": ("subspace_self_attention", "subspace_cross_attention", "mask_logits"),
    "segmenter_mask": ("mask_logits",),
    "segmenter_linear": (),
}


def prepare_torch(config: Config) -> None:
    """Threads and determinism, as the configuration has them."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def autocast_dtype(config: Config) -> torch.dtype | None:
    """``train.precision`` as autocast's dtype, in training, evaluation and prediction; None for fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]


def check_backend(config: Config, device: torch.device, *, training: bool) -> None:
    """Refuses ``model.backend`` on this device before data is made or read, in the words of the first call.

    Raises ``UserError`` for a name that is not known, :class:`BackendUnavailable` for one that cannot run the model's
    operators (and, in training, its loss) here.
    """
    wanted = config.model
    try:
        backends.check_name(wanted.backend)
    except ValueError as error:
        raise UserError(f"model.backend: {error}") from None
    decoder = wanted.name.partition("_vit_")[0]
    dtype = autocast_dtype(config) or torch.float32
    backends.require(wanted.backend, _OPERATORS.get(decoder, ()), device, dtype)
    if training:
        backends.require(wanted.backend, ["upsample_cross_entropy"], device, torch.float32)


def data_root(config: Config, world: World) -> Path:
    """``data.root``, or the generated data set, which is made on first use."""
    if config.data.root is not None:
        return Path(config.data.root)
    from train.generated import generate

    made = config.data.generate
    counts = {"train_images": made.train_images, "val_images": made.val_images}
    root = generated_folder(made)
    on_main(world, lambda: generate(root, made.seed, **counts, size=(made.height, made.width)))
    return root


def generated_folder(made: Generate) -> Path:
    """Other settings than the defaults have a folder each: making one data set takes none from a run on another."""
    if made == Generate():
        return GENERATED
    settings = json.dumps(dataclasses.asdict(made), sort_keys=True)
    return GENERATED.with_name(f"{GENERATED.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}")


def class_list(config: Config, root: Path) -> ClassList:
    """``data.classes``; the generated data set brings its own list.

    Warns where the data set holds a list and the built-in one is taken, which it is unless another is named.
    """
    own, named = root / "classes.csv", config.data.classes
    if config.data.root is None:
        return load_classes(str(own))
    if named in BUILT_IN_CLASSES and own.is_file():
        word = f"warning: {own} is not used: data.classes is {named}; --data.classes {own} takes it"
        print(word, file=sys.stderr, flush=True)
    return load_classes(named)


def split(config: Config, root: Path, name: str, classes: ClassList) -> SegmentationFolder:
    return SegmentationFolder(root, name, classes, config.data.reduce_zero_label, config.data.cache)


def model(config: Config, num_classes: int, weights: bool = True) -> SegmentationModel:
    """The model on the CPU; with its pretrained backbone unless ``weights`` is False or a checkpoint follows.

    Raises ``UserError`` for a name that is not known, arguments that do not fit, or weights that cannot be had:
    a model that was to be pretrained never starts from scratch silently.
    """
    wanted = config.model
    if wanted.initial_checkpoint is not None and wanted.checkpoint_path is not None:
        raise UserError(
            "model.checkpoint_path and model.initial_checkpoint both say where the weights come from; give one of them"
        )
    backbone_weights = weights and wanted.initial_checkpoint is None
    try:
        return described_model(
            to_dict(config),
            num_classes,
            pretrained=wanted.pretrained and backbone_weights,
            checkpoint_path=wanted.checkpoint_path if backbone_weights else None,
            backend=wanted.backend,
        )
    except PretrainedWeightsError as error:
        if wanted.checkpoint_path is not None and _is_checkpoint(wanted.checkpoint_path):
            raise UserError(
                f"model.checkpoint_path: {wanted.checkpoint_path} is a checkpoint of a whole model; "
                "--model.initial_checkpoint takes it"
            ) from None
        key = "pretrained" if wanted.checkpoint_path is None else "checkpoint_path"
        raise UserError(f"model.{key}: {first_line(error)}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        # Not the library's own words for a wrong value, so they may lack what was wrong.
        given = {f"model.{key}": getattr(wanted, key) for key in ("backbone_kwargs", "decoder_kwargs")}
        given = " and ".join(f"{key} {value}" for key, value in given.items() if value)
        raise UserError(f"model: {first_line(error)}{given and f' (with {given})'}") from None
    except ValueError as error:
        raise UserError(f"model: {first_line(error)}") from None


def start_weights(model: SegmentationModel, config: Config) -> list[str]:
    """Loads ``model.initial_checkpoint`` where it is given; what starts anew all the same, by name."""
    path = config.model.initial_checkpoint
    if path is None:
        return []
    try:
        return start_from(model, path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"model.initial_checkpoint: {error}") from None


def _is_checkpoint(path: str) -> bool:
    try:
        return bool(read_checkpoint(path))
    except (FileNotFoundError, ValueError):
        return False
