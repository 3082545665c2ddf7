"""A run that is killed and resumed ends exactly where an undisturbed one does. Real processes, real SIGKILL."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import Started, arguments, configuration, make_data, run_all, settings, write_config

from train import checkpoint
from train.distributed import World
from train.engine import Trainer
from train.logs import read_metrics

TIMES = {"images_per_s", "seconds_per_step"}


def differing(first, second, name: str = "") -> list[str]:
    """Names of everything in two checkpoints that is not bit-identical."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [name]
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        return [found for key in first for found in differing(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), name
        return [
            found for i, pair in enumerate(zip(first, second)) for found in differing(*pair, f"{name}.{i}")
        ]
    return [] if first == second else [name]


def without_times(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def kill_when(arguments: list[str], output: Path, words: str) -> None:
    """Starts the run, and kills it with SIGKILL as soon as it has printed ``words``."""
    run = Started(arguments, output)
    limit = time.monotonic() + 120
    while words not in run.text and run.process.is_alive() and time.monotonic() < limit:
        time.sleep(0.002)
    run.process.kill()
    assert run.wait() == -signal.SIGKILL and words in run.text, run.text


def test_killed_and_resumed_run_ends_bit_identical(tmp_path):
    """Stochastic depth, augmentation, EMA, accumulation, evaluations, loader processes; 15 images do not fill
    the batches of 2 x 4, so that epochs end inside a batch."""
    data = make_data(tmp_path / "data", train_images=15)
    keys = settings(
        data, tmp_path / "runs", train__steps=40, train__save_every=4, train__eval_every=15, train__log_every=2,
        train__accumulate=2, train__ema_decay=0.9, model__drop_path_rate=0.3, data__workers=1, train__seed=3,
        train__score_untrained=True, train__tensorboard=True,
    )  # fmt: skip
    config = ["--config", str(write_config(tmp_path / "config.yaml", keys)), "--run.name"]
    runs = tmp_path / "runs"
    run_all([*config, "whole"], tmp_path)

    arguments, killed = [*config, "killed"], runs / "killed"
    kill_when(arguments, tmp_path / "first.txt", "step 6/40")
    first = checkpoint.load(killed / "last.pt")["step"]
    kill_when(arguments, tmp_path / "second.txt", "step 22/40")
    second = checkpoint.load(killed / "last.pt")["step"]
    assert 4 <= first < second < 40
    assert f"resumed     at step {second}" in run_all(arguments, tmp_path)

    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(runs / "whole" / name), checkpoint.load(killed / name)
        assert [key for key in differing(one, other) if key != ".config.run.name"] == []
    assert without_times(killed) == without_times(runs / "whole")
    results = [json.loads((runs / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1] and results[0]["untrained_miou"] is not None
    for path in ("config.yaml", "classes.csv", "tensorboard", "plots/loss.png", "plots/miou.png"):
        assert (killed / path).exists(), path

    before = (killed / "last.pt").stat()
    assert "is finished" in run_all(arguments, tmp_path)
    assert (killed / "last.pt").stat() == before


def test_ctrl_c_saves_the_step_that_it_lets_end(tmp_path):
    data = make_data(tmp_path / "data")
    keys = settings(data, tmp_path / "runs", train__steps=30, data__workers=1, model__drop_path_rate=0.3)
    config = ["--config", str(write_config(tmp_path / "config.yaml", keys)), "--run.name"]
    run = Started([*config, "stopped"], tmp_path / "first.txt")
    limit = time.monotonic() + 120
    while "step 5/30" not in run.text and run.process.is_alive() and time.monotonic() < limit:
        time.sleep(0.002)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.text
    last = tmp_path / "runs" / "stopped" / "last.pt"
    step = checkpoint.load(last)["step"]
    assert 5 <= step < 30 and f"stopped; {last} holds step {step}: the same command goes on there" in run.text
    assert f"resumed     at step {step}" in run_all([*config, "stopped"], tmp_path)
    run_all([*config, "whole"], tmp_path)
    one, other = (checkpoint.load(tmp_path / "runs" / name / "last.pt") for name in ("whole", "stopped"))
    assert [key for key in differing(one, other) if key != ".config.run.name"] == []


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["handled", "ignored"])
def test_termination_saves_as_ctrl_c_does(tmp_path, ctrl_c):
    """Also where Ctrl-C is ignored, as in the background of a script."""
    keys = settings(make_data(tmp_path / "data"), tmp_path / "runs", train__steps=300, data__workers=1)
    run = Started(arguments(keys), tmp_path / "first.txt", ctrl_c=ctrl_c)
    limit = time.monotonic() + 120
    while "step 2/300" not in run.text and run.process.is_alive() and time.monotonic() < limit:
        time.sleep(0.002)
    # To the whole group, as schedulers send it: the loader's processes end too.
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    for pid in (run.process.pid, *(children.read_text().split() if children.exists() else ())):
        os.kill(int(pid), signal.SIGTERM)
    assert run.wait() == 130, run.text
    step = checkpoint.load(tmp_path / "runs" / "tiny" / "last.pt")["step"]
    assert 2 <= step < 300 and f"holds step {step}" in run.text


@pytest.fixture
def ctrl_c():
    """Presses it. Shells start jobs in the background with SIGINT ignored, and CI may be such a job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["step", "fetch", "evaluation", "first step"])
def test_an_interrupted_run_says_what_is_kept(where, ctrl_c, tmp_path, monkeypatch):
    config = configuration(make_data(tmp_path / "data"), tmp_path, train__eval_every=2)
    (tmp_path / "tiny").mkdir()
    trainer = Trainer(config, CPU, tmp_path / "tiny")

    def around(name: str, step: int):
        method = getattr(trainer, name)

        def pressed(*arguments):
            if trainer.step == step:
                ctrl_c()
            return method(*arguments)

        monkeypatch.setattr(trainer, name, pressed)

    if where in ("step", "first step"):
        around("_update", 2 if where == "step" else 0)
    elif where == "fetch":
        around("_evaluation_due", 1)  # after a step: as in the fetch, nothing holds the interrupt back
    else:
        around("evaluate_now", 2)
    with pytest.raises(KeyboardInterrupt, match="goes on there"):
        trainer.train()
    expected = {"step": 3, "fetch": 1, "evaluation": 2, "first step": 1}[where]
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    assert (state["step"], state["evaluated_step"]) == (expected, 2 if where == "step" else -1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(ctrl_c, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = configuration(make_data(tmp_path / "data"), tmp_path, train__steps=2)
    (tmp_path / "tiny").mkdir()
    trainer = Trainer(config, CPU, tmp_path / "tiny")
    update = trainer._update
    monkeypatch.setattr(trainer, "_update", lambda batches: (ctrl_c(), update(batches)))
    trainer.train()
    assert trainer.step == 2 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_interrupted_before_any_step(ctrl_c, tmp_path, monkeypatch):
    config = configuration(make_data(tmp_path / "data"), tmp_path)
    (tmp_path / "tiny").mkdir()
    trainer = Trainer(config, CPU, tmp_path / "tiny")
    monkeypatch.setattr("train.engine.train_loader", lambda *_, **__: iter(ctrl_c, 0))
    with pytest.raises(KeyboardInterrupt, match="starts from the beginning"):
        trainer.train()
    assert not (tmp_path / "tiny" / "last.pt").exists()


CPU = World(torch.device("cpu"))


@pytest.fixture
def interrupted(tmp_path):
    """A run of 6 steps with its checkpoint of step 4, and the settings that made it."""
    data = make_data(tmp_path / "data")
    (tmp_path / "tiny").mkdir()
    config = configuration(data, tmp_path, train__save_every=4, train__steps=6, model__drop_path_rate=0.5)
    Trainer(config, CPU, tmp_path / "tiny").train()
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    return settings(data, tmp_path, model__drop_path_rate=0.5, train__save_every=4), state


def refusal(capsys, keys: dict) -> str:
    from train import run

    assert run.main(arguments(keys)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"optim.lr": 0.5},
            ["optim.lr: 0.001 in the checkpoint, 0.5 now", "--run.overwrite true", "--run.resume "],
        ),
        ({"train.steps": 9}, ["train.steps: 6 in the checkpoint, 9 now"]),
        ({"run.resume": "never"}, ["holds a run", "run.overwrite"]),
        (
            {"run.resume": "LAST", "model.name": "depict_ca_vit_tiny"},
            [
                "checkpoint of another model",
                "model.name: depict_sa_vit_tiny in the checkpoint, depict_ca_vit_tiny now",
            ],
        ),
        (
            {
                "run.resume": "LAST",
                "model.backbone_kwargs": {"depth": 2, "embed_dim": 96, "num_heads": 3, "patch_size": 8},
            },
            ["model.backbone_kwargs.embed_dim: 48", "has shape", "96"],
        ),
        ({"run.resume": "BEST"}, ["holds weights only"]),
        (
            {"run.resume": "LAST", "train.steps": 3, "train.log_every": 20},
            ["is at step 6", "end at step 3", "--train.steps"],
        ),
    ],
    ids=["other lr", "other length", "never", "other decoder", "other width", "best.pt", "shorter"],
)
def test_runs_are_never_mixed(interrupted, tmp_path, capsys, overrides, words):
    keys, _ = interrupted
    places = {"LAST": str(tmp_path / "tiny" / "last.pt"), "BEST": str(tmp_path / "tiny" / "best.pt")}
    before = (tmp_path / "tiny" / "last.pt").read_bytes()
    text = refusal(capsys, keys | {key: places.get(str(value), value) for key, value in overrides.items()})
    assert all(word in text for word in words) and text.count("\n") == 1, text
    assert (tmp_path / "tiny" / "last.pt").read_bytes() == before


def test_overwrite_leaves_other_folders_alone(interrupted, tmp_path, capsys):
    keys, _ = interrupted
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    text = refusal(capsys, keys | {"run.name": "photos", "run.overwrite": True})
    assert "no run folder" in text and (tmp_path / "photos" / "a.jpg").exists()


@pytest.mark.parametrize(
    "overrides", [{"data.root": "/nowhere"}, {"model.backbone": "vit_tny"}, {"loss.class_weights": [1.0]}]
)
def test_overwrite_waits_for_good_input(interrupted, tmp_path, capsys, overrides):
    keys, _ = interrupted
    (tmp_path / "tiny" / "config.yaml").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tiny").glob("[!.]*.*")}
    refusal(capsys, keys | {"run.overwrite": True} | overrides)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny").glob("[!.]*.*")} == before


def resumed(keys: dict, folder: Path) -> Trainer:
    """What the command would train, in its folder."""
    from train import run_folder
    from train.config import load_config

    config = load_config([], keys)
    state = run_folder.prepare_folder(config, folder)
    folder.mkdir(exist_ok=True)
    return Trainer(config, CPU, folder, state)


def test_run_from_another_folders_checkpoint_has_a_best_of_its_own(interrupted, tmp_path, capsys):
    keys, state = interrupted
    other = tmp_path / "other"
    keys |= {"run.name": "other", "run.resume": str(tmp_path / "tiny"), "train.steps": 8}
    checkpoint.save(tmp_path / "tiny" / "last.pt", state | {"best_miou": 0.99})
    trainer = resumed(keys, other)
    assert trainer.step == state["step"]
    trainer.train()
    best = checkpoint.load(other / "best.pt")
    assert best["miou"] == trainer.best_miou < 0.99
    # The same command again goes on from what this run has reached; another one is refused.
    assert resumed(keys, other).step == 8
    assert "optim.lr" in refusal(capsys, keys | {"optim.lr": 0.5})
    text = refusal(capsys, keys | {"run.name": "third", "model.name": "depict_ca_vit_tiny"})
    assert str(tmp_path / "tiny" / "last.pt") in text


def test_evaluation_that_cannot_give_a_result(interrupted, tmp_path, capsys):
    from train import run, run_folder
    from train.config import load_config

    keys, _ = interrupted
    config, folder = load_config([], keys), tmp_path / "tiny"
    run_folder.write_run_folder(config, folder, Trainer(config, CPU, folder).classes, CPU)
    assert run.main(["eval", str(folder), "--output", str(tmp_path / "nowhere" / "a.json")]) == 2
    assert capsys.readouterr().err.startswith("error: --output")
    if Path("/proc/self").is_dir():  # where not even root can write; said before the evaluation, not after it
        assert run.main(["eval", str(folder), "--output", "/proc/a.json"]) == 2
        assert "/proc: cannot be written: " in capsys.readouterr().err
    for path in (tmp_path / "data" / "annotations" / "validation").iterdir():
        Image.new("L", (32, 32)).save(path)
    (folder / "plots").write_text("")
    for command in ("eval", "analyse"):  # said before the data are read
        assert run.main([command, str(folder)]) == 2
        assert f"{folder / 'plots'} is no folder; change --output" in capsys.readouterr().err
    (folder / "plots").unlink()
    assert run.main(["eval", str(folder)]) == 2
    assert "no labelled pixel in validation" in capsys.readouterr().err


def test_evaluation_on_other_data_keeps_the_first_results(interrupted, tmp_path, capsys):
    from train import run, run_folder
    from train.config import load_config

    keys, _ = interrupted
    config, folder = load_config([], keys), tmp_path / "tiny"
    run_folder.write_run_folder(config, folder, Trainer(config, CPU, folder).classes, CPU)
    assert run.main(["eval", str(folder)]) == run.main(["eval", str(folder)]) == 0
    results = (folder / "results_best.json").read_text()
    capsys.readouterr()
    other = make_data(tmp_path / "other")
    assert run.main(["eval", str(folder), "--data.root", str(other)]) == 2
    said = capsys.readouterr().err
    assert f"results of data {tmp_path / 'data'}" in said and "--output" in said
    (tmp_path / "three.txt").write_text("a\nb\nc")
    assert run.main(["eval", str(folder), "--data.classes", str(tmp_path / "three.txt")]) == 2
    assert f"three.txt has 3 classes, the model of {folder} has 5" in capsys.readouterr().err
    for key, value, held in (
        ("eval.max_images", "1", "images 4, not 1"),
        ("eval.resize", "8", "eval.resize 32, not 8"),
        ("eval.scales", "[0.5]", "eval.scales [1.0], not [0.5]"),
        ("eval.mode", "slide", "eval.mode whole, not slide"),
        ("train.precision", "bf16", "train.precision fp32, not bf16"),
    ):
        assert run.main(["eval", str(folder), f"--{key}", value]) == 2
        assert f"results_best.json: holds the results of {held}; name another" in capsys.readouterr().err
    assert run.main(["eval", str(folder), "--eval.batch_windows", "2"]) == 0  # which changes no score
    assert (folder / "results_best.json").read_text() == results
    assert run.main(["eval", str(folder), "--eval.resize", "8", "--eval.flip", "true"]) == 2
    assert (
        "holds the results of eval.resize 32, not 8; eval.flip False, not True; name"
        in capsys.readouterr().err
    )
    output = tmp_path / "other.json"
    assert run.main(["eval", str(folder), "--data.root", str(other), "--output", str(output)]) == 0
    assert str(other) in output.read_text()


def test_kill_between_a_step_and_its_evaluation(interrupted, tmp_path):
    """last.pt of the final step, not evaluated yet: the resumed run must evaluate before anything else."""
    keys, state = interrupted
    from train.config import load_config

    config = load_config([], keys)
    path = tmp_path / "tiny" / "last.pt"
    expected = checkpoint.load(tmp_path / "tiny" / "best.pt")
    checkpoint.save(path, state | {"evaluated_step": -1, "best_miou": -1.0, "best_step": -1})
    (tmp_path / "tiny" / "best.pt").unlink()
    lines = without_times(tmp_path / "tiny")
    Trainer(config, CPU, tmp_path / "tiny", checkpoint.load(path)).train()
    assert differing(expected, checkpoint.load(tmp_path / "tiny" / "best.pt")) == []
    assert differing(state, checkpoint.load(path)) == []
    assert without_times(tmp_path / "tiny") == lines


def test_state_that_is_left_out_would_be_noticed(tmp_path):
    """The bit-identity above must hang on the generators' state: without it the weights differ."""
    data = make_data(tmp_path / "data")
    ends = []
    for forget in (False, True):
        folder = tmp_path / str(forget)
        folder.mkdir()
        config = configuration(data, tmp_path, train__steps=6, train__save_every=3, model__drop_path_rate=0.5)
        first = Trainer(config, CPU, folder)
        first.total_steps, length = 3, first.total_steps
        first.train()
        state = checkpoint.load(folder / "last.pt")
        second = Trainer(config, CPU, folder, state)
        assert second.step == 3 and second.total_steps == length
        if forget:
            torch.manual_seed(1)
        second.train()
        ends.append(second.model.state_dict())
    assert differing(*ends)


def test_eval_command_keeps_the_precision_and_writes_its_picture(interrupted, tmp_path, monkeypatch, capsys):
    from train import inference, run, run_folder
    from train.config import load_config

    keys, _ = interrupted
    config, folder = load_config([], keys | {"train.precision": "bf16"}), tmp_path / "tiny"
    run_folder.write_run_folder(config, folder, Trainer(config, CPU, folder).classes, CPU)
    seen, evaluate = [], inference.evaluate

    def noted(*arguments, **options):
        seen.append(options["amp_dtype"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(inference, "evaluate", noted)
    assert run.main(["eval", str(folder)]) == 0
    assert (folder / "results_best.json").exists() and (folder / "plots" / "confusion_best.png").exists()
    three = str(tmp_path / "three.json")
    assert run.main(["eval", str(folder), "--eval.max_images", "3", "--output", three]) == 0
    said = capsys.readouterr().out
    assert f"4 images of {tmp_path}" in said and f"3 images of {tmp_path}" in said
    before = sorted(folder.rglob("*"))
    output = tmp_path / "elsewhere.json"
    arguments = ["--multiscale", "--output", str(output), "--train.precision", "fp32"]
    assert run.main(["eval", str(folder), *arguments]) == 0
    assert output.exists() and (tmp_path / "elsewhere_confusion.png").exists()
    assert sorted(folder.rglob("*")) == before  # --output leaves the run folder alone
    assert seen == [torch.bfloat16, torch.bfloat16, None]
    for options, ending in (
        (["--checkpoint", "last"], "last"),
        (["--multiscale"], "multiscale"),
        (["--multiscale", "--checkpoint", "last"], "multiscale_last"),
    ):
        files = [folder / f"results_{ending}.json", folder / "plots" / f"confusion_{ending}.png"]
        assert not any(file.exists() for file in files)
        assert run.main(["eval", str(folder), *options]) == 0
        assert all(file.exists() for file in files)
