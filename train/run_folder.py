"""A run's folder: whether a run may use it, and what is written there beside the checkpoints and the log."""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from train.errors import UserError

# Keys that change what is reported or where it goes, not what is trained.
FREE_ON_RESUME = (
    "run.", "data.root", "data.cache", "data.workers", "data.val_split", "eval.", "train.device", "train.threads",
    "train.log_every", "train.eval_every", "train.save_every", "train.tensorboard", "train.compile",
    "train.score_untrained", "train.deterministic", "model.backend",
    "model.pretrained", "model.checkpoint_path", "model.initial_checkpoint",
)  # fmt: skip
# What run.overwrite deletes: files called as training, `eval` and `analyse` call theirs. config.yaml and classes.csv,
# which every start writes anew, stay until then: a folder without them is taken for no run's.
WRITTEN = (
    "last.pt", "best.pt", "metrics.jsonl", "results*.json", "analysis*.json", "plots/loss.png",
    "plots/miou.png", "plots/confusion*.png", "plots/analysis*.png", "plots/overlays.png",
    "tensorboard/events.*", "*.json.tmp", "*.jsonl.tmp",
)  # fmt: skip
SCORES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}


def check_writable(folder: Path, key: str) -> None:
    """Raises ``UserError`` where nothing can be written into ``folder`` or, as long as it is missing, above it.

    Writes and removes a nameless file, since permission bits do not tell (root, read-only and full disks). ``key``
    is what to change.
    """
    existing = next(path for path in (folder, *folder.parents, Path()) if os.path.lexists(path))
    failed = f"{folder}: cannot be {'written' if existing == folder else 'made'}"
    if not existing.is_dir():
        raise UserError(f"{failed}: {existing} is no folder; change {key}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise UserError(f"{failed}: {existing}: {error.strerror}; change {key}") from None


def prepare_folder(config: Any, folder: Path) -> dict[str, Any] | None:
    """Decides whether this run is new or goes on; the checkpoint's state in the latter case.

    ``--run.resume PATH`` of another folder starts this one from there; once it has a checkpoint of its own, the same
    command goes on from that. Nothing is deleted yet. Raises ``UserError`` rather than mix two runs in one folder.
    """
    from train import checkpoint
    from train.config import to_dict

    check_writable(folder, "--run.root")
    resume, last = config.run.resume, folder / "last.pt"
    over = config.run.overwrite
    if (folder / "config.yaml").exists():
        lock_folder(folder)  # before last.pt is read: another process may still be writing it
    elif over and folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: no run folder (it has no config.yaml), so run.overwrite leaves it alone")
    path = Path(resume)
    path = path / "last.pt" if path.is_dir() else path
    named = resume not in ("auto", "never")
    own = named and path.resolve().parent == folder.resolve()
    if own and over:
        raise UserError(
            f"run.resume: {path} belongs to the run that run.overwrite true would delete; leave run.overwrite out "
            "to go on with it, or give another --run.name"
        )
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
        ] + changed_classes(config, state)
        if changed:
            raise UserError(
                f"{folder}: holds a run with another configuration ({'; '.join(changed)}). Give another "
                f"--run.name, --run.overwrite true to start over, or --run.resume {last} to go on with the new values"
            )
        return with_best(state, folder)
    state = checkpoint.load(path)
    if "optimizer" not in state:
        raise UserError(f"{path}: holds weights only; last.pt of a run folder is what training resumes from")
    if not own:  # the best checkpoint stays behind in the other folder
        state |= {"best_miou": -1.0, "best_step": -1, "evaluated_step": -1}
    return {**(with_best(state, folder) if own else state), "file": str(path)}


def changed_classes(config: Any, state: dict[str, Any]) -> list[str]:
    """What the class list says otherwise than the checkpoint, in the words of ``checkpoint.differences``."""
    from train.ade20k import load_classes

    if config.data.root is None:  # the generated data set's never change
        return []
    before, now = state["classes"], list(load_classes(config.data.classes).names)
    if len(before) != len(now):
        return [f"data.classes: {len(before)} classes in the checkpoint, {len(now)} now"]
    pairs = enumerate(zip(before, now))
    return [f"data.classes: class {i} is {a} in the checkpoint, {b} now" for i, (a, b) in pairs if a != b][:1]


def with_best(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of ``folder``'s own checkpoint; without a best model where best.pt is missing or damaged."""
    from train import checkpoint

    if state["best_step"] < 0:
        return state
    try:
        checkpoint.load(folder / "best.pt")
        return state
    except UserError as error:
        print(f"note: {error}; the best model from step {state['step']} on is kept", flush=True)
    evaluated = min(state["evaluated_step"], state["step"] - 1)  # the last step's model may be it
    return state | {"best_miou": -1.0, "best_step": -1, "evaluated_step": evaluated}


_locks: list[int] = []  # descriptors of the locks that this process holds


def unlock_folders() -> None:
    """Gives back what :func:`lock_folder` took."""
    while _locks:
        os.close(_locks.pop())


def lock_folder(folder: Path) -> None:
    """Makes this the only process that trains in ``folder`` until :func:`unlock_folders`, or its end, however it ends.

    Raises ``UserError`` where another one does. Without locks (Windows, some file systems) nothing is noticed.
    """
    try:
        import fcntl
    except ImportError:
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    _locks.append(descriptor)
    try:
        # Of the process alone: a flock would pass to the loader's workers, which outlive a killed run by seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{folder}: another process is training in it; stop that one or give another --run.name (where there "
                "is none, as after the crash of another machine, delete its file .lock)"
            ) from None


def open_folder(config: Any, folder: Path, classes: Any, world: Any) -> None:
    """Makes the folder, deletes the results in it (for ``run.overwrite`` the whole run), writes what a start writes.

    To be called once the data and the model were found to be good: a start that fails leaves no empty folder and
    deletes nothing.
    """
    from train import checkpoint

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    lock_folder(folder)
    checkpoint.remove_leftovers(folder)
    if config.run.overwrite:
        for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
            path.unlink()
    # They would pass for this run's, were it interrupted in its last scoring.
    (folder / "results.json").unlink(missing_ok=True)
    write_run_folder(config, folder, classes, world)


def write_run_folder(config: Any, folder: Path, classes: Any, world: Any) -> None:
    """config.yaml and classes.csv: with a checkpoint they rebuild the model, wherever the data went."""
    from train.config import save_config

    save_config(config, folder / "config.yaml", versions(world))
    with open(folder / "classes.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("index", "name", "r", "g", "b"))
        rows.writerows(
            (i, name, *colour) for i, (name, colour) in enumerate(zip(classes.names, classes.palette))
        )


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


def write_results(path: Path, metrics: Any, extra: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps({**metrics.results(), **extra}, indent=1) + "\n")
    os.replace(temporary, path)


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json; None where it is missing or damaged."""
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(results, dict) and isinstance(results.get("iou_per_class"), dict)
    return results if whole and all(isinstance(results.get(key), (int, float)) for key in SCORES) else None


def report(folder: Path, results: dict[str, Any]) -> None:
    from train.metrics import iou_lines

    print("\nresult on the validation split")
    for key, title in SCORES.items():
        print(f"  {title:<16}{results[key]:.4f}")
    for key, title in (
        ("untrained_miou", "mIoU of the untrained model"),
        ("pixel_baseline_miou", "mIoU of a per-pixel classifier of colour and position"),
    ):
        if key in results:
            print(f"  {title:<55}{results[key]:.4f}")
    print(*iou_lines(results), sep="\n")
    print(f"see {folder}/results.json, {folder}/plots/, {folder}/metrics.jsonl", flush=True)
