"""The decoded cache: the same samples, rebuilt when it must be, never half written."""

import errno
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from rich.live import _RefreshThread

import train.cache
from train.ade20k import SegmentationFolder, load_classes
from train.cache import DecodedCache
from train.errors import UserError

CLASSES = 3


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for i in range(4):
        h, w = 9 + i, 13 - 2 * i
        for kind, array in (
            ("images", rng.integers(0, 256, (h, w, 3), dtype=np.uint8)),
            ("annotations", rng.integers(0, CLASSES + 1, (h, w), dtype=np.uint8)),
        ):
            (root / kind / "training").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / "training" / f"{i}.png")
    (root / "names.txt").write_text("one\ntwo\nthree\n")
    return root


def open_folder(root, cache=None, **options):
    return SegmentationFolder(root, "training", load_classes(root / "names.txt"), cache=cache, **options)


def cache_of(folder: SegmentationFolder) -> DecodedCache:
    return folder._cache


@pytest.fixture
def builds(monkeypatch):
    """Counts the builds."""
    done = []
    build = train.cache._build
    monkeypatch.setattr(train.cache, "_build", lambda *args: (done.append(args[0]), build(*args)))
    return done


def assert_same_samples(cached: SegmentationFolder, plain: SegmentationFolder) -> None:
    for i in range(len(plain)):
        for a, b in zip(cached.arrays(i), plain.decode(i)):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(cached.read(i), plain.read(i)):
            assert torch.equal(a, b)


def test_cache_gives_the_decoded_samples_and_is_built_once(root, tmp_path, builds):
    for _ in range(3):
        assert_same_samples(open_folder(root, tmp_path / "cache"), open_folder(root))
    assert len(builds) == 1
    assert not list((tmp_path / "cache").glob("*.building"))


def test_reading_does_not_decode(root, tmp_path):
    folder = open_folder(root, tmp_path / "cache")
    expected = [folder.decode(i) for i in range(len(folder))]
    for path in (root / "images" / "training").iterdir():
        path.write_bytes(b"")
    for i, (image, target) in enumerate(expected):
        assert np.array_equal(folder.arrays(i)[0], image) and np.array_equal(folder.arrays(i)[1], target)


def test_read_gives_writable_tensors_that_leave_the_file_alone(root, tmp_path):
    folder = open_folder(root, tmp_path / "cache")
    image, target = folder.read(0)
    image.zero_(), target.zero_()
    assert_same_samples(folder, open_folder(root))


def test_wide_targets(root, tmp_path):
    (root / "names.txt").write_text("\n".join(f"class {i}" for i in range(300)))
    folder = open_folder(root, tmp_path / "cache")
    assert folder.read(0)[1].dtype == torch.int32
    assert_same_samples(folder, open_folder(root))


@pytest.mark.parametrize("change", ["content", "touched", "added", "renamed", "annotation"])
def test_changed_sources_rebuild(root, tmp_path, builds, change):
    open_folder(root, tmp_path / "cache")
    images, annotations = root / "images" / "training", root / "annotations" / "training"
    if change == "content":
        Image.fromarray(np.full((9, 13, 3), 7, np.uint8)).save(images / "0.png")
    elif change == "touched":
        os.utime(images / "1.png", ns=(0, 12345))
    elif change == "annotation":
        Image.fromarray(np.full((9, 13), 2, np.uint8)).save(annotations / "0.png")
    else:
        for folder in (images, annotations):
            if change == "added":
                shutil.copy2(folder / "0.png", folder / "9.png")
            else:
                (folder / "0.png").rename(folder / "9.png")
    assert_same_samples(open_folder(root, tmp_path / "cache"), open_folder(root))
    assert len(builds) == 2


def test_settings_that_change_a_sample_have_their_own_cache(root, tmp_path, builds):
    open_folder(root, tmp_path / "cache")
    (root / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    for reduce in (True, False):
        folder = open_folder(root, tmp_path / "cache", reduce_zero_label=reduce)
        assert_same_samples(folder, open_folder(root, reduce_zero_label=reduce))
    assert len(set(builds)) == 3


@pytest.mark.parametrize("damage", ["data shorter", "data gone", "index", "meta", "meta gone"])
def test_cache_that_is_not_whole_is_rebuilt(root, tmp_path, builds, damage):
    path = cache_of(open_folder(root, tmp_path / "cache")).path
    file = {"data": "data.bin", "inde": "index.npy", "meta": "meta.json"}[damage[:4]]
    if "gone" in damage:
        (path / file).unlink()
    elif damage == "index":
        data = bytearray((path / file).read_bytes())
        data[-9] ^= 1
        (path / file).write_bytes(data)
    else:
        (path / file).write_bytes((path / file).read_bytes()[:-1])
    assert_same_samples(open_folder(root, tmp_path / "cache"), open_folder(root))
    assert len(builds) == 2


def test_damaged_pixels_are_noticed(root, tmp_path):
    path = cache_of(open_folder(root, tmp_path / "cache")).path
    with open(path / "data.bin", "r+b") as file:
        file.seek(2)
        byte = file.read(1)
        file.seek(2)
        file.write(bytes([byte[0] ^ 1]))
    folder = open_folder(root, tmp_path / "cache")
    folder.read(1)
    with pytest.raises(
        UserError, match=r"data\.bin: sample 0 is damaged \(checksum\); delete .*to build it again"
    ):
        folder.read(0)


def test_bad_source_is_named_and_leaves_no_cache(root, tmp_path):
    bad = root / "annotations" / "training" / "2.png"
    Image.fromarray(np.full((11, 9), 99, np.uint8)).save(bad)
    with pytest.raises(UserError, match=r"2\.png: label 99 on 99 pixels"):
        open_folder(root, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_truncated_source_is_named(root, tmp_path):
    bad = root / "images" / "training" / "2.png"
    bad.write_bytes(bad.read_bytes()[:10])
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        open_folder(root, tmp_path / "cache")


def test_disk_without_room_is_told_before_building(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"data\.cache .*training split needs \d\.\d kB, 0 bytes are free"):
        open_folder(root, tmp_path / "cache")


def test_disk_that_fills_up_while_building(root, tmp_path, monkeypatch):
    folder = open_folder(root)

    class Full:
        def __init__(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = train.cache._Written.__getitem__

    def failing(self, i):
        with monkeypatch.context() as patch:
            patch.setattr(train.cache, "open", Full, raising=False)
            return written(self, i)

    monkeypatch.setattr(train.cache._Written, "__getitem__", failing)
    with pytest.raises(UserError, match="no space left on device"):
        DecodedCache.open_or_build(folder, tmp_path / "cache", workers=0, progress=False)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_an_error_ends_the_progress_bar(root, tmp_path):
    image = root / "images" / "training" / "2.png"
    image.write_bytes(image.read_bytes()[:-30])
    # What `caught` keeps holds on to the loop that raised it, and with it to the generator that has the bar.
    with pytest.raises(UserError, match=image.name) as caught:
        DecodedCache.open_or_build(open_folder(root), tmp_path / "cache", workers=0, progress=True)
    assert caught.tb and not [t for t in threading.enumerate() if isinstance(t, _RefreshThread)]


def test_unwritable_folder_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache .*file"):
        open_folder(root, tmp_path / "file" / "cache")


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_cache_that_is_no_folder_is_said_to_be_none(root, tmp_path, kind):
    cache = tmp_path / "cache"
    inside = cache_of(open_folder(root, cache)).path
    for path, words in (
        (inside, r"out of date .*; delete it"),
        (cache, r"a file, or a link .*name a folder"),
    ):
        shutil.rmtree(path)
        path.touch() if kind == "file" else path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"data\\.cache {path}: is {words}"):
            open_folder(root, cache)
        path.unlink()
        cache.mkdir(exist_ok=True)


def test_a_whole_cache_is_read_without_writing(root, tmp_path, monkeypatch):
    open_folder(root, tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob("*.lock")
    lock.unlink()
    lock.mkdir()  # as little to be opened for writing as on a file system for reading
    assert_same_samples(open_folder(root, tmp_path / "cache"), open_folder(root))


def test_interrupted_build_is_no_cache(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            open_folder(root, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert_same_samples(open_folder(root, tmp_path / "cache"), open_folder(root))


def test_several_at_once_build_one(root, tmp_path, builds):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: open_folder(root, tmp_path / "cache"), range(4)))
    assert len(builds) == 1
    for folder in folders:
        assert_same_samples(folder, open_folder(root))


def test_travels_to_other_processes_by_name(root, tmp_path):
    folder = open_folder(root, tmp_path / "cache")
    folder.read(0)
    sent = pickle.dumps(folder)
    assert len(sent) < 20_000  # not the data
    assert_same_samples(pickle.loads(sent), open_folder(root))


def test_worker_processes_read_it(root, tmp_path):
    folder = open_folder(root, tmp_path / "cache")
    loader = torch.utils.data.DataLoader(Reader(folder), batch_size=None, num_workers=2)
    for i, (image, target) in enumerate(loader):
        plain = open_folder(root).read(i)
        assert torch.equal(image, plain[0]) and torch.equal(target, plain[1])
    assert i == len(folder) - 1


class Reader(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, i):
        return self.folder.read(i)
