"""What a start does to a run folder: what it deletes, what it keeps, and when it is refused."""

import errno
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import Started, configuration, make_data, settings, write_config

from train import checkpoint, command_train, distributed, run
from train.command_train import describe
from train.config import load_config
from train.distributed import World
from train.engine import Trainer
from train.logs import read_metrics
from train.run_folder import lock_folder, open_folder, read_results

CPU = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def train(data, tmp_path, **overrides) -> int:
    config = write_config(tmp_path / "config.yaml", settings(data, tmp_path, **overrides))
    return run.main(["--config", str(config)])


def trained(data, tmp_path, resume=None, **overrides) -> Trainer:
    """Two steps in tmp_path/tiny without what comes before and after the training."""
    (tmp_path / "tiny").mkdir(exist_ok=True)
    config = configuration(data, tmp_path, **{"train__steps": 2} | overrides)
    trainer = Trainer(config, CPU, tmp_path / "tiny", resume)
    trainer.train()
    return trainer


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(data, tmp_path):
    folder = tmp_path / "tiny"
    assert train(data, tmp_path, train__steps=2, train__tensorboard=True) == 0
    assert run.main(["eval", str(folder)]) == run.main(["analyse", str(folder), "--sigmas", "0.1"]) == 0
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(written) > 12
    own = [
        folder / "notes.txt",
        folder / "old.pt",
        folder / "data" / "images" / "a.jpg",
        folder / "plots" / "a.png",
    ]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    config = configuration(data, tmp_path, run__overwrite=True)
    open_folder(config, folder, Trainer(config, CPU, folder).classes, CPU)
    left = {path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert left == {*own, folder / "config.yaml", folder / "classes.csv"}
    assert all(path.read_bytes() == b"mine" for path in own)


@pytest.mark.parametrize("resume", ["", "last.pt", "kept.pt"])
def test_overwrite_and_resume_of_the_same_run_contradict(data, tmp_path, capsys, resume):
    folder = tmp_path / "tiny"
    trained(data, tmp_path)
    before = (folder / "last.pt").read_bytes()
    (folder / "config.yaml").write_text("{}")
    (folder / "kept.pt").write_bytes(before)
    capsys.readouterr()
    assert train(data, tmp_path, train__steps=4, run__overwrite=True, run__resume=str(folder / resume)) == 2
    text = capsys.readouterr().err
    assert "run.resume: " in text and "run.overwrite true would delete" in text and text.count("\n") == 1
    assert (folder / "last.pt").read_bytes() == before


def test_a_batch_that_the_processes_cannot_share_deletes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda device: World(CPU.device, 0, 3))
    monkeypatch.setattr(command_train, "prepare_folder", lambda *_: pytest.fail("prepared first"))
    assert train(data, tmp_path, run__overwrite=True) == 2
    assert "data.batch_size is 4: need a multiple of the 3 processes" in capsys.readouterr().err


def test_an_extended_run_does_not_keep_the_results_of_the_shorter_one(data, tmp_path, capsys, monkeypatch):
    assert train(data, tmp_path, train__steps=2) == 0
    longer = {"train__steps": 4, "run__resume": str(tmp_path / "tiny")}
    with monkeypatch.context() as patch:
        patch.setattr(command_train, "finish", interrupt)
        assert train(data, tmp_path, **longer) == 130
    assert train(data, tmp_path, **longer) == 0
    assert "is finished" not in capsys.readouterr().out
    best = checkpoint.load(tmp_path / "tiny" / "best.pt")
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert (results["step"], results["miou"]) == (best["step"], best["miou"])
    assert train(data, tmp_path, train__steps=4, eval__flip=True) == 0
    said = capsys.readouterr().out
    assert "is finished" in said and "other settings (eval.flip: False in the checkpoint, True now)" in said


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_damaged_results_are_made_again(data, tmp_path):
    trained(data, tmp_path)
    path = tmp_path / "tiny" / "results.json"
    for text in ("", "[]", "{}", '{"miou": 0.1, "pix'):
        path.write_text(text)
        assert read_results(tmp_path / "tiny") is None
    assert train(data, tmp_path, train__steps=2) == 0
    assert json.loads(path.read_text())["miou"] > 0


def test_one_process_trains_in_a_folder_at_a_time(data, tmp_path, capsys):
    """The lock ends with the process that is killed, while a loader process of it still runs."""
    pytest.importorskip("fcntl")
    keys = settings(data, tmp_path, train__steps=100_000, train__save_every=5, data__workers=1)
    arguments = ["--config", str(write_config(tmp_path / "config.yaml", keys))]
    first = Started(arguments, tmp_path / "first.txt")
    last, limit = tmp_path / "tiny" / "last.pt", time.monotonic() + 120
    while not last.exists() and first.process.is_alive() and time.monotonic() < limit:
        time.sleep(0.01)
    leftover = tmp_path / "tiny" / "last.pt.1.tmp"  # as it looks in the middle of the other one's save
    leftover.write_bytes(b"")
    for more in ([], ["--run.overwrite", "true"]):
        assert run.main([*arguments, *more]) == 2
        text = capsys.readouterr().err
        assert f"{tmp_path / 'tiny'}: another process is training in it" in text and text.count("\n") == 1
    assert first.process.is_alive() and last.exists() and leftover.exists(), first.text
    first.process.kill()
    first.wait()
    config = load_config([], keys)
    open_folder(config, tmp_path / "tiny", Trainer(config, CPU, tmp_path / "tiny").classes, CPU)
    assert not leftover.exists()


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    lock_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    lock_folder(tmp_path)


def test_renamed_classes_are_another_configuration(data, tmp_path, capsys):
    trained(data, tmp_path, train__steps=2)
    before = (tmp_path / "tiny" / "last.pt").read_bytes()
    names = (data / "classes.txt").read_text().split()
    for other, word in (
        ([names[0], names[2], names[1], *names[3:]], "class 1 is grass in the checkpoint, wall now"),
        (names[1:], "5 classes in the checkpoint, 4 now"),
    ):
        (data / "classes.txt").write_text("\n".join(other))
        assert train(data, tmp_path, train__steps=2) == 2
        text = capsys.readouterr().err
        assert (
            f"holds a run with another configuration (data.classes: {word}). Give another --run.name" in text
        )
    assert (tmp_path / "tiny" / "last.pt").read_bytes() == before
    (data / "classes.txt").write_text("\n".join(names[::-1]))
    assert train(data, tmp_path, train__steps=3, run__resume=str(tmp_path / "tiny" / "last.pt")) == 0
    assert checkpoint.load(tmp_path / "tiny" / "last.pt")["classes"] == names[::-1]
    assert (tmp_path / "tiny" / "classes.csv").read_text().startswith("index,name,r,g,b\n0,roof,")


@pytest.mark.parametrize("lost", ["missing", "cut short"])
def test_a_lost_best_checkpoint_is_made_again(data, tmp_path, capsys, lost):
    trained(data, tmp_path)
    best = tmp_path / "tiny" / "best.pt"
    expected = checkpoint.load(best)
    if lost == "missing":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:1000])
    assert train(data, tmp_path, train__steps=2) == 0
    assert f"note: {best}: no" in capsys.readouterr().out
    found = checkpoint.load(best)
    assert (found["step"], found["miou"]) == (expected["step"], expected["miou"])
    lines = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("eval", 2)]


def test_a_start_notes_what_may_not_be_meant(data, tmp_path, capsys):
    rate = "note        optim.warmup_steps: 2 of 2 steps, so that the learning rate never reaches optim.lr (0.001)"
    images = "note        11 training images, 12 up to the checkpoint"
    describe(trained(data, tmp_path, optim__warmup_steps=1))
    said = capsys.readouterr().out
    assert "note  " not in said
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    describe(trained(data, tmp_path, state, optim__warmup_steps=2))
    said = capsys.readouterr().out
    assert rate in said and images not in said
    for kind in ("images", "annotations"):
        next((data / kind / "training").glob("image_011*")).unlink()
    describe(trained(data, tmp_path, state))
    said = capsys.readouterr().out
    assert images in said and rate not in said


def resumed(data, source: Path, name: str, **overrides) -> tuple[list, dict]:
    """Goes on to step 6 in a copy of ``source``: (step, mIoU) of every evaluation, and what last.pt holds then."""
    tmp_path, folder = source.parent, source.with_name(name)
    shutil.copytree(source, folder)
    keys = {"train__steps": 6, "train__eval_every": 5, "model__drop_path_rate": 0.5} | overrides
    trainer = Trainer(configuration(data, tmp_path, **keys), CPU, folder, checkpoint.load(folder / "last.pt"))
    measured, measure = [], trainer.measure

    def noted(model):
        metrics = measure(model)
        measured.append((trainer.step, metrics.results()["miou"]))
        return metrics

    trainer.measure = noted
    trainer.train()
    return measured, checkpoint.load(folder / "last.pt")


def test_best_is_scored_again_where_scores_are_no_longer_comparable(data, tmp_path, capsys):
    trained(data, tmp_path, model__drop_path_rate=0.5)
    first, last = tmp_path / "tiny", tmp_path / "tiny" / "last.pt"
    checkpoint.save(last, checkpoint.load(last) | {"best_miou": 0.99})  # out of reach, were it carried over
    plain, expected = resumed(data, first, "plain")
    same, _ = resumed(data, first, "same", eval__batch_windows=2, eval__strip_rows=16)
    assert [step for step, _ in plain] == [step for step, _ in same] == [5, 6]
    assert "scored again" not in capsys.readouterr().out

    other, found = resumed(data, first, "other", eval__max_images=1)
    said = capsys.readouterr().out
    assert "best.pt of step 2 scored again (eval.max_images: None in the checkpoint, 1 now): miou " in said
    assert [step for step, _ in other] == [2, 5, 6]
    assert found["best_miou"] == max(miou for _, miou in other) < 0.99
    best = checkpoint.load(tmp_path / "other" / "best.pt")
    assert (best["miou"], best["step"]) == (found["best_miou"], found["best_step"])
    # Nothing else notices: the same paths are dropped, the same lines are written.
    assert torch.equal(expected["rng"][0]["torch"], found["rng"][0]["torch"])
    assert all(torch.equal(value, found["model"][key]) for key, value in expected["model"].items())
    kinds = [(line["kind"], line["step"]) for line in read_metrics(tmp_path / "other" / "metrics.jsonl")]
    assert kinds == [
        (line["kind"], line["step"]) for line in read_metrics(tmp_path / "plain" / "metrics.jsonl")
    ]
    # From here on the scores belong to these keys.
    again, _ = resumed(data, tmp_path / "other", "again", eval__max_images=1)
    assert again == []
