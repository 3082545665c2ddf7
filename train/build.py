"""The data sets and the model that a configuration describes: shared by training, evaluation, prediction."""

from __future__ import annotations

from pathlib import Path

from depict_kernels.models import PretrainedWeightsError, SegmentationModel, create_model
from train.ade20k import ClassList, SegmentationFolder, load_classes
from train.distributed import World, on_main
from train.errors import UserError, first_line
from train.schema import Config

GENERATED = Path("data/generated")


def data_root(config: Config, world: World) -> Path:
    """``data.root``, or the generated data set, which is made on first use."""
    if config.data.root is not None:
        return Path(config.data.root)
    from train.generated import generate

    made = config.data.generate
    counts = {"train_images": made.train_images, "val_images": made.val_images}
    on_main(world, lambda: generate(GENERATED, made.seed, **counts, size=(made.height, made.width)))
    return GENERATED


def class_list(config: Config, root: Path) -> ClassList:
    """``data.classes``; the generated data set brings its own list."""
    return load_classes(config.data.classes if config.data.root is not None else str(root / "classes.csv"))


def split(config: Config, root: Path, name: str, classes: ClassList) -> SegmentationFolder:
    data = config.data
    cache = Path(data.cache) if data.cache is not None else None
    return SegmentationFolder(root, name, classes, data.reduce_zero_label, cache)


def model(config: Config, num_classes: int, weights: bool = True) -> SegmentationModel:
    """The model on the CPU; with its pretrained backbone unless ``weights`` is False (a checkpoint follows).

    Raises ``UserError`` for a name that is not known, arguments that do not fit, or weights that cannot be had:
    a model that was to be pretrained never starts from scratch silently.
    """
    wanted = config.model
    try:
        return create_model(
            wanted.name,
            num_classes,
            pretrained=wanted.pretrained and weights,
            checkpoint_path=wanted.checkpoint_path if weights else None,
            backend=wanted.backend,
            img_size=wanted.img_size or config.data.crop_size,
            upstream_backbone=wanted.upstream_backbone,
            drop_path_rate=wanted.drop_path_rate,
            backbone=wanted.backbone,
            backbone_kwargs=wanted.backbone_kwargs,
            decoder_kwargs=wanted.decoder_kwargs,
        )
    except PretrainedWeightsError as error:
        raise UserError(f"model.pretrained: {first_line(error)}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        raise UserError(f"model: {first_line(error)}") from None
