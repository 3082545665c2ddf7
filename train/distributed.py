"""One process, or many started by ``torchrun`` on one machine or several.

Everything is read from the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT). CPU tensors travel over gloo, CUDA tensors over NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def start(device: str) -> World:
    """Joins the other processes, if there are any, and chooses the device.

    A process that waits longer than ten minutes for the others fails instead of hanging; under torchrun it is
    stopped within seconds after another one failed. Raises ``UserError`` for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank, size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(chosen)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    return World(chosen, rank, size)


def processes_here() -> int:
    """How many of the processes share this machine and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sums ``tensor`` in place over all processes, and returns it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(world: World, value: Any) -> list[Any]:
    """Every process's ``value`` in the order of ranks, on every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def on_main(world: World, function: Callable[[], T]) -> T:
    """Runs ``function`` on the main process; all wait and get its result, or all raise its ``UserError``."""
    if world.size == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if world.main:
        try:
            outcome[0] = function()
        except Exception as error:  # told to the others first: they would wait for a process that is gone
            failure = error
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _device(name: str, local_rank: int, size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device: {name!r} is not known; auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if device.index is None or size > 1 else device.index
    if index >= count:
        raise UserError(
            f"train.device: cuda:{index} is not there ({count} CUDA devices); use --train.device cpu"
        )
    return torch.device("cuda", index)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether ``error`` is torch.distributed noticing that another process went away or does not answer."""
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        return False
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out", "tcpstore")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
