"""Inference as CUDA graphs: one launch for a whole model, for small batches that launches would bound.

A graph has its addresses and sizes baked in. :func:`predict` therefore keeps one per shape and setting, copies the
images to where the graph reads them and the labels from where it writes them, and drops all graphs of a model in
which a tensor or a module was replaced. Values are no part of a graph: an optimizer step or ``load_state_dict``
in place shows in the next replay.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from depict_kernels import backends

CAPACITY = 8
"""Graphs kept per model; beyond that the one that was not used for longest goes."""

# Runs before a capture: kernels are compiled, libraries choose algorithms and get their workspaces.
WARM_UP = 2


class Recording:
    """``run`` on images of one shape, captured; a call replays it on new images of that shape."""

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor, pool: object) -> None:
        # An inference tensor could not be written to by a later call outside of inference mode.
        with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache():
            self.images = torch.empty_like(images, memory_format=torch.contiguous_format)
            self.images.copy_(images)
            stream = _capture_stream(images.device)
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        run(self.images)
            finally:  # the images are freed where a run raises
                torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on, a data loader's that pins memory among them.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.labels = run(self.images)

    def __call__(self, images: Tensor) -> Tensor:
        self.images.record_stream(torch.cuda.current_stream())
        self.images.copy_(images)
        self.graph.replay()
        return self.labels.clone()


_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
# Of the whole process: torch allows one capture at a time, and graphs captured on one stream share cuBLAS's workspace,
# those of different models too, so that a replay waits for the one before, whatever its stream. Reentrant, since a
# model may ask another one in a hook.
_lock = threading.RLock()
_last: dict[torch.device, torch.cuda.Event] = {}


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Graphs share the memory of their pool only where they were captured on one stream."""
    if device not in _capture_streams:
        _capture_streams[device] = torch.cuda.Stream(device)
    return _capture_streams[device]


def _autocast_without_cache() -> contextlib.AbstractContextManager:
    """Autocast as it is, but the weights' casts belong to the graph: cached ones die with the caller's context."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


class Snapshot:
    """The tensors and modules of a model in evaluation mode that its graphs were captured with."""

    def __init__(self, model: nn.Module) -> None:
        if any(module.training for module in model.modules()):
            raise ValueError("cuda_graph=True takes a model in evaluation mode: call model.eval() first")
        # The model itself must not be held: its graphs are to die with it.
        registries = [r for m in model.modules() for r in (m._parameters, m._buffers, m._modules)]
        self.sizes = [(registry, len(registry)) for registry in registries]
        members = [(r, name, value) for r in registries for name, value in r.items()]
        self.nothing = [(registry, name) for registry, name, value in members if value is None]
        self.tensors = [
            (registry, name, value, _address(model, value), value.dtype)
            for registry, name, value in members
            if isinstance(value, Tensor)
        ]
        self.modules = [member for member in members if isinstance(member[2], nn.Module)]

    def holds(self) -> bool:
        for registry, size in self.sizes:
            if len(registry) != size:
                return False
        for registry, name in self.nothing:
            if registry.get(name) is not None:
                return False
        for registry, name, child in self.modules:
            if registry.get(name) is not child or child.training:
                return False
        for registry, name, tensor, address, dtype in self.tensors:
            if registry.get(name) is not tensor or tensor.data_ptr() != address or tensor.dtype != dtype:
                return False
        return True


def _address(model: nn.Module, tensor: Tensor) -> int:
    """Where a graph reads the tensor. Raises ValueError for one without memory of its own."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0
    if address == 0 and tensor.numel() > 0:
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        name = next(name for name, value in named if value is tensor)
        raise ValueError(
            f"cuda_graph=True needs to know where tensors lie, and {name} is a {type(tensor).__name__} without memory "
            "of its own; leave it False"
        )
    return address


class GraphCache:
    """The graphs of one model."""

    def __init__(self) -> None:
        self.recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self.snapshot: Snapshot | None = None
        self.pools: dict[torch.device, object] = {}

    def release(self) -> None:
        for event in _last.values():
            event.synchronize()  # a replay may still be running
        self.recordings.clear()
        self.pools.clear()

    def predict(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
        with _lock, torch.cuda.device(images.device):
            if model.training or self.snapshot is None or not self.snapshot.holds():
                self.release()
                self.snapshot = Snapshot(model)
            device = images.device
            if device not in _last:
                _last[device] = torch.cuda.Event()
            torch.cuda.current_stream().wait_event(_last[device])
            # Layers may differ from the decoder, whose backend the model's is.
            layers = tuple(module.__dict__.get("backend") for module in model.decoder.modules())
            key = (images.shape, images.dtype, device, dtype, layers, *_settings())
            recording = self.recordings.get(key)
            if recording is None:
                while len(self.recordings) >= CAPACITY:
                    _last[device].synchronize()
                    self.recordings.popitem(last=False)
                if device not in self.pools:
                    self.pools[device] = torch.cuda.graph_pool_handle()
                recording = Recording(lambda x: model.predict(x, dtype), images, self.pools[device])
                self.recordings[key] = recording
            self.recordings.move_to_end(key)
            labels = recording(images)
            _last[device].record()
            return labels


def _settings() -> tuple:
    """What decides, beside the arguments, which kernels run."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        backends._override,
        autocast,
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(torch._C._get_sdp_priority_order()),
        cudnn.conv.fp32_precision,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


_caches: weakref.WeakKeyDictionary[nn.Module, GraphCache] = weakref.WeakKeyDictionary()


def check_device(images: Tensor) -> None:
    if images.device.type != "cuda":
        raise ValueError(
            f"cuda_graph=True needs model and images on a GPU, these images are on {images.device}; "
            "leave it False there"
        )


def predict(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """``model.predict(images, dtype)`` replayed from a CUDA graph, captured at the first call of a kind.

    Raises ValueError where the images are not on a GPU, the model is in training mode or a tensor of it has no memory
    of its own.
    """
    check_device(images)
    if torch.cuda.is_current_stream_capturing():  # the caller's graph takes it in
        return model.predict(images, dtype)
    return _caches.setdefault(model, GraphCache()).predict(model, images, dtype)


def release(model: nn.Module) -> None:
    """Frees the memory that the model's graphs hold. They are captured again when they are asked for."""
    cache = _caches.pop(model, None)
    if cache is not None:
        with _lock:
            cache.release()
