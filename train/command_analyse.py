"""The command `analyse`: what a run's decoder does to its embeddings, and how robust it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from train.command_eval import (
    CHECKPOINT,
    KEYS,
    check_output,
    check_picture,
    one_run,
    open_run,
    scored,
    scored_on,
    which_checkpoint,
)
from train.command_line import CONFIG, Command, Option
from train.errors import UserError

SIGMAS = (0.001, 0.01, 0.02, 0.04)  # the paper's


def analyse_run(arguments: list[str]) -> int:
    words, own, rest = ANALYSE.split(arguments)
    folder = one_run(ANALYSE, words)
    which = which_checkpoint(folder, own)
    sigmas = _sigmas(own.get("sigmas"))
    repeats, count = (_count(own, name, default) for name, default in (("repeats", 3), ("images", 16)))
    config, classes, model, state, world = open_run(folder, rest, which)
    ending = "" if which == "best" else scored(which, False)
    output = Path(own.get("output", folder / f"analysis{ending}.json"))
    picture = output.with_name(f"{output.stem}_analysis.png")
    if "output" not in own:
        picture = folder / "plots" / f"analysis{ending}.png"
    check_picture(picture)

    from train import analysis, build
    from train.analysis_plot import analysis_figure
    from train.inference import evaluate, print_progress
    from train.plots import save_figure

    dataset = build.split(config, build.data_root(config, world), config.data.val_split, classes)
    of = {"checkpoint": which, **scored_on(config, dataset)}
    check_output(output, None if "output" in own else of, holds="embeddings")
    dataset.require_labels(config.eval.max_images)
    amp_dtype = build.autocast_dtype(config)

    def score(label: str = "evaluating with noise") -> float:
        return evaluate(
            model,
            dataset,
            config.eval,
            world=world,
            amp_dtype=amp_dtype,
            progress=print_progress(label) if world.main else None,
        ).results()["miou"]

    report: dict[str, Any] = {
        "step": state["step"],
        **of,
        "embedded_images": min(count, len(dataset)),
        "width": model.decoder.embed_dim,
    }
    try:
        report |= analysis.measure(model, dataset, config.eval, count, amp_dtype=amp_dtype)
    except ValueError as error:
        raise UserError(f"{folder}: {config.model.name}: {error}") from None
    report["miou"] = score("evaluating")
    report["noise"] = analysis.noise_scores(model, sigmas, repeats, score)
    if world.main:
        title = (
            f"{folder}, {which} checkpoint (step {state['step']}): embeddings of {report['embedded_images']} images, "
            f"scores of {report['images']}"
        )
        print(f"{title}, of {dataset.root}", *analysis.lines(report), sep="\n")
        output.write_text(json.dumps(report, indent=1) + "\n")
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_figure(analysis_figure(report, classes.names, title), picture)
        print(f"written to {output} and {picture}")
    return 0


def _sigmas(text: str | None) -> list[float]:
    if text is None:
        return list(SIGMAS)
    try:
        sigmas = list(dict.fromkeys(float(part) for part in text.strip("[]").split(",") if part.strip()))
        if not all(0 <= sigma < math.inf for sigma in sigmas):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--sigmas {text}: expected standard deviations as 0.001,0.01, none negative"
        ) from None
    return sigmas


def _count(own: dict[str, Any], name: str, default: int) -> int:
    value = own.get(name, default)
    try:
        if int(value) >= 1:
            return int(value)
    except ValueError:
        pass
    raise UserError(f"--{name} {value}: expected a whole number, at least 1")


ANALYSE = Command(
    "analyse",
    analyse_run,
    "Look into a run folder's decoder: coding rates, principal components, orthogonality, robustness to noise",
    words="RUN",
    text="Of some images of the validation split: the coding rate and the principal components of the image embeddings "
    "layer by layer, and whether the class embeddings are orthogonal and span the principal subspace, as DEPICT's "
    "derivation wants them; then mIoU with Gaussian noise on the decoder's parameters, an evaluation for each sigma "
    "and repeat. Writes RUN/analysis.json and RUN/plots/analysis.png (analysis_<checkpoint> where that is not best).",
    options=(
        Option("sigmas", "Standard deviations of the noise, by default 0.001,0.01,0.02,0.04.", "S,S,..."),
        Option("repeats", "Draws of the noise for each, by default 3.", "N"),
        Option("images", "Images whose embeddings are measured, by default 16.", "N"),
        CHECKPOINT,
        Option("output", "Write there, and FILE_analysis.png beside it, instead of into RUN.", "FILE"),
        CONFIG,
    ),
    keys=(*KEYS[:1], "data.val_split", *KEYS[1:], "eval.max_images"),
)
