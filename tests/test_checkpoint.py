"""Checkpoints survive kills and full disks, refuse foreign models, and hold every generator's state."""

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train import checkpoint
from train.config import Config, to_dict
from train.errors import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WHOLE = {"step": 0, "model": {}, "config": {}, "classes": []}  # what every checkpoint has


def test_round_trip_of_everything_a_run_stores(tmp_path):
    config = to_dict(Config())
    state = {
        "step": 3,
        "model": {"w": torch.randn(2, 3)},
        "ema": None,
        "config": config,
        "classes": ["sky"],
        "rng": [checkpoint.rng_state(CPU)],
    }
    checkpoint.save(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 3 and loaded["config"] == config
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_generators_continue_where_they_were(tmp_path):
    draws()  # leaves a second Gaussian behind in python's generator, which belongs to its state
    checkpoint.save(tmp_path / "a.pt", WHOLE | {"rng": checkpoint.rng_state(CPU)})
    expected = [draws() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"], CPU)
    assert [draws() for _ in range(3)] == expected


@pytest.fixture
def file_size_limit():
    """The operating system refuses files above 64 KiB, the nearest to a full disk without a file system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("elements", [30_000, 3_000_000], ids=["fails at the end", "fails in the middle"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, file_size_limit, elements):
    path = tmp_path / "last.pt"
    checkpoint.save(path, WHOLE | {"step": 1})
    with pytest.raises(
        UserError, match=r"last.pt: cannot be saved: File too large; the previous checkpoint is kept"
    ):
        checkpoint.save(path, WHOLE | {"step": 2, "model": torch.randn(elements)})
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_full_disk_at_the_first_save(tmp_path, file_size_limit):
    with pytest.raises(UserError) as error:
        checkpoint.save(tmp_path / "last.pt", {"model": torch.randn(100_000)})
    assert "previous" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("over", "again"), [(True, "again without run.overwrite: it"), (False, "again: it continues")]
)
def test_full_disk_says_which_command_continues(tmp_path, file_size_limit, over, again):
    with pytest.raises(UserError, match=again):
        checkpoint.save(
            tmp_path / "last.pt", {"config": {"run": {"overwrite": over}}, "model": torch.randn(100_000)}
        )


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "last.pt", {})


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from train import checkpoint
step = 0
while True:
    step += 1
    state = {"config": {}, "classes": [], "step": step, "model": torch.full((2_000_000,), float(step))}
    checkpoint.save(Path(sys.argv[1]), state)
    print(step, flush=True)
"""


def test_kill_during_saving_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    leftovers = 0
    for attempt in range(20):  # three kills, or more until one of them fell into a save
        if attempt >= 3 and leftovers:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        said = int(process.stdout.readline())
        # Most of a save's time is writing, so a kill at a time of no meaning is a kill inside a save.
        time.sleep(0.05 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        said = ([said] + [int(line) for line in process.stdout])[-1]
        process.wait()
        state = checkpoint.load(path)
        assert state["step"] in (said, said + 1)
        assert torch.equal(state["model"], torch.full((2_000_000,), float(state["step"])))
        leftovers += len(list(tmp_path.glob("*.tmp")))
        checkpoint.remove_leftovers(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert leftovers, "no kill fell into a save: the test shows nothing"


def test_unreadable_checkpoints_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match=r"last.pt: no such checkpoint"):
        checkpoint.load(path)
    for junk in (b"", b"junk", b"no checkpoint at all", bytes(1000), b"\x80\x02}q\x00."):
        path.write_bytes(junk)
        with pytest.raises(UserError, match=r"last.pt: not a readable checkpoint"):
            checkpoint.load(path)
    for text in ("hello", "junk", "step 3\n"):
        path.write_text(text)
        with pytest.raises(
            UserError, match="readable checkpoint: it is damaged, or no file that torch.save wrote$"
        ):
            checkpoint.load(path)
    checkpoint.save(path, {"model": torch.randn(10_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"last.pt: not a readable checkpoint"):
        checkpoint.load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match=r"last.pt: not a checkpoint of this version of the trainer"):
        checkpoint.load(path)


class Planted:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"format": checkpoint.FORMAT, "model": Planted()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_of_another_model_names_keys_and_shapes():
    config, saved = Config(), to_dict(Config())
    saved["model"]["name"], saved["data"]["classes"] = "depict_sa_vit_tiny", "my_classes.csv"
    weights = nn.Linear(4, 12).state_dict()
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(nn.Linear(4, 150), weights, Path("runs/x/best.pt"), saved, config)
    for word in (
        "runs/x/best.pt: checkpoint of another model",
        "model.name: depict_sa_vit_tiny in the checkpoint, depict_sa_vit_small now",
        "data.classes: my_classes.csv in the checkpoint, ade20k now",
        "weight has shape (12, 4), this model's (150, 4)",
        "and 1 more",
    ):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("own", "theirs", "word"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), "bias is missing"),
        (nn.Linear(2, 2, bias=False), nn.Linear(2, 2), "bias is not part of this model"),
    ],
    ids=["missing", "superfluous"],
)
def test_loading_is_strict(own, theirs, word):
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with pytest.raises(UserError, match=word):
        checkpoint.load_weights(own, theirs.state_dict(), Path("a.pt"), to_dict(Config()), Config())
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"weight": torch.zeros(100_000)}})
    whole = bytearray(path.read_bytes())
    at = len(whole) // 2  # among the zeros
    whole[at] ^= 0x10
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)["model"]["weight"].count_nonzero() == 1  # torch alone takes it
    with pytest.raises(UserError, match=r"last\.pt: is damaged: the checksum"):
        checkpoint.load(path)
