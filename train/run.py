"""Trains, evaluates and predicts.

    python train/run.py [--config FILE] [--section.key VALUE ...]      train (without arguments: the demo)
    python train/run.py eval RUN [--multiscale] [--compare-stock]      score a run folder's model
    python train/run.py predict RUN PATH ... [--output DIR]            label maps and overlays of any images
    python train/run.py check-data | generate-data | download-data | cache-data [--section.key VALUE ...]

RUN is a run folder such as runs/demo; --checkpoint takes best (the default), last, or a file. All take
--section.key VALUE, for example --data.root for data that moved. Under torchrun, training and eval share the work.
eval and predict compute in the run's train.precision. eval writes RUN/results_<checkpoint>.json, with --multiscale
results_multiscale.json (results_multiscale_<checkpoint>.json where that is not best), and the confusion matrix of the
same ending in RUN/plots/, or --output FILE and FILE_confusion.png; the run's other plots stay as training left them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file runs without installing `train`
# Read when torch is first imported. OpenMP's threads otherwise spin while one of them waits for a core, which makes a
# run several times slower on a machine that does anything else besides.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from depict_kernels.backends import BackendUnavailable
from train.errors import UserError, first_line, missing_extra, user_message

# Keys that change what is reported or where it goes, not what is trained.
FREE_ON_RESUME = (
    "run.", "data.root", "data.cache", "data.workers", "data.val_split", "eval.", "train.device", "train.threads",
    "train.log_every", "train.eval_every", "train.save_every", "train.tensorboard", "train.compile",
    "train.score_untrained", "train.deterministic", "model.backend",
    "model.pretrained", "model.checkpoint_path",
)  # fmt: skip
SCORES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status. Bad input is one line on stderr and status 2."""
    commands = {
        "eval": evaluate_run, "predict": predict_run, "check-data": check_data, "generate-data": generate_data,
        "download-data": download_data, "cache-data": cache_data, "train": train_run,
    }  # fmt: skip
    name, rest = (
        (arguments[0], arguments[1:]) if arguments and arguments[0] in commands else ("train", arguments)
    )
    from train import distributed

    try:
        if any(word in ("-h", "--help") for word in rest) or arguments[:1] == ["help"]:
            return show_help()
        if rest and name == "train" and not rest[0].startswith("-"):
            raise UserError(f"unknown command {rest[0]!r}; commands are {', '.join(commands)}")
        status = commands[name](rest)
        distributed.stop()
        return status
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr, flush=True)
        return 2
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    except BackendUnavailable as error:
        print(f"error: model.backend: {first_line(error)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno is None:  # not the operating system's word about a file
            raise
        print(f"error: {first_line(error)}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not distributed.lost_a_process(error):
            raise
        rank = os.environ.get("RANK", 0)
        print(f"error: process {rank} lost another one: see that one's error", file=sys.stderr, flush=True)
        return 3


def show_help() -> int:
    from train.config import help_text

    print(__doc__.strip())
    print("\nKeys of a configuration file and of the command line:")
    print(help_text())
    return 0


# ---------------------------------------------------------------------------------------------- training


def train_run(arguments: list[str]) -> int:
    from train import build, distributed
    from train import config as configuration

    files, overrides = configuration.parse_overrides(arguments)
    config = configuration.load_config(files or [configuration.CONFIGS / "demo.yaml"], overrides)
    prepare_torch(config)
    world = distributed.start(config.train.device)
    build.check_backend(config, world.device, training=True)
    folder = Path(config.run.root) / config.run.name
    resume = distributed.on_main(world, lambda: prepare_folder(config, folder))

    from train import plots  # noqa: F401  (drawn at the end: a package that is missing shows now)
    from train.engine import Trainer

    trainer = Trainer(config, world, folder, resume)
    del resume

    def open_folder() -> None:  # not before, so that a start that fails leaves no empty folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
        if config.run.overwrite:  # not before the data and the model were found to be good
            for path in folder.iterdir():  # the folder itself may be a link
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_run_folder(config, folder, trainer.classes, world)

    distributed.on_main(world, open_folder)
    describe(trainer)
    if trainer.step >= trainer.total_steps and (folder / "results.json").exists():
        trainer.log.say(f"{folder} is finished; --run.overwrite true starts over")
    else:
        trainer.train()
        finish(trainer)
    if world.main:
        report(folder)
    return 0


def prepare_torch(config: Any) -> None:
    import torch

    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def prepare_folder(config: Any, folder: Path) -> dict[str, Any] | None:
    """Decides whether this run is new or goes on; the checkpoint's state in the latter case.

    ``--run.resume PATH`` of another folder starts this one from there; once it has a checkpoint of its own, the same
    command goes on from that. Nothing is deleted yet. Raises ``UserError`` rather than mix two runs in one folder.
    """
    from train import checkpoint
    from train.config import to_dict
    from train.run_folder import check_writable

    check_writable(folder, "--run.root")
    resume, last = config.run.resume, folder / "last.pt"
    over = config.run.overwrite
    if over and folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: no run folder (it has no config.yaml), so run.overwrite leaves it alone")
    checkpoint.remove_leftovers(folder)
    path = Path(resume)
    path = path / "last.pt" if path.is_dir() else path
    named = resume not in ("auto", "never")
    own = named and path.resolve().parent == folder.resolve()
    if resume == "never":
        if last.exists() and not over:
            raise UserError(
                f"{folder}: holds a run; give another --run.name, or --run.overwrite true to start over"
            )
        return None
    if resume == "auto" and (over or not last.exists()):
        return None
    if not over and last.exists() and not own:
        state = checkpoint.load(last)
        changed = [
            text
            for text in checkpoint.differences(state["config"], to_dict(config))
            if not text.startswith(FREE_ON_RESUME)
        ]
        if changed:
            raise UserError(
                f"{folder}: holds a run with another configuration ({'; '.join(changed)}). Give another "
                f"--run.name, --run.overwrite true to start over, or --run.resume {last} to go on with the new values"
            )
        return state
    state = checkpoint.load(path)
    if "optimizer" not in state:
        raise UserError(f"{path}: holds weights only; last.pt of a run folder is what training resumes from")
    if over or not own:  # the best checkpoint stays behind in the other folder
        state |= {"best_miou": -1.0, "best_step": -1, "evaluated_step": -1}
    return {**state, "file": str(path)}


def write_run_folder(config: Any, folder: Path, classes: Any, world: Any) -> None:
    """config.yaml and classes.csv: with a checkpoint they rebuild the model, wherever the data went."""
    from train.config import save_config

    save_config(config, folder / "config.yaml", versions(world))
    rows = (
        f"{i},{quoted(name)},{','.join(str(int(value)) for value in colour)}"
        for i, (name, colour) in enumerate(zip(classes.names, classes.palette))
    )
    (folder / "classes.csv").write_text("index,name,r,g,b\n" + "".join(f"{row}\n" for row in rows))


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def versions(world: Any) -> dict[str, Any]:
    """What the results may depend on besides the configuration."""
    import torch

    import depict_kernels

    found: dict[str, Any] = {
        "depict_kernels": depict_kernels.__version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "torchvision", "timm", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    found["git_commit"] = git.stdout.strip() or None if git.returncode == 0 else None
    cuda = world.device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(world.device) if cuda else f"cpu ({platform.machine()})"
    found["threads"] = torch.get_num_threads()
    found["processes"] = world.size
    return found


def describe(trainer: Any) -> None:
    from train.loader import too_many_workers

    config, say = trainer.config, trainer.log.say
    count = sum(p.numel() for p in trainer.model.parameters())
    say(f"run folder  {trainer.folder}")
    say(f"data        {trainer.train_set.root}: {len(trainer.train_set)} training and {len(trainer.val_set)} "
        f"validation images, {trainer.classes.num_classes} classes")  # fmt: skip
    say(f"model       {config.model.name}, {count / 1e6:.2f} M parameters, operators: {config.model.backend}")
    say(f"training    {trainer.total_steps} steps, {trainer.total_steps / trainer.steps_per_epoch:.1f} epochs, "
        f"{trainer.world.size} x {trainer.device}, {config.train.precision}")  # fmt: skip
    if note := too_many_workers(config.data.workers):
        say(f"note        {note}")
    if trainer.step:
        say(f"resumed     at step {trainer.step}")


def finish(trainer: Any) -> None:
    """Scores the best checkpoint and writes results.json and the plots."""
    import torch

    from train import build, checkpoint, distributed
    from train.plots import collect_samples, plot_run

    folder, world = trainer.folder, trainer.world
    path = folder / "best.pt"
    state = distributed.on_main(world, lambda: checkpoint.load(path))
    checkpoint.load_weights(trainer.model, state["model"], path, state["config"], trainer.config)
    metrics = trainer.measure(trainer.model)
    if not world.main:
        return
    extra: dict[str, Any] = {"step": state["step"], "checkpoint": "best"}
    if trainer.untrained_miou is not None:
        extra["untrained_miou"] = trainer.untrained_miou
    if trainer.config.data.root is None:
        from train.generated import pixel_baseline

        extra["pixel_baseline_miou"] = pixel_baseline(trainer.train_set.root)
    write_results(folder / "results.json", metrics, extra)
    dtype = build.autocast_dtype(trainer.config)
    with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
        samples = collect_samples(trainer.model, trainer.val_set, trainer.config.eval, device=trainer.device)
    plot_run(folder, metrics=metrics, samples=samples, classes=trainer.classes)


def write_results(path: Path, metrics: Any, extra: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps({**metrics.results(), **extra}, indent=1) + "\n")
    os.replace(temporary, path)


def report(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    print("\nresult on the validation split")
    for key, title in SCORES.items():
        print(f"  {title:<16}{results[key]:.4f}")
    for key, title in (
        ("untrained_miou", "mIoU of the untrained model"),
        ("pixel_baseline_miou", "mIoU of a per-pixel classifier of colour and position"),
    ):
        if key in results:
            print(f"  {title:<55}{results[key]:.4f}")
    print(f"see {folder}/results.json, {folder}/plots/, {folder}/metrics.jsonl", flush=True)


# ------------------------------------------------------------------------------- evaluation, prediction


def split_arguments(
    arguments: list[str], options: dict[str, bool]
) -> tuple[list[str], dict[str, Any], list[str]]:
    """Positional words, the command's own ``options`` (name -> takes a value), and the rest for the keys."""
    words: list[str] = []
    own: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif key[2:] not in options:
            rest.append(word)
            if not equals and queue:
                rest.append(queue.pop(0))
        elif not options[key[2:]]:
            own[key[2:]] = True
        elif equals or queue:
            own[key[2:]] = value if equals else queue.pop(0)
        else:
            raise UserError(f"{key} needs a value")
    return words, own, rest


def open_run(
    words: list[str], rest: list[str], which: str, usage: str
) -> tuple[Path, Any, Any, Any, dict[str, Any], Any]:
    """The run folder's path, configuration, class list, model with weights, checkpoint, and the world."""
    from train import build, checkpoint, distributed
    from train import config as configuration
    from train.ade20k import load_classes

    if not words:
        raise UserError(f"which run? usage: python train/run.py {usage}")
    folder = Path(words[0])
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder}: no run folder (it has no config.yaml); training writes one, e.g. runs/demo"
        )
    files, overrides = configuration.parse_overrides(rest)
    config = configuration.load_config([folder / "config.yaml", *files], overrides)
    if "train.device" not in overrides:  # where it was trained says nothing about where it is evaluated
        config.train.device = "auto"
    prepare_torch(config)
    world = distributed.start(config.train.device)
    build.check_backend(config, world.device, training=False)
    classes = load_classes(str(folder / "classes.csv"))
    model = build.model(config, classes.num_classes, weights=False)
    path = folder / f"{which}.pt" if which in ("best", "last") else Path(which)
    state = checkpoint.load(path)
    # last.pt holds both; the moving average is what training evaluates.
    checkpoint.load_weights(model, state.get("ema") or state["model"], path, state["config"], config)
    model.to(world.device).eval()
    return folder, config, classes, model, state, world


def scored(which: str, multiscale: bool) -> str:
    """What the names of an evaluation's files say of it; the best checkpoint's multi-scale one names no checkpoint."""
    stem = f"_{Path(which).stem}"
    if multiscale:
        return "_multiscale" if which == "best" else f"_multiscale{stem}"
    return stem


def evaluate_run(arguments: list[str]) -> int:
    usage = "eval RUN [--multiscale] [--compare-stock] [--checkpoint best|last|FILE] [--output FILE] [--data.root DIR]"
    options = {"multiscale": False, "compare-stock": False, "checkpoint": True, "output": True}
    words, own, rest = split_arguments(arguments, options)
    which = own.get("checkpoint", "best")
    folder, config, classes, model, state, world = open_run(words, rest, which, usage)
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}; usage: python train/run.py {usage}")
    multiscale = own.get("multiscale", False)
    if not Path(own.get("output", folder)).parent.is_dir():
        raise UserError(f"--output {own['output']}: there is no folder {Path(own['output']).parent}")
    from train import build, distributed
    from train.inference import Comparison, evaluate, print_progress
    from train.plots import plot_confusion
    from train.run_folder import check_writable

    output = Path(own["output"]) if "output" in own else folder / f"results{scored(which, multiscale)}.json"
    distributed.on_main(world, lambda: check_writable(output.parent, "--output"))
    root = build.data_root(config, world)
    dataset = build.split(config, root, config.data.val_split, classes)
    comparison = Comparison() if own.get("compare-stock") else None
    metrics = evaluate(
        model,
        dataset,
        config.eval,
        multiscale=multiscale,
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        amp_dtype=build.autocast_dtype(config),
        progress=print_progress() if world.main else None,
        comparison=comparison,
    )
    if world.main:
        results = metrics.results()
        if results["miou"] is None:
            raise UserError(f"{dataset.root}: no labelled pixel in {config.data.val_split}")
        print(f"{folder}, {which} checkpoint (step {state['step']}), {len(dataset)} images of {dataset.root}"
              + (", multi-scale with flip" if multiscale else ""))  # fmt: skip
        for key, title in SCORES.items():
            print(f"  {title:<16}{results[key]:.4f}")
        if comparison is not None:
            print(f"  {comparison}")
        extra = {"step": state["step"], "checkpoint": which, "multiscale": multiscale}
        write_results(output, metrics, {**extra, "confusion": metrics.confusion.tolist()})
        picture = folder / "plots" / f"confusion{scored(which, multiscale)}.png"
        if "output" in own:
            picture = output.with_name(f"{output.stem}_confusion.png")
        plot_confusion(metrics, picture)
        print(f"written to {output} and {picture}")
    return 0


def predict_run(arguments: list[str]) -> int:
    usage = "predict RUN PATH ... [--output DIR] [--multiscale] [--checkpoint best|last|FILE]"
    words, own, rest = split_arguments(arguments, {"multiscale": False, "checkpoint": True, "output": True})
    folder, config, classes, model, _, world = open_run(words[:1], rest, own.get("checkpoint", "best"), usage)
    if len(words) < 2:
        raise UserError(f"which images? usage: python train/run.py {usage}")
    from train import build
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
        device=world.device,
        amp_dtype=build.autocast_dtype(config),
        progress=print_progress("predicting"),
    )
    print(f"{len(report.written)} files written to {output}")
    return report.exit_status


# --------------------------------------------------------------------------------------------------- data


def load_data_config(arguments: list[str]) -> Any:
    from train import config as configuration

    files, overrides = configuration.parse_overrides(arguments)
    return configuration.load_config(files or [configuration.CONFIGS / "ade20k.yaml"], overrides)


def here() -> Any:
    import torch

    from train.distributed import World

    return World(torch.device("cpu"))


def check_data(arguments: list[str]) -> int:
    from train import build
    from train import check_data as checking
    from train.loader import worker_count

    config = load_data_config(arguments)
    root = build.data_root(config, here())
    report = checking.check_data(
        root,
        build.class_list(config, root),
        (config.data.train_split, config.data.val_split),
        config.data.reduce_zero_label,
        workers=worker_count(config.data.workers),
        progress=sys.stdout.isatty(),
    )
    print(report.text())
    return report.exit_status


def generate_data(arguments: list[str]) -> int:
    from train import build
    from train.config import CONFIGS

    config = load_data_config(arguments or ["--config", str(CONFIGS / "demo.yaml")])
    config.data.root = None
    print(f"generated data set: {build.data_root(config, here())}")
    return 0


def download_data(arguments: list[str]) -> int:
    from train.download import download

    config = load_data_config(arguments)
    print(f"data set: {download(Path(config.data.root).parent)}")
    return 0


def cache_data(arguments: list[str]) -> int:
    from train import build

    config = load_data_config(arguments)
    if config.data.cache is None:
        raise UserError("data.cache: names the folder of the decoded cache; give --data.cache DIR")
    root = build.data_root(config, here())
    for name in (config.data.train_split, config.data.val_split):
        dataset = build.split(config, root, name, build.class_list(config, root))
        print(f"{name}: {len(dataset)} images in {config.data.cache}")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)  # taking the process group down in order would wait for the others, and they for us
    sys.exit(status)
