"""Decoded copies of a split on disk, memory-mapped: reading one costs a page fault instead of a decoder.

    <cache>/<split>-<key>/data.bin      images (H, W, 3) uint8 and targets (H, W), one after the other
                          index.npy     one row per sample: where it lies, its size, checksum, and its source
                          meta.json     version, settings, checksum of the index

The key names the data set and all that changes a decoded sample (class count, label mapping). A cache whose
sources have another name, size or time of change, or whose files are not whole, is built again. Building
happens in a folder of another name that is renamed when everything is written, flushed and read back, under
a lock: of several processes one builds and the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.filesize import decimal as size_text

from train.ade20k import UNREADABLE, SegmentationFolder, each_sample
from train.errors import UserError

VERSION = 2  # 16-bit grey images are scaled to 8 bits since
ROW = np.dtype(
    [
        ("offset", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("checksum", np.uint32),
        ("image_size", np.int64),
        ("image_time", np.int64),
        ("annotation_size", np.int64),
        ("annotation_time", np.int64),
    ]
)
SOURCE = list(ROW.names[4:])


class DecodedCache:
    """Samples of one split, by number; opened by every process that reads, copies travel to workers unopened."""

    def __init__(self, path: Path, index: np.ndarray, target_type: np.dtype):
        self.path, self.index, self.target_type = path, index, np.dtype(target_type)
        self._data: np.ndarray | None = None
        self._checked = np.zeros(len(index), dtype=bool)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_data": None}

    @classmethod
    def open_or_build(
        cls, folder: SegmentationFolder, root: str | Path, workers: int | None = None, progress=True
    ):
        """Opens the cache of `folder` below `root`, building it where it is missing or out of date.

        Args:
            folder: the split (its ``decode`` supplies the samples).
            root: folder of all caches.
            workers: processes that decode; None takes one per core.
            progress: whether to show a progress bar while building.

        Raises:
            UserError: a bad source file, a disk without room, a folder that cannot be written.
        """
        path = Path(root) / f"{folder.split}-{_key(folder)}"
        sources = _sources(folder)
        # Without the lock, which a file system for reading does not give.
        cache = cls._open(path, folder, sources)
        if cache is not None:
            return cache
        if os.path.lexists(root) and not os.path.isdir(root):
            raise UserError(f"data.cache {root}: is a file, or a link to nothing; name a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path.with_name(path.name + ".lock")):
                cache = cls._open(path, folder, sources)
                if cache is None:
                    _build(path, folder, sources, workers, progress)
                    cache = cls._open(path, folder, sources)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"data.cache {root}: no space left on the disk while writing {path}"
                ) from None
            raise UserError(
                f"data.cache {root}: {error.strerror or error} ({error.filename or path})"
            ) from None
        if cache is None:
            raise UserError(
                f"data.cache {path}: was built and cannot be read back; is something else writing there?"
            )
        return cache

    @classmethod
    def _open(cls, path: Path, folder: SegmentationFolder, sources: np.ndarray) -> DecodedCache | None:
        """The cache at `path` if it is whole and belongs to these sources, else None."""
        try:
            meta = json.loads((path / "meta.json").read_text())
            raw = (path / "index.npy").read_bytes()
            if meta != _meta(folder, raw):
                return None
            index = np.load(path / "index.npy")
            size = (path / "data.bin").stat().st_size
        except (OSError, ValueError):
            return None
        target_type = np.dtype(np.int32 if folder.num_classes > 255 else np.uint8)
        if index.dtype != ROW or len(index) != len(folder) or (index[SOURCE] != sources).any():
            return None
        return cls(path, index, target_type) if size == _ends(index, target_type)[-1] else None

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 and target (H, W), read-only views of the file.

        Each process checks a sample's checksum when it first reads it. Raises UserError where it is wrong.
        """
        if self._data is None:
            self._data = np.memmap(self.path / "data.bin", dtype=np.uint8, mode="r")
        row = self.index[i]
        h, w, start = int(row["height"]), int(row["width"]), int(row["offset"])
        middle, end = start + 3 * h * w, start + (3 + self.target_type.itemsize) * h * w
        if not self._checked[i]:
            if zlib.crc32(self._data[start:end]) != row["checksum"]:
                raise UserError(
                    f"{self.path / 'data.bin'}: sample {i} is damaged (checksum); delete {self.path} to build it again"
                )
            self._checked[i] = True
        image = self._data[start:middle].reshape(h, w, 3)
        return image, self._data[middle:end].view(self.target_type).reshape(h, w)


def _key(folder: SegmentationFolder) -> str:
    text = f"{folder.root.resolve()}\n{folder.num_classes}\n{folder.reduce_zero_label}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _meta(folder: SegmentationFolder, index: bytes) -> dict:
    names = hashlib.sha256("\n".join(folder.names).encode()).hexdigest()
    return {
        "version": VERSION,
        "root": str(folder.root.resolve()),
        "split": folder.split,
        "num_classes": folder.num_classes,
        "reduce_zero_label": folder.reduce_zero_label,
        "names": names,
        "index": zlib.crc32(index),
    }


def _sources(folder: SegmentationFolder) -> np.ndarray:
    """(N,) rows: size in bytes and time of change of each image and annotation."""
    rows = np.zeros(len(folder), dtype=[(name, np.int64) for name in SOURCE])
    for i in range(len(folder)):
        image, annotation = folder.image_path(i).stat(), folder.annotation_path(i).stat()
        rows[i] = (image.st_size, image.st_mtime_ns, annotation.st_size, annotation.st_mtime_ns)
    return rows


def _ends(index: np.ndarray, target_type: np.dtype) -> np.ndarray:
    """(N,) end of each sample in data.bin."""
    sizes = index["height"].astype(np.int64) * index["width"] * (3 + target_type.itemsize)
    return index["offset"] + sizes


class _Written(torch.utils.data.Dataset):
    """Decodes sample i into its place in the file; value: its checksum, or a UserError."""

    def __init__(self, folder: SegmentationFolder, file: Path, index: np.ndarray):
        self.folder, self.file, self.index = folder, file, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> int | UserError:
        try:
            image, target = self.folder.decode(i)
            row = self.index[i]
            if image.shape[:2] != (row["height"], row["width"]):
                raise UserError(f"{self.folder.image_path(i)}: changed while its cache was being built")
            data = image.tobytes() + target.tobytes()
            # Not through the memory map: a full disk would then kill the process instead of raising.
            with open(self.file, "r+b", buffering=0) as file:
                file.seek(int(row["offset"]))
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            return zlib.crc32(data)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"data.cache {self.file}: {(error.strerror or str(error)).lower()}")


def _build(
    path: Path, folder: SegmentationFolder, sources: np.ndarray, workers: int | None, progress: bool
) -> None:
    target_type = np.dtype(np.int32 if folder.num_classes > 255 else np.uint8)
    index = np.zeros(len(folder), dtype=ROW)
    for name in SOURCE:
        index[name] = sources[name]
    end = 0
    for i in range(len(folder)):
        try:
            with Image.open(folder.image_path(i), formats=["JPEG", "PNG"]) as image:  # the heading alone
                index[i]["width"], index[i]["height"] = image.size
        except UNREADABLE:
            folder.decode(i)  # names what is wrong with it
            raise
        index[i]["offset"] = end
        end = int(_ends(index[i : i + 1], target_type)[0])

    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        raise UserError(f"data.cache {path}: is out of date and cannot be replaced by a folder; delete it")
    free = shutil.disk_usage(path.parent).free
    if end > free:
        raise UserError(
            f"data.cache {path.parent}: the decoded {folder.split} split needs {size_text(end)}, "
            f"{size_text(free)} are free"
        )
    building = path.with_name(path.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        file = building / "data.bin"
        with open(file, "wb") as whole:
            whole.truncate(end)
        samples = each_sample(_Written(folder, file, index), workers, f"caching {folder.split}", progress)
        with contextlib.closing(samples):  # an error ends the progress bar before it is printed
            for i, checksum in enumerate(samples):
                if isinstance(checksum, UserError):
                    raise checksum
                index[i]["checksum"] = checksum
        with open(file, "r+b") as whole:
            os.fsync(whole.fileno())
        written = DecodedCache(building, index, target_type)
        for i in range(len(index)):
            written.read(i)
        np.save(building / "index.npy", index)
        meta = _meta(folder, (building / "index.npy").read_bytes())
        with open(building / "meta.json", "w") as whole:
            json.dump(meta, whole, indent=1)
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, where the system has them; it goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
