"""The commands that work with a trained model: `eval` and `predict`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from train.command_line import CONFIG, Command, Option
from train.errors import UserError
from train.run_folder import SCORES, check_writable, write_results


def one_run(command: Command, words: list[str]) -> Path:
    if len(words) != 1:
        raise UserError(f"takes one run, got {' '.join(words) or 'none'}; usage: {command.usage}")
    return Path(words[0])


def which_checkpoint(folder: Path, own: dict[str, Any]) -> str:
    """best, last, or another file's path."""
    which = own.get("checkpoint", "best")
    for name in ("best", "last"):  # however they are called, they are the run's own
        if Path(which).resolve() == (folder / f"{name}.pt").resolve():
            return name
    return which


def open_run(folder: Path, rest: list[str], which: str) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    """The run folder's configuration, class list, model with weights, checkpoint, and the world."""
    from depict_kernels.models.checkpoints import weights_of
    from train import build, checkpoint, distributed
    from train import config as configuration
    from train.ade20k import load_classes

    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder}: no run folder (it has no config.yaml); "
            + (
                f"try {folder.parent}"
                if (folder.parent / "config.yaml").exists()
                else "training writes one, e.g. runs/demo"
            )
        )
    files, overrides = configuration.parse_overrides(rest)
    config = configuration.load_config([folder / "config.yaml", *files], overrides)
    if "train.device" not in overrides:  # where it was trained says nothing about where it is evaluated
        config.train.device = "auto"
    build.prepare_torch(config)
    world = distributed.start(config.train.device)
    build.check_backend(config, world.device, training=False)
    classes = load_classes(str(folder / "classes.csv"))
    if "data.classes" in overrides:
        given = load_classes(config.data.classes)
        if given.num_classes != classes.num_classes:
            raise UserError(
                f"data.classes: {config.data.classes} has {given.num_classes} classes, the model of {folder} has "
                f"{classes.num_classes}"
            )
        classes = given
    model = build.model(config, classes.num_classes, weights=False)
    path = folder / f"{which}.pt" if which in ("best", "last") else Path(which)
    state = checkpoint.load(path)
    checkpoint.load_weights(model, weights_of(state), path, state["config"], config)
    model.to(world.device).eval()
    return config, classes, model, state, world


def scored(which: str, multiscale: bool) -> str:
    """What the names of an evaluation's files say of it; the best checkpoint's multi-scale one names no checkpoint."""
    stem = f"_{Path(which).stem}"
    if multiscale:
        return "_multiscale" if which == "best" else f"_multiscale{stem}"
    return stem


def scored_on(config: Any, dataset: Any, multiscale: bool = False) -> dict[str, Any]:
    """What the scores of a checkpoint depend on: data, keys, and the number of images."""
    from train.config import scoring

    of = {"data": str(dataset.root.resolve()), **scoring(config, multiscale)}
    of["images"] = min(len(dataset), of.pop("eval.max_images") or len(dataset))
    return of


def check_output(output: Path, of: dict[str, Any] | None = None, holds: str = "iou_per_class") -> None:
    """Raises UserError where a command could not write there, or would overwrite anything but its own results.

    Those have the entry ``holds``. With ``of``, entries such as their checkpoint or data, also where it would overwrite
    results of others.
    """
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file, e.g. {output / 'results.json'}")
    if of is None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if output.parent.is_dir():
        check_writable(output.parent, "--output")
    if not output.exists():
        return
    results = None
    with contextlib.suppress(OSError, ValueError):
        if output.is_file():  # a device may have no end
            results = json.loads(output.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or holds not in results:
        raise UserError(
            f"{output}: exists and holds no results of this command; name another file with --output"
        )
    wanted = {key: value for key, value in (of or {}).items() if results.get(key) != value}
    # What results lack follows from what they hold: without windows eval.mode is whole. It is told where it is all.
    others = [f"{key} {results[key]}, not {value}" for key, value in wanted.items() if key in results]
    if others := others or [f"an unknown {key}, not {value}" for key, value in wanted.items()]:
        raise UserError(
            f"{output}: holds the results of {'; '.join(others)}; name another file with --output"
        )


def check_picture(picture: Path) -> None:
    """Raises UserError where a command could not write the picture that goes with its results."""
    if picture.is_dir():
        raise UserError(
            f"{picture}: is a folder, and a picture goes there; move it, or give another --output"
        )
    check_writable(picture.parent, "--output")


def evaluate_run(arguments: list[str]) -> int:
    words, own, rest = EVAL.split(arguments)
    folder = one_run(EVAL, words)
    which = which_checkpoint(folder, own)
    multiscale = own.get("multiscale", False)
    output = Path(own.get("output", folder / f"results{scored(which, multiscale)}.json"))
    check_output(output, None if "output" in own else {"checkpoint": which})  # before the model is built
    config, classes, model, state, world = open_run(folder, rest, which)
    picture = output.with_name(f"{output.stem}_confusion.png")
    if "output" not in own:
        picture = folder / "plots" / f"confusion{scored(which, multiscale)}.png"
    check_picture(picture)
    from train import build
    from train.inference import Comparison, evaluate, print_progress
    from train.metrics import iou_lines
    from train.plots import plot_confusion

    root = build.data_root(config, world)
    dataset = build.split(config, root, config.data.val_split, classes)
    of = scored_on(config, dataset, multiscale)
    if "output" not in own:
        check_output(output, of)
    dataset.require_labels(config.eval.max_images)
    comparison = Comparison() if own.get("compare-stock") else None
    metrics = evaluate(
        model,
        dataset,
        config.eval,
        multiscale=multiscale,
        world=world,
        amp_dtype=build.autocast_dtype(config),
        progress=print_progress() if world.main else None,
        comparison=comparison,
    )
    if world.main:
        results = metrics.results()
        print(f"{folder}, {which} checkpoint (step {state['step']}), {of['images']} images of {dataset.root}"
              + (", multi-scale with flip" if multiscale else ""))  # fmt: skip
        for key, title in SCORES.items():
            print(f"  {title:<16}{results[key]:.4f}")
        print(*iou_lines(results), sep="\n")
        if comparison is not None:
            print(f"  {comparison}")
        of = {"step": state["step"], "checkpoint": which, "multiscale": multiscale, **of}
        write_results(output, metrics, {**of, "confusion": metrics.confusion.tolist()})
        plot_confusion(metrics, picture)
        print(f"written to {output} and {picture}")
    return 0


def predict_run(arguments: list[str]) -> int:
    words, own, rest = PREDICT.split(arguments)
    if len(words) < 2:
        raise UserError(f"takes a run and images, got {' '.join(words) or 'none'}; usage: {PREDICT.usage}")
    folder = Path(words[0])
    config, classes, model, _, world = open_run(folder, rest, own.get("checkpoint", "best"))
    from train import build, distributed
    from train.inference import print_progress
    from train.predict import predict_folder

    output = Path(own.get("output", folder / "predictions"))
    report = predict_folder(
        model,
        [Path(word) for word in words[1:]],
        classes,
        config.eval,
        output,
        multiscale=own.get("multiscale", False),
        reduce_zero_label=config.data.reduce_zero_label,
        amp_dtype=build.autocast_dtype(config),
        world=world,
        progress=print_progress("predicting"),
    )
    by = f" by process {world.rank} of {world.size}" if world.size > 1 else ""
    print(f"{len(report.written)} files written to {output}{by}", flush=True)
    # Where one process ends with an error torchrun stops the others, so all of them are waited for.
    return max(distributed.gather(world, report.exit_status))


CHECKPOINT = Option(
    "checkpoint", "best (the default) or last of the run's checkpoints, or any file.", "best|last|FILE"
)
KEYS = ("data.root", "train.device", "train.precision", "model.backend", "eval.batch_windows")

EVAL = Command(
    "eval",
    evaluate_run,
    "Score a run folder's model on its validation split",
    words="RUN",
    text="RUN is a folder that training wrote, e.g. runs/demo; its config.yaml gives the keys. Writes "
    "RUN/results_<checkpoint>.json, with --multiscale results_multiscale.json "
    "(results_multiscale_<checkpoint>.json where that is not best), and the confusion matrix of the same ending "
    "in RUN/plots; the run's other plots stay as training left them. Under torchrun the processes share the work.",
    options=(
        Option("multiscale", "Average over eval.multiscale_scales and flips: the paper's second number."),
        Option("compare-stock", "Also count the pixels that stock torch labels otherwise."),
        CHECKPOINT,
        Option(
            "output",
            "Write the results there, and FILE_confusion.png beside it, instead of into RUN.",
            "FILE",
        ),
        CONFIG,
    ),
    keys=(*KEYS[:1], "data.val_split", *KEYS[1:], "eval.max_images"),
)

PREDICT = Command(
    "predict",
    predict_run,
    "Label any images with a run folder's model",
    words="RUN PATH ...",
    text="Each PATH is an image or a folder of images. Writes <name>.png, coded as the run's annotations are, and "
    "<name>_overlay.png to look at.",
    options=(
        Option("output", "Folder of the label maps, by default RUN/predictions.", "DIR"),
        Option("multiscale", "Average over eval.multiscale_scales and flips."),
        CHECKPOINT,
        CONFIG,
    ),
    keys=KEYS[1:],
)
