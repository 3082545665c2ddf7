"""Several real processes over gloo: the same training as one, the same evaluation, and no one left hanging."""

import json
import time

import pytest
import torch
from tiny_run import configuration, make_data, run_all, settings, start_all, torchrun, write_config

from train import distributed
from train.distributed import World
from train.engine import LossModule, Trainer
from train.errors import UserError
from train.logs import read_metrics


def curve(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def shares(data, tmp_path, accumulate: int) -> list[float]:
    """Valid pixels of one process's half over the other's, for every micro-step of the run."""
    from train.loader import train_loader

    config = configuration(data, tmp_path)
    folder = tmp_path / "probe"
    folder.mkdir()
    run = Trainer(config, World(torch.device("cpu")), folder)
    stream = iter(train_loader(run.train_set, config.data, seed=config.train.seed))
    found = []
    for _ in range(8 * accumulate):
        halves = next(stream)["target"].chunk(2)
        counts = [int(LossModule(run.model, config.loss).valid_weight(half)) for half in halves]
        found.append(max(counts) / max(1, min(counts)))
    return found


def test_two_processes_follow_one(tmp_path):
    """Half the batch each, 12 images of which every other is 97 % unlabelled, three micro-steps per step."""
    data = make_data(tmp_path / "data")
    assert max(shares(data, tmp_path, 3)) > 5, "the halves must be unequal for this test to mean anything"
    keys = settings(
        data, tmp_path / "runs", train__steps=8, train__accumulate=3, train__eval_every=4, optim__lr=3e-4,
        loss__class_weights=[1.0, 0.2, 3.0, 1.0, 0.5], loss__label_smoothing=0.1, train__ema_decay=0.9,
    )  # fmt: skip
    config = write_config(tmp_path / "config.yaml", keys)
    for name, processes in (("one", 1), ("two", 2)):
        run_all(["--config", str(config), "--run.name", name], tmp_path, processes)
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    # The first loss differs by the order of a float32 sum; later ones by what Adam makes of such differences.
    assert curve(two)[0] == pytest.approx(curve(one)[0], rel=1e-6)
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)
    assert curve(one)[-1] < 0.95 * curve(one)[0]

    # The same weights over one and two processes: identical integers, nothing counted twice.
    matrices = []
    for processes in (1, 2):
        output = tmp_path / f"eval_{processes}.json"
        run_all(["eval", str(two), "--output", str(output)], tmp_path, processes)
        matrices.append(json.loads(output.read_text())["confusion"])
        assert (tmp_path / f"eval_{processes}_confusion.png").stat().st_size > 1000
        words = [
            "--sigmas",
            "0.1",
            "--images",
            "2",
            "--output",
            str(output.with_name(f"look_{processes}.json")),
        ]
        run_all(["analyse", str(two), *words], tmp_path, processes)
    assert matrices[0] == matrices[1] and sum(map(sum, matrices[0])) > 0
    looks = [json.loads((tmp_path / f"look_{processes}.json").read_text()) for processes in (1, 2)]
    assert looks[0] == looks[1] and looks[0]["miou"] == json.loads(output.read_text())["miou"]
    saved = json.loads((two / "results.json").read_text())
    assert json.loads(output.read_text())["iou_per_class"] == saved["iou_per_class"]

    # One process meets a bad image: it must not end, with an error, before the other has done its own.
    photos = data / "images" / "validation"
    (photos / "bad.png").write_text("no image")
    started = start_all(["predict", str(two), str(photos)], tmp_path, 2)
    assert [one.wait() for one in started] == [1, 1], "\n".join(one.text for one in started)
    assert len(list((two / "predictions").glob("*_overlay.png"))) == 4
    assert sum("bad.png: cannot be read" in one.text for one in started) == 1


def test_resume_with_another_number_of_processes(tmp_path):
    """The data order belongs to the step, not to the processes: the curve goes on."""
    data = make_data(tmp_path / "data")
    keys = settings(data, tmp_path / "runs", train__steps=6, optim__lr=3e-4)
    config = write_config(tmp_path / "config.yaml", keys)
    run_all(["--config", str(config), "--run.name", "whole"], tmp_path)
    half = configuration(data, tmp_path / "runs", train__steps=6, optim__lr=3e-4, run__name="half")
    folder = tmp_path / "runs" / "half"
    folder.mkdir()
    run = Trainer(half, World(torch.device("cpu")), folder)
    update = run._update

    class Stopped(Exception):
        pass

    def stop(batches):
        if run.step == 3:
            run.save()
            raise Stopped
        update(batches)

    run._update = stop
    with pytest.raises(Stopped):
        run.train()
    rest = run_all(["--config", str(config), "--run.name", "half"], tmp_path, 2)
    assert "resumed     at step 3" in rest
    assert curve(folder) == pytest.approx(curve(tmp_path / "runs" / "whole"), rel=1e-4)


def test_failing_process_does_not_hang_the_others(tmp_path):
    """Only one of the two processes reads the bad file; both must be gone soon, with the file named."""
    data = make_data(tmp_path / "data")
    bad = data / "images" / "training" / "image_006.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    config = write_config(tmp_path / "config.yaml", settings(data, tmp_path / "runs", train__steps=1000))
    begun = time.monotonic()
    done = torchrun(["--config", str(config)], processes=2, timeout=240)
    assert done.returncode != 0
    assert f"error: {bad}" in done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr
    assert time.monotonic() - begun < 180, "far below the 600 s after which a process gives up waiting"


def test_incomplete_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"MASTER_ADDR.*torchrun"):
        distributed.start("cpu")
