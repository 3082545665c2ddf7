"""The command `train`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from train.command_line import Command
from train.errors import UserError
from train.interrupts import termination_as_ctrl_c
from train.run_folder import open_folder, prepare_folder, read_results, report, unlock_folders, write_results


def train_run(arguments: list[str]) -> int:
    try:
        return _train(arguments)
    finally:
        unlock_folders()


def _train(arguments: list[str]) -> int:
    from train import build, distributed
    from train import config as configuration

    files, overrides = configuration.parse_overrides(arguments)
    config = configuration.load_config(files or [configuration.CONFIGS / "demo.yaml"], overrides)
    build.prepare_torch(config)
    world = distributed.start(config.train.device)
    build.check_backend(config, world.device, training=True)
    if config.data.batch_size % world.size:  # said before anything is made, read or deleted
        raise UserError(
            f"data.batch_size is {config.data.batch_size}: need a multiple of the {world.size} processes"
        )
    folder = Path(config.run.root) / config.run.name
    resume = distributed.on_main(world, lambda: prepare_folder(config, folder))

    from train import plots  # noqa: F401  (drawn at the end: a package that is missing shows now)
    from train.engine import Trainer

    trainer = Trainer(config, world, folder, resume)
    del resume

    done = trainer.step >= trainer.total_steps
    finished = distributed.on_main(world, lambda: done and read_results(folder) is not None)
    if not finished:  # config.yaml stays that of the run that was
        distributed.on_main(world, lambda: open_folder(config, folder, trainer.classes, world))
    describe(trainer)
    if finished:
        trainer.log.say(f"{folder} is finished; --run.overwrite true starts over")
        if trainer.scored_otherwise:
            trainer.log.say(f"note        its scores are of other settings ({'; '.join(trainer.scored_otherwise)}): "
                            "give them to `eval` to score it so")  # fmt: skip
    else:
        with termination_as_ctrl_c() if world.size == 1 else contextlib.nullcontext():
            trainer.train()
            finish(trainer)
    if world.main:
        report(folder, read_results(folder))
    return 0


TRAIN = Command(
    "train",
    train_run,
    "Train a model, score it, draw its curves",
    text="The word `train` may be left out; without any argument it is the demo. A run folder that holds a checkpoint "
    "goes on from it. Under torchrun the processes share the work.",
    keys=(
        "run.name", "run.root", "run.overwrite", "data.root", "data.classes", "data.batch_size", "model.name",
        "model.pretrained", "model.checkpoint_path", "model.initial_checkpoint", "optim.lr", "train.epochs",
        "train.steps", "train.precision", "train.device",
    ),
)  # fmt: skip


def describe(trainer: Any) -> None:
    from train.loader import too_many_workers

    config, say = trainer.config, trainer.log.say
    count = sum(p.numel() for p in trainer.model.parameters())
    say(f"run folder  {trainer.folder}")
    say(f"data        {trainer.train_set.root}: {len(trainer.train_set)} training and {len(trainer.val_set)} "
        f"validation images, {trainer.classes.num_classes} classes")  # fmt: skip
    say(f"model       {config.model.name}, {count / 1e6:.2f} M parameters, operators: {config.model.backend}")
    if trainer.step == 0 and (start := config.model.initial_checkpoint):
        anew = f"; anew: {', '.join(trainer.anew)}" if trainer.anew else ""
        say(f"weights     from {start}{anew}")
    say(f"training    {trainer.total_steps} steps, {trainer.total_steps / trainer.steps_per_epoch:.1f} epochs, "
        f"{trainer.world.size} x {trainer.device}, {config.train.precision}")  # fmt: skip
    if note := too_many_workers(config.data.workers):
        say(f"note        {note}")
    if config.optim.warmup_steps >= trainer.total_steps:
        say(f"note        optim.warmup_steps: {config.optim.warmup_steps} of {trainer.total_steps} steps, so that the "
            f"learning rate never reaches optim.lr ({config.optim.lr:g})")  # fmt: skip
    if trainer.step:
        say(f"resumed     at step {trainer.step}")
        if trainer.images_before != (now := len(trainer.train_set)):
            say(f"note        {now} training images, {trainer.images_before} up to the checkpoint: their order is "
                "another one from here on")  # fmt: skip


def finish(trainer: Any) -> None:
    """Scores the best checkpoint and writes results.json and the plots."""
    from train.plots import collect_samples, plot_run

    folder = trainer.folder
    state = trainer.load_best(trainer.model.eval())
    trainer.log.say(f"scoring {folder / 'best.pt'}, of step {state['step']}")
    metrics = trainer.measure(trainer.model)
    if not trainer.world.main:
        return
    extra: dict[str, Any] = {"step": state["step"], "checkpoint": "best"}
    if trainer.untrained_miou is not None:
        extra["untrained_miou"] = trainer.untrained_miou
    baselines = {}
    if trainer.config.data.root is None:
        from train.generated import pixel_baseline

        extra["pixel_baseline_miou"] = pixel_baseline(trainer.train_set.root)
        baselines["per-pixel classifier of colour and position"] = extra["pixel_baseline_miou"]
    write_results(folder / "results.json", metrics, extra)
    with trainer.autocast():
        samples = collect_samples(trainer.model, trainer.val_set, trainer.config.eval)
    plot_run(folder, metrics=metrics, samples=samples, classes=trainer.classes, baselines=baselines)
