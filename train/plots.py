"""The pictures of a run folder: loss and mIoU curves, confusion matrix, predictions beside the ground truth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor, nn

from train.ade20k import ClassList
from train.inference import predict_labels
from train.logs import read_metrics
from train.metrics import SegmentationMetrics
from train.predict import borders, classes_by_area, enlarged, enlargement, grey_tones, overlay, short_name

BLUE, ORANGE, GREEN, GREY, DARK = "#1f5fa8", "#d1641b", "#2c8a4b", "#8a8f98", "#40454d"
_WRONG, _UNLABELLED = (205, 30, 45), (125, 135, 155)


@dataclass
class Sample:
    """One image with its target and predicted labels, for a row of overlays.png."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8
    target: np.ndarray  # (H, W), the ignored label stays uncoloured
    labels: np.ndarray  # (H, W)


def collect_samples(model: nn.Module, dataset, cfg, count: int = 4) -> list[Sample]:
    """Predictions for ``count`` images, spread evenly over ``dataset``: the same ones every time.

    ``model`` should be in eval mode.
    """
    count = min(count, len(dataset))
    samples = []
    for i in range(count):
        index = i * len(dataset) // count
        image, target = dataset.read(index)
        labels = predict_labels(model, image, cfg)
        pixels = image.permute(1, 2, 0).numpy()
        samples.append(Sample(dataset.names[index], pixels, target.numpy(), labels.cpu().numpy()))
    return samples


def plot_run(
    run_dir: str | Path,
    *,
    metrics: SegmentationMetrics | None = None,
    samples: Sequence[Sample] | None = None,
    classes: ClassList | None = None,
    baselines: Mapping[str, float] | None = None,
) -> list[Path]:
    """Writes what there is material for into ``run_dir/plots``; returns the files.

    loss.png and miou.png come from the folder's metrics.jsonl (miou.png with ``baselines``: name -> mIoU),
    confusion.png from ``metrics``, overlays.png from ``samples`` in the colours of ``classes``. One process does it.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_metrics(run_dir / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train" and line.get("loss") is not None]
    evaluations = [line for line in lines if line["kind"] == "eval" and line.get("miou") is not None]
    epoch = train[-1]["step"] / train[-1]["epoch"] if train and train[-1].get("epoch") else None
    written = []
    if train:
        best = _best(evaluations)["step"] if evaluations else None
        count = None if classes is None else classes.num_classes
        written.append(save_figure(loss_figure(train, best, count, epoch), folder / "loss.png"))
    if evaluations:
        written.append(save_figure(score_figure(evaluations, baselines, epoch), folder / "miou.png"))
    if metrics is not None and metrics.confusion.sum() > 0:
        written.append(plot_confusion(metrics, folder / "confusion.png"))
    if samples and classes is not None:
        written.append(save_figure(overlay_figure(samples, classes), folder / "overlays.png"))
    return written


def plot_confusion(metrics: SegmentationMetrics, path: Path) -> Path:
    """Writes the confusion matrix's picture to ``path``, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(confusion_figure(metrics.confusion, metrics.class_names), path)


def save_figure(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)  # pyplot is left alone: no display, no global state
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def new_axes(figure: Figure, *args, **kwargs):
    axes = figure.add_subplot(*args, **kwargs)
    axes.grid(True, color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    return axes


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Centred moving average over ``span`` values, fewer at the ends: it does not lag behind a falling loss."""
    sums, counts = (np.convolve(x, np.ones(span), "same") for x in (values, np.ones(len(values))))
    return sums / counts


def _step_axis(axes: Axes, steps_per_epoch: float | None) -> None:
    axes.set_xlabel("optimiser step" + (f" ({steps_per_epoch:,.4g} per epoch)" if steps_per_epoch else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _best(evaluations: Sequence[dict]) -> dict:
    """The evaluation whose checkpoint is kept as best.pt: the first with the highest mIoU, of a trained model."""
    trained = [line for line in evaluations if line["step"] > 0]
    return max(trained or evaluations, key=lambda line: line["miou"])


def loss_figure(
    lines: Sequence[dict],
    best_step: int | None = None,
    num_classes: int | None = None,
    steps_per_epoch: float | None = None,
) -> Figure:
    """Training loss against the step, with its moving average, and the learning rate below.

    ``best_step`` marks the best checkpoint, ``num_classes`` the loss of equal probabilities for all classes.
    """
    steps = np.array([line["step"] for line in lines])
    loss = np.array([line["loss"] for line in lines], dtype=float)
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
    axes = new_axes(figure, grid[0])
    marker = "o" if len(steps) == 1 else None
    if len(steps) >= 20:
        span = max(5, len(loss) // 15) | 1
        axes.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=1, label="as logged")
        averaged = smoothed(loss, span)
        axes.plot(steps, averaged, color=BLUE, linewidth=2, label=f"average over {span} log lines")
    else:
        axes.plot(steps, loss, color=BLUE, linewidth=2, marker=marker, label="training")
    if num_classes is not None:
        chance = float(np.log(num_classes))
        label = f"equal probabilities: ln {num_classes} = {chance:.2f}"
        axes.axhline(chance, color=GREY, linestyle=(0, (5, 3)), linewidth=1.4, label=label)
    below = new_axes(figure, grid[1], sharex=axes)
    rates = np.array([np.nan if line.get("lr") is None else line["lr"] for line in lines], dtype=float)
    below.plot(steps, rates, color=GREY, linewidth=1.5, marker=marker)
    if best_step is not None:
        for part in (axes, below):
            label = f"best checkpoint: step {best_step:,}"
            part.axvline(best_step, color=ORANGE, linestyle=":", linewidth=1.6, label=label)
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylabel("cross-entropy per pixel (nats)")
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    axes.set_title("Training loss", loc="left", fontweight="bold")
    axes.tick_params(labelbottom=False)
    below.set_ylabel("learning rate")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    below.set_xlim(left=0)
    _step_axis(below, steps_per_epoch)
    figure.align_ylabels()
    return figure


def score_figure(
    lines: Sequence[dict],
    baselines: Mapping[str, float] | None = None,
    steps_per_epoch: float | None = None,
) -> Figure:
    """The three scores of every evaluation against the step; the best checkpoint is marked.

    Horizontal lines show the mIoU of ``baselines``, and of the untrained model where it was evaluated (step 0).
    """
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = new_axes(figure, 1, 1, 1)
    highest = 0.0
    for key, name, colour, width in (
        ("pixel_accuracy", "pixel accuracy", GREEN, 1.4),
        ("mean_accuracy", "mean accuracy", ORANGE, 1.4),
        ("miou", "mIoU", BLUE, 2.4),
    ):
        values = [np.nan if line.get(key) is None else line[key] for line in lines]
        axes.plot(steps, values, color=colour, linewidth=width, marker="o", markersize=width + 2, label=name)
        highest = max(highest, np.nanmax([*values, 0.0]))
    best = _best(lines)
    axes.vlines(best["step"], 0, best["miou"], color=BLUE, linestyle=":", linewidth=1.4)
    label = f"best checkpoint: mIoU {100 * best['miou']:.1f} % at step {best['step']:,}"
    axes.scatter(
        [best["step"]], [best["miou"]], s=120, facecolor="none", edgecolor=BLUE, linewidth=1.6, label=label
    )
    levels = dict(baselines or {})
    if lines[0]["step"] == 0:
        levels = {"untrained model": lines[0]["miou"]} | levels
    for (name, value), dashes in zip(levels.items(), itertools.cycle([(5, 3), (1, 1.5), (8, 2, 1, 2)])):
        label = f"mIoU of the {name}: {100 * value:.1f} %"
        axes.axhline(value, color=DARK, linestyle=(0, dashes), linewidth=1.2, label=label)
        highest = max(highest, value)
    axes.set_title("Validation scores", loc="left", fontweight="bold")
    axes.set_ylabel("score (per cent)")
    axes.set_ylim(0, min(1.0, np.ceil(10 * (1.05 * highest)) / 10) or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    _step_axis(axes, steps_per_epoch)
    figure.legend(frameon=False, ncols=2, loc="outside lower center", fontsize=9)
    return figure


def confusion_figure(confusion: Tensor, names: Sequence[str]) -> Figure:
    """Row-normalised confusion matrix: where the pixels of each class went.

    Args:
        confusion: (C, C) integers, rows = target.
        names: C class names; long ones are cut to their first synonym.

    Colours follow the square root of the share, so that small confusions show. Up to 25 classes every cell
    carries its per cent; the names of more, up to 150, stay readable at full size. Classes that are neither
    annotated nor predicted are left out; rows of those that no annotation holds are grey.
    """
    n = confusion.cpu().double().numpy()
    seen = np.flatnonzero(n.sum(0) + n.sum(1))
    left_out = len(names) - len(seen)
    if len(seen) and left_out:
        n, names = n[np.ix_(seen, seen)], [names[i] for i in seen]
    rows = n.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        share = n / rows
    count = len(names)
    few = count <= 25
    cell = 0.62 if few else 0.155
    side = max(count * cell, 4.4)
    heading = min(max(1.2 * side, 10), 18)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    colours = colormaps["Blues"].with_extremes(bad="#e9e9e9")
    shown = axes.imshow(
        np.ma.masked_invalid(share), cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest"
    )
    labels = [short_name(name, 20) for name in names]
    size = 9 if few else 7
    axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(count), labels, fontsize=size)
    axes.set_xlabel("predicted class", fontsize=heading)
    axes.set_ylabel("annotated class", fontsize=heading)
    axes.set_title(
        "Confusion matrix: per cent of each annotated class's pixels"
        + (f"\n(classes that occur nowhere, and are left out: {left_out})" if len(seen) and left_out else ""),
        fontweight="bold",
        fontsize=heading,
    )
    for side_name in axes.spines:
        axes.spines[side_name].set_color(GREY)
    if few:
        for i, j in zip(*np.nonzero(np.nan_to_num(share) >= 0.005)):
            colour = "white" if share[i, j] > 0.3 else "#333333"
            axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    else:
        axes.set_xticks(np.arange(count) - 0.5, minor=True)
        axes.set_yticks(np.arange(count) - 0.5, minor=True)
        axes.grid(which="minor", color="#eef0f3", linewidth=0.3)
        axes.tick_params(which="minor", length=0)
    width = min(0.025 * side, 0.3)
    beside = axes.inset_axes((1 + 0.6 * width / side, 0, width / side, 1))  # exactly as high as the matrix
    bar = figure.colorbar(shown, cax=beside)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.ax.tick_params(labelsize=0.75 * heading if heading > 12 else None)
    bar.set_label("share of the annotated class (square-root scale)", fontsize=0.75 * heading)
    bar.outline.set_edgecolor(GREY)
    _enlarge_around(figure, axes, side)
    return figure


def _enlarge_around(figure: Figure, axes: Axes, side: float, margin: float = 0.1) -> None:
    """Keeps ``axes`` ``side`` inches wide and high, and makes the figure as large as what is written around them.

    Constrained layout goes wrong here: it takes the room that a square matrix leaves beside it for the labels'.
    """
    around = axes.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).padded(margin * figure.dpi)
    left, bottom, width, height = (value / figure.dpi for value in around.bounds)
    figure.set_size_inches(width, height)
    axes.set_position((-left / width, -bottom / height, side / width, side / height))


def error_map(image: np.ndarray, target: np.ndarray, labels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where ``labels`` differ from ``target``, over the faded image: (H, W, 3) uint8. Unlabelled pixels are grey."""
    faded = 255 - 0.45 * (255 - grey_tones(image)).repeat(3, -1)
    wrong = known & (labels.astype(np.int64) != target)
    for where, colour, share in ((wrong, _WRONG, 0.8), (~known, _UNLABELLED, 0.75)):
        faded = np.where(where[..., None], share * np.float32(colour) + (1 - share) * faded, faded)
    outline = borders(np.where(known, target, -1))[..., None]
    return np.where(outline, 0.6 * faded, faded).round().astype(np.uint8)


def overlay_figure(samples: Sequence[Sample], classes: ClassList, max_entries: int = 24) -> Figure:
    """A row per sample: image, ground truth, prediction, and where they differ; below, the classes present, largest
    area first."""
    width, dpi = 3.1, 130
    # a thin picture, drawn small, shall not make the figure endless
    heights = [width * min(sample.image.shape[0] / sample.image.shape[1], 4) for sample in samples]
    everything = np.concatenate([x.astype(np.int64).ravel() for s in samples for x in (s.target, s.labels)])
    present = classes_by_area(everything, classes.num_classes)
    patch = lambda colour, label: Patch(facecolor=np.divide(colour, 255), edgecolor=GREY, label=label)
    entries = [patch(classes.palette[c], short_name(classes.names[c])) for c, _ in present[:max_entries]]
    if len(present) > max_entries:
        entries.append(Patch(alpha=0, label=f"and {len(present) - max_entries} more"))
    entries += [patch(_WRONG, "wrong"), patch(_UNLABELLED, "unlabelled")]
    columns = 8
    legend_height = 0.1 + 0.22 * -(-len(entries) // columns)
    total = sum(heights) + 0.26 * len(samples) + legend_height
    figure = Figure(figsize=(4 * width + 0.4, total), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    grid = figure.add_gridspec(len(samples) + 1, 4, height_ratios=[*heights, legend_height])
    for row, sample in enumerate(samples):
        shape = sample.image.shape[:2]
        factor = enlargement(round(width * dpi / shape[1]), shape)  # so that borders are thin lines
        image, target, labels = enlarged(factor, sample.image, sample.target, sample.labels)
        target = target.astype(np.int64)
        known = (target >= 0) & (target < classes.num_classes)
        wrong = (known & (labels != target)).sum() / max(1, known.sum())
        pictures = [
            (sample.name, image),
            ("ground truth", overlay(image, target, classes.palette, 0.7)),
            ("prediction", overlay(image, labels, classes.palette, 0.7)),
            (f"wrong: {100 * wrong:.1f} % of the labelled pixels", error_map(image, target, labels, known)),
        ]
        for column, (title, picture) in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="antialiased")
            axes.set_title(title, fontsize=9, loc="left", pad=3)
            axes.set_axis_off()
    below = figure.add_subplot(grid[len(samples), :])
    below.set_axis_off()
    below.legend(handles=entries, ncols=columns, loc="upper center", frameon=False, fontsize=9)
    return figure
