# ruff: noqa: RUF009  (`number` makes dataclass fields)
"""The keys of a configuration: name, type, default, range and meaning of each.

The text under a key is what ``python train/run.py keys`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def number(default: Any, **limits: float) -> Any:
    """A field whose numbers (each one, for lists and tuples) keep within ``gt``, ``ge``, ``lt``, ``le``."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class Run:
    """Where the results go."""

    name: str = "demo"
    """Name of the run folder."""
    root: str = "runs"
    """Folder of the run folders."""
    resume: str = "auto"
    """auto: continue the run folder's last.pt if there is one; never; or the path of a checkpoint."""
    overwrite: bool = False
    """Delete an earlier run of this name and start over."""


@dataclass
class Generate:
    """The generated data set, made when data.root is null."""

    seed: int = number(0, ge=0)
    """Seed of the scenes."""
    train_images: int = number(600, ge=1)
    """Images in the training split."""
    val_images: int = number(80, ge=1)
    """Images in the validation split."""
    height: int = number(96, ge=32)
    """Height of an image in pixels."""
    width: int = number(128, ge=32)
    """Width of an image in pixels."""


@dataclass
class Data:
    """The data set, and how a training sample is cut out of it."""

    root: str | None = None
    """Folder with images/ and annotations/ as ADEChallengeData2016 has them; null: the generated data set."""
    classes: str = "ade20k"
    """ade20k, or a file with one class per row: index,name[,r,g,b]."""
    reduce_zero_label: bool = True
    """Annotation 0 is ignored and 1..C become 0..C-1."""
    train_split: str = "training"
    """Sub-folder of images/ and annotations/ to train on."""
    val_split: str = "validation"
    """Sub-folder to evaluate on."""
    crop_size: tuple[int, int] = number((512, 512), ge=1)
    """Height and width of a training crop."""
    base_size: int | None = number(512, ge=1)
    """The shorter side is resized to base_size * r, r uniform in scale; null: the crop's shorter side."""
    scale: tuple[float, float] = number((0.5, 2.0), gt=0)
    """Range of the random scale r."""
    max_class_share: float = number(0.75, gt=0, le=1)
    """A crop with more than this share of one class is drawn again (10 tries)."""
    flip: float = number(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    photometric_distortion: bool = True
    """Random brightness, contrast, saturation and hue."""
    cache: str | None = None
    """Folder of the decoded cache; null: decode the files every time."""
    batch_size: int = number(8, ge=1)
    """Images per micro-step, over all processes together."""
    workers: int | None = number(None, ge=0)
    """Loader processes of each process; 0 loads in the training process; null: one per usable core, at most 8."""
    generate: Generate = field(default_factory=Generate)


@dataclass
class Model:
    """The model; the number of classes comes from data.classes."""

    name: str = "depict_sa_vit_small"
    """One of depict_kernels.models.list_models()."""
    pretrained: bool = True
    """Start from timm's pretrained backbone; stops when it cannot be had."""
    checkpoint_path: str | None = None
    """Backbone weights from a local file instead of a download."""
    initial_checkpoint: str | None = None
    """Run folder or checkpoint of this trainer to start from; with other classes, what has a row per class is new."""
    backend: str = "auto"
    """Backend of the operators: auto, reference, torch, cpp, triton or cuda."""
    drop_path_rate: float = number(0.1, ge=0, lt=1)
    """Stochastic depth of the backbone."""
    img_size: int | None = number(None, ge=1)
    """Image side that the position embedding is built for; null: data.crop_size."""
    upstream_backbone: bool = False
    """LayerNorm eps and position resizing of Segmenter's own ViT, to evaluate upstream's checkpoints."""
    backbone: str | None = None
    """Another timm ViT than the one the model's name stands for."""
    backbone_kwargs: dict = field(default_factory=dict)
    """Passed to timm, e.g. {depth: 4, embed_dim: 128, num_heads: 4}."""
    decoder_kwargs: dict = field(default_factory=dict)
    """Passed to the decoder."""


@dataclass
class Loss:
    """Cross-entropy of the upsampled masks."""

    label_smoothing: float = number(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    class_weights: list[float] | None = number(None, ge=0)
    """One weight per class; null: all equal."""


@dataclass
class Optim:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd or adamw."""
    lr: float = number(1e-3, gt=0)
    """Learning rate after the warm-up."""
    momentum: float = number(0.9, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = number(0.0, ge=0)
    """Not applied to biases, norms, step sizes, position and class embeddings."""
    betas: tuple[float, float] = number((0.9, 0.999), ge=0, lt=1)
    """Betas of adamw."""
    layer_decay: float = number(1.0, gt=0, le=1)
    """Each backbone block learns this much slower than the next one; 1: all equal."""
    clip_grad: float | None = number(None, gt=0)
    """Largest norm of the gradient; null: not clipped."""
    warmup_steps: int = number(0, ge=0)
    """Steps over which the learning rate grows linearly."""
    poly_power: float = number(0.9, ge=0)
    """Power of the polynomial decay."""
    min_lr: float = number(1e-5, ge=0)
    """Learning rate at the end."""


@dataclass
class Train:
    """The training loop."""

    epochs: float | None = number(64.0, gt=0)
    """Length in passes over the training split."""
    steps: int | None = number(None, ge=1)
    """Length in optimiser steps; where given, epochs is not used."""
    accumulate: int = number(1, ge=1)
    """Micro-steps (of data.batch_size images) per optimiser step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype of training, evaluation and prediction; in training fp16 comes with a loss scaler."""
    ema_decay: float | None = number(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated; null: none."""
    compile: bool = False
    """Compile the model and its loss with torch.compile."""
    seed: int = number(0, ge=0, le=10**18)
    """Seed of the weights, the data order and everything random about a sample."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = number(None, ge=1, le=1024)
    """CPU threads of torch; null: torch's own choice."""
    log_every: int = number(20, ge=1)
    """Steps between log lines."""
    eval_every: int | None = number(None, ge=1)
    """Steps between evaluations; null: each epoch."""
    save_every: int = number(500, ge=1)
    """Steps between writes of last.pt (it is also written at each evaluation)."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (CPU training is deterministic anyway)."""
    tensorboard: bool = True
    """Write TensorBoard files where the package is installed."""
    score_untrained: bool = False
    """Evaluate the untrained model first, to print its score beside the trained one's."""


@dataclass
class Eval:
    """Evaluation and prediction; the defaults are the paper's protocol."""

    mode: Literal["slide", "whole"] = "slide"
    """Sliding window, or the whole image at once."""
    window: int | None = number(512, ge=1)
    """Side of the sliding window; null: the crop's shorter side."""
    stride: int | None = number(480, ge=1)
    """Stride of the sliding window; null: 32 less than the window, at least half of it."""
    resize: int | None = number(512, ge=1)
    """Shorter side that an image is resized to first; null: data.base_size."""
    scales: list[float] = number([1.0], gt=0)
    """Scales whose predictions are averaged."""
    flip: bool = False
    """Average with the mirrored image's prediction."""
    multiscale_scales: list[float] = number([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], gt=0)
    """Scales of --multiscale, which flips too."""
    batch_windows: int = number(8, ge=1)
    """Windows that go through the model at once: the cap on memory."""
    strip_rows: int = number(64, ge=1)
    """Rows of the label map that are computed at once."""
    max_images: int | None = number(None, ge=1)
    """Evaluate the first images only; null: all."""


@dataclass
class Config:
    """Everything that a run depends on."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
