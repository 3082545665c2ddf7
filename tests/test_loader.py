"""The order of the samples, what a resume and several ranks see, and errors that cross process boundaries."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from train import checkpoint, run
from train.ade20k import SegmentationFolder, load_classes
from train.errors import UserError
from train.loader import (
    MOST_WORKERS,
    SampleOrder,
    dead_worker,
    to_device,
    too_many_workers,
    train_loader,
    worker_count,
)
from train.transforms import PARAMS, TrainTransform

COUNT = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    (root / "names.txt").write_text("one\ntwo\nthree\n")
    for i in range(COUNT):
        h, w = 30 + 3 * i, 50 - 4 * i
        for kind, array in (
            ("images", rng.integers(0, 256, (h, w, 3), dtype=np.uint8)),
            ("annotations", rng.integers(0, 4, (h, w), dtype=np.uint8)),
        ):
            folder = root / kind / "training"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{i}.png")
    return root


@pytest.fixture
def folder(root):
    return SegmentationFolder(root, "training", load_classes(root / "names.txt"))


def settings(**changes) -> SimpleNamespace:
    plain = {
        "crop_size": (24, 32),
        "base_size": 32,
        "scale": (0.5, 2.0),
        "max_class_share": 0.75,
        "flip": 0.5,
    }
    plain |= {"photometric_distortion": True, "batch_size": 4, "workers": 0}
    return SimpleNamespace(**{**plain, **changes})


def take(folder, count, data=None, **options) -> list[dict]:
    loader = train_loader(folder, data or settings(), seed=5, **options)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def same(a: dict, b: dict) -> bool:
    """Whether two batches agree in every bit."""
    return all(torch.equal(a[k], b[k]) for k in ("image", "target", "index")) and all(
        torch.equal(a["params"][k], b["params"][k]) for k in PARAMS
    )


def test_every_epoch_is_a_permutation_and_they_differ():
    order = SampleOrder(COUNT, seed=3)
    epochs = [[order[e * COUNT + i] for i in range(COUNT)] for e in range(4)]
    for e, samples in enumerate(epochs):
        assert [epoch for epoch, _ in samples] == [e] * COUNT
        assert sorted(index for _, index in samples) == list(range(COUNT))
    assert len({tuple(i for _, i in samples) for samples in epochs}) == 4
    assert SampleOrder(COUNT, seed=4).batch(0, COUNT) != epochs[0]
    backwards = SampleOrder(COUNT, seed=3)  # permutations that were dropped come back the same
    assert [backwards[p] for p in (25, 3, 25, 9)] == [order[p] for p in (25, 3, 25, 9)]


def test_batch_larger_than_the_data_set_goes_through_epochs():
    order = SampleOrder(3, seed=0)
    batch = order.batch(1, 8)  # positions 8..15: the end of epoch 2, epochs 3 and 4, the start of epoch 5
    assert [epoch for epoch, _ in batch] == [2, 3, 3, 3, 4, 4, 4, 5]


def test_batch_equals_the_transform_of_its_samples(folder):
    batch = take(folder, 3)[2]
    transform = TrainTransform((24, 32), 32)
    for place, (epoch, index) in enumerate(SampleOrder(COUNT, 5).batch(2, 4)):
        image, target = folder.decode(index)
        out, labels = torch.empty(3, 24, 32, dtype=torch.uint8), torch.empty(24, 32, dtype=torch.uint8)
        params = transform(image, target, np.random.default_rng([5, epoch, index, 1]), out, labels)
        assert batch["index"][place] == index
        assert torch.equal(batch["image"][place], out) and torch.equal(batch["target"][place], labels)
        for name in PARAMS:
            assert batch["params"][name][place].tolist() == pytest.approx(
                list(params[name]) if name == "valid" else params[name]
            )
    assert batch["image"].dtype == batch["target"].dtype == torch.uint8


def test_a_sample_differs_from_epoch_to_epoch(folder):
    batches = take(folder, 8, settings(batch_size=COUNT))
    first = [next(b["image"][i] for i in range(COUNT) if b["index"][i] == 0) for b in batches]
    assert len({image.numpy().tobytes() for image in first}) == 8


def test_resume_goes_on_exactly(folder):
    whole = take(folder, 6)
    for start in (1, 4):
        resumed = take(folder, 6 - start, start_step=start)
        assert all(same(a, b) for a, b in zip(whole[start:], resumed))
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    plain, parallel = take(folder, 6), take(folder, 6, settings(workers=workers))
    assert all(same(a, b) for a, b in zip(plain, parallel))


@pytest.mark.parametrize(
    ("workers", "cores", "processes", "expected", "too_many"),
    [
        (None, 2, 1, 2, False),
        (None, 64, 1, MOST_WORKERS, False),
        (None, 16, 8, 2, False),
        (None, 4, 8, 1, False),  # at least one, which nobody asked for: nothing to say
        (2, 2, 1, 2, False),
        (3, 2, 1, 3, True),
        (3, 16, 8, 3, True),
        (0, 1, 1, 0, False),
    ],
)
def test_number_of_workers(monkeypatch, workers, cores, processes, expected, too_many):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count(workers) == expected
    note = too_many_workers(workers)
    assert (note is not None) == too_many
    assert note is None or f"{expected * processes} loader processes share {cores} cores" in note


def test_torch_does_not_warn_of_workers_too(folder, monkeypatch, recwarn):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    take(folder, 1, settings(workers=2))
    assert not [w for w in recwarn if "worker" in str(w.message)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_global_batch(folder, world_size):
    whole = take(folder, 5)
    parts = [take(folder, 5, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(whole):
        joined = {k: torch.cat([part[step][k] for part in parts]) for k in ("image", "target", "index")}
        joined["params"] = {k: torch.cat([part[step]["params"][k] for part in parts]) for k in PARAMS}
        assert same(batch, joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(folder, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(folder, 3, settings(workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_is_one_clear_error(root, tmp_path, workers):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
        target = tmp_path / kind / "training"
        target.mkdir()
        for path in (root / kind / "training").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "images" / "training" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    folder = SegmentationFolder(tmp_path, "training", load_classes(root / "names.txt"))
    with pytest.raises(UserError) as error:
        take(folder, 3, settings(workers=workers))
    assert "3.png: cannot be read" in str(error.value) and "\n" not in str(error.value)


class DyingFolder(SegmentationFolder):
    """Stands for the system killing a worker that took too much memory."""

    def arrays(self, i):
        if torch.utils.data.get_worker_info() is not None:
            import os

            os._exit(9)
        return super().arrays(i)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch mourns it once more
def test_worker_that_dies_is_reported(root):
    folder = DyingFolder(root, "training", load_classes(root / "names.txt"))
    with pytest.raises(UserError, match=r"a data worker died .*data\.workers"):
        take(folder, 1, settings(workers=1))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_the_broken_line_to_a_worker_is_reported(folder, error, monkeypatch):
    def fetch(*_):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fetch)
    with pytest.raises(UserError, match=r"a data worker died \((\[Errno 104|EOFError).*data\.workers"):
        take(folder, 1)


def test_a_worker_that_dies_while_a_checkpoint_is_written(tmp_path, monkeypatch, capsys):
    """torch's handler of SIGCHLD raises wherever the main process is: one line, and the checkpoint before stays."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    before = path.read_bytes()

    def raise_it(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    class Slow(torch.nn.Module):
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            return torch.nn.Module, ()

    state = {"weights": torch.zeros(1000), "model": Slow()}
    monkeypatch.setitem(run.COMMANDS, "train", SimpleNamespace(run=lambda _: checkpoint.save(path, state)))
    handler = signal.signal(signal.SIGUSR1, raise_it)
    try:
        assert run.main([]) == 2
    finally:
        signal.signal(signal.SIGUSR1, handler)
    said = capsys.readouterr().err
    assert (
        said.startswith("error: a data worker died (DataLoader worker (pid 7) is killed")
        and said.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    wrapped = RuntimeError("PytorchStreamWriter failed writing file")
    wrapped.__context__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "data.workers" in dead_worker(wrapped) and dead_worker(RuntimeError("a worker's own")) is None


def test_to_device_moves_everything(folder):
    batch = take(folder, 1)[0]
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta and moved["target"].is_meta and moved["params"]["flip"].is_meta
    assert same(to_device(batch, torch.device("cpu")), batch)


def test_wide_targets(tmp_path):
    (tmp_path / "many.txt").write_text("\n".join(f"class {i}" for i in range(600)))
    labels = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) % 601
    for kind, array in (("images", np.zeros((40, 50, 3), np.uint8)), ("annotations", labels)):
        (tmp_path / kind / "training").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / kind / "training" / "a.png")
    folder = SegmentationFolder(tmp_path, "training", load_classes(tmp_path / "many.txt"))
    data = settings(crop_size=(64, 64), base_size=40, scale=(1, 1), batch_size=1)
    batch = take(folder, 1, data)[0]
    assert batch["target"].dtype == torch.int32
    expected = torch.from_numpy(labels.astype(np.int32)) - 1
    expected[expected < 0] = -100
    shift = 64 - 50 if batch["params"]["flip"][0] else 0
    assert torch.equal(batch["target"][0, :40, shift : shift + 50], expected)
    assert (batch["target"][0, 40:] == -100).all()


def test_loader_benchmark_measures_all_ways():
    """The benchmark runs; its ratios are for a quiet machine to judge, and here only have to be on the right side."""
    from benchmarks.bench_loader import ROOT, measure

    if not Path(ROOT).is_dir():
        pytest.skip(f"{ROOT} is not there")
    threads = torch.get_num_threads()
    try:
        ms = measure(ROOT, rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert ms["plain"] > 2 * ms["jpeg"] > 2 * ms["cache"] > 0
