"""Batches for training: which samples, in which order, cut by worker processes, the same after any resume.

The stream of samples is one permutation of the data set per epoch, one after the other; global batch g is
its part g * B .. (g + 1) * B - 1, so that a data set smaller than a batch works too and nothing is dropped.
Rank r of R takes the r-th of R equal slices. All that is random about a sample follows from (seed, epoch,
index), never from the rank or the worker: two ranks with half the batch each see what one rank would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from train.ade20k import SegmentationFolder, as_it_is, usable_cores
from train.distributed import processes_here
from train.errors import UserError, first_line
from train.transforms import TrainTransform

# That are started unasked: some 2,500 crops of 512 x 512 a second (benchmarks/bench_loader.py).
MOST_WORKERS = 8


def worker_count(workers: int | None) -> int:
    """``data.workers``; for null one per core that this process may use, its share where several train here."""
    if workers is not None:
        return workers
    return max(1, min(MOST_WORKERS, usable_cores() // processes_here()))


def too_many_workers(workers: int | None) -> str | None:
    """What to say where ``data.workers`` asks for more loader processes on this machine than there are cores."""
    count, cores = worker_count(workers) * processes_here(), usable_cores()
    if workers is None or count <= cores:
        return None
    return (
        f"data.workers: {count} loader processes share {cores} cores, as asked; more than cores seldom help"
    )


class SampleOrder:
    """Sample (epoch, index) at any position of the endless stream."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.size)
        if epoch not in self._permutations:
            # A batch touches at most a few epochs; more than the last ones would only grow.
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return epoch, int(self._permutations[epoch][offset])

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of global batch `step`."""
        return [self[position] for position in range(step * batch_size, (step + 1) * batch_size)]


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of everything random about one sample in one epoch."""
    return np.random.default_rng([seed, epoch, index, 1])  # the 1 keeps it apart from the permutations


class _Steps(torch.utils.data.Sampler):
    """Endless: the samples of one rank for step start, start + 1, ..."""

    def __init__(self, order: SampleOrder, batch_size: int, rank: int, world_size: int, start: int):
        self.order, self.batch_size, self.start = order, batch_size, start
        share = batch_size // world_size
        self.slice = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            yield self.order.batch(step, self.batch_size)[self.slice]
            step += 1


class TrainBatches(torch.utils.data.Dataset):
    """Key: a list of (epoch, index). Value: the batch that ``train_loader`` describes, or a UserError."""

    def __init__(self, folder: SegmentationFolder, transform: TrainTransform, seed: int):
        self.folder, self.transform, self.seed = folder, transform, seed

    def __getitem__(self, samples: list[tuple[int, int]]) -> dict[str, Any] | UserError:
        count, (h, w) = len(samples), self.transform.crop_size
        wide = self.folder.num_classes > 255
        # Rows of RGB, as images are decoded and resized; the batch shows them as (b, 3, h, w).
        images = torch.empty(count, h, w, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        targets = torch.empty(count, h, w, dtype=torch.int32 if wide else torch.uint8)
        drawn = []
        try:
            for place, (epoch, index) in enumerate(samples):
                image, target = self.folder.arrays(index)
                rng = sample_rng(self.seed, epoch, index)
                drawn.append(self.transform(image, target, rng, images[place], targets[place]))
        except UserError as error:
            return error  # raised by the main process: a worker's traceback would bury the message
        params = {name: torch.tensor([d[name] for d in drawn]) for name in drawn[0]}
        index = torch.tensor([index for _, index in samples])
        return {"image": images, "target": targets, "params": params, "index": index}


def train_loader(
    folder: SegmentationFolder,
    data: Any,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Endless batches of a data set, from global batch `start_step` on.

    Args:
        folder: the training split.
        data: the data section of the configuration: crop_size, base_size, scale, max_class_share, flip,
            photometric_distortion, batch_size (global), workers (as ``worker_count`` takes it).
        seed: of the order and the augmentation.
        rank, world_size: which slice of each global batch.
        start_step: number of the first global batch; a resumed run goes on exactly.
        pin_memory: page-locked batches, for copies to a GPU that do not block.

    Yields:
        "image" (b, 3, h, w) uint8 and "target" (b, h, w) uint8 (int32 above 255 classes), not yet flipped;
        "params": what ``DeviceAugment`` applies, a (b,) tensor per name ("valid" is (b, 2): the height and
        width that the image fills); "index": (b,) int64 sample numbers.

    Raises:
        UserError: a bad file, or a worker that died.
    """
    transform = TrainTransform(
        crop_size=tuple(data.crop_size),
        base_size=data.base_size,
        scale=tuple(data.scale),
        max_class_share=data.max_class_share,
        flip=data.flip,
        photometric_distortion=data.photometric_distortion,
        ignore_index=folder.ignore_index,
    )
    workers = worker_count(data.workers)
    loader = _Loader(
        TrainBatches(folder, transform, seed),
        sampler=_Steps(SampleOrder(len(folder), seed), data.batch_size, rank, world_size, start_step),
        batch_size=None,  # a key is a batch already
        collate_fn=as_it_is,
        num_workers=workers,
        # Forked workers start at once, and notice when a kill takes their parent: a server's would live on.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader would draw from the global one, which a resume restores
    )
    return _raise_errors(loader)


class _Loader(torch.utils.data.DataLoader):
    def check_worker_number_rationality(self) -> None:
        """torch's warning of more workers than cores; the run says it in its own words, once: too_many_workers."""


def _raise_errors(loader: torch.utils.data.DataLoader) -> Iterator[dict[str, Any]]:
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:  # of the socket or pipe to a worker: what it holds is gone
        raise UserError(_WORKER_DIED.format(first_line(error))) from error
    except RuntimeError as error:
        if message := dead_worker(error):
            raise UserError(message) from error
        raise


_WORKER_DIED = (
    "a data worker died ({}); it may have run out of memory: lower --data.workers (0 loads in the training process) "
    "or enlarge /dev/shm"
)


def dead_worker(error: BaseException | None) -> str | None:
    """What to say where ``error`` comes from the death of a loader process, else None.

    torch's signal handler raises its error wherever the main process happens to be, so that it may be wrapped in one
    of those whose work it ended.
    """
    while error is not None:
        # "in DataLoader worker process 0" is an error of the data set
        if "DataLoader worker (pid" in str(error):
            return _WORKER_DIED.format(first_line(error))
        error = error.__context__
    return None


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies a batch to the device, without waiting where its memory is pinned."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "params"}
    moved["params"] = {k: v.to(device, non_blocking=True) for k, v in batch["params"].items()}
    return moved
