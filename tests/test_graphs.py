"""Prediction by CUDA graphs: what is captured anew and when, on the CPU with a recording that runs the model."""

import copy
import gc
import threading
import time
import weakref

import pytest
import torch
from tiny_inference import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from depict_kernels import use_backend
from depict_kernels.models import graphs


class Fake:
    """In place of a recording: keeps where the weights were, as a graph does, and runs the model on replay."""

    def __init__(self, run, images, pool):
        self.run, self.shape, self.pool = run, images.shape, pool
        Fake.captures.append(images.shape)
        Fake.steps.append("capture")
        run(images)

    def __call__(self, images):
        assert images.shape == self.shape, "a graph replayed on another shape"
        Fake.steps.append("replay")
        return self.run(images)


@pytest.fixture
def captures(monkeypatch):
    """The shapes of the captures so far, in order, with the GPU's parts replaced by stand-ins."""

    class Event:
        record = lambda self: Fake.steps.append("record")
        synchronize = lambda self: Fake.steps.append("synchronize")

    class Stream:
        def wait_event(self, event):
            Fake.steps.append("wait")
            Fake.waits.append(event)

    Fake.captures, Fake.waits, Fake.steps = [], [], []
    monkeypatch.setattr(graphs, "_last", {})
    monkeypatch.setattr(graphs, "Recording", Fake)
    monkeypatch.setattr(graphs, "check_device", lambda images: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Fake.captures


def test_a_shape_is_captured_once_and_labels_are_those_without_a_graph(captures):
    model = tiny()
    for size in ((32, 32), (30, 47), (32, 32), (30, 47)):
        images = torch.randn(2, 3, *size)
        labels = model.predict(images, torch.uint8, cuda_graph=True)
        assert torch.equal(labels, model.predict(images, torch.uint8))
    assert captures == [(2, 3, 32, 32), (2, 3, 30, 47)]


def test_every_setting_has_its_own_graph(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    predict = lambda x=images, **kw: model.predict(x, cuda_graph=True, **kw)
    kinds = [
        lambda: predict(),
        lambda: predict(dtype=torch.int32),
        lambda: predict(images[:, :, :16]),
        lambda: predict(images.expand(2, -1, -1, -1)),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
        with use_backend("reference"):
            predict()
        model.backend = "torch"
        predict()
        model.backend = "auto"
        torch.backends.cuda.matmul.fp32_precision, before = "tf32", torch.backends.cuda.matmul.fp32_precision
        predict()
        torch.backends.cuda.matmul.fp32_precision = before
        torch.use_deterministic_algorithms(True)
        predict()
        torch.use_deterministic_algorithms(False)
    assert len(captures) == len(kinds) + 4
    assert predict(dtype=torch.int32).dtype == torch.int32


def matmul_flag(name):
    return getattr(torch.backends.cuda.matmul, name), lambda value: setattr(
        torch.backends.cuda.matmul, name, value
    )


def cudnn_flag(name):
    return getattr(torch.backends.cudnn, name), lambda value: setattr(torch.backends.cudnn, name, value)


FLAGS = {
    "flash_sdp": lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.enable_flash_sdp),
    "efficient_sdp": lambda: (
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "math_sdp": lambda: (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.enable_math_sdp),
    "cudnn_sdp": lambda: (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.enable_cudnn_sdp),
    "math_sdp_reduction": lambda: (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    "fp16_reduction": lambda: matmul_flag("allow_fp16_reduced_precision_reduction"),
    "bf16_reduction": lambda: matmul_flag("allow_bf16_reduced_precision_reduction"),
    "fp16_accumulation": lambda: matmul_flag("allow_fp16_accumulation"),
    "cudnn": lambda: cudnn_flag("enabled"),
    "cudnn_benchmark": lambda: cudnn_flag("benchmark"),
    "cudnn_deterministic": lambda: cudnn_flag("deterministic"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_torchs_flags_are_settings(flag, captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    model.predict(images, cuda_graph=True)
    before, switch = FLAGS[flag]()
    try:
        switch(not before)
        for _ in range(2):
            model.predict(images, cuda_graph=True)
        assert len(captures) == 2
    finally:
        switch(before)
    model.predict(images, cuda_graph=True)
    assert len(captures) == 2


def test_the_order_of_sdpas_kernels_is_a_setting(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for order in (every, every[::-1], every):
        with sdpa_kernel(order, set_priority=True):
            model.predict(images, cuda_graph=True)
    assert len(captures) == 2


@pytest.mark.parametrize("name", ["depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_a_layers_own_backend_is_a_setting(name, captures):
    model, images = tiny(name), torch.randn(1, 3, 32, 32)
    model.predict(images, cuda_graph=True)
    layers = [m for m in model.decoder.modules() if "backend" in vars(m)]
    for count, layer in enumerate(layers, 2):
        layer.backend = "reference"
        model.predict(images, cuda_graph=True)
        assert len(captures) == count
        layer.backend = "auto"
    model.predict(images, cuda_graph=True)
    assert len(captures) == 1 + len(layers)


@pytest.mark.parametrize("raises", [False, True], ids=["no address", "no data_ptr"])
def test_a_tensor_without_memory_of_its_own_is_refused(raises, captures):
    class Wrapper(torch.Tensor):  # as of quantised weights
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def data_ptr(self):
            if raises:
                raise RuntimeError("cannot access data pointer")
            return super().data_ptr()

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            plain = [a.inner if isinstance(a, Wrapper) else a for a in args]
            out = function(*plain, **(kwargs or {}))
            return Wrapper(out) if function is torch.ops.aten.detach.default else out

    model, images = tiny(), torch.randn(1, 3, 32, 32)
    norm = model.backbone.vit.norm
    norm.weight = torch.nn.Parameter(Wrapper(norm.weight.detach()), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"backbone\.vit\.norm\.weight is a Wrapper without memory of its own"
    ):
        model.predict(images, cuda_graph=True)
    norm.weight = torch.nn.Parameter(norm.weight.inner)
    assert torch.equal(model.predict(images, cuda_graph=True), model.predict(images))


def test_autocast_is_a_setting(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            model.predict(images, cuda_graph=True)
        finally:
            torch.set_autocast_enabled("cuda", False)
    model.predict(images, cuda_graph=True)
    assert len(captures) == 3


def test_new_values_in_place_need_no_new_capture(captures):
    model, other = tiny(), tiny()
    images = torch.randn(1, 3, 32, 32)
    model.predict(images, cuda_graph=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    model.load_state_dict(other.state_dict())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.predict(images, cuda_graph=True), other.predict(images))
    assert len(captures) == 1


def replace_parameter(model):
    name, old = next(iter(model.decoder.named_parameters(recurse=False)), ("", None))
    owner = model.decoder
    if old is None:
        owner = model.backbone.vit.norm
        name, old = "weight", owner.weight
    setattr(owner, name, torch.nn.Parameter(old.detach() + 1))


def assign_state(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def move_data(model):
    model.decoder.requires_grad_(False)
    p = next(model.decoder.parameters())
    p.data = p.data.clone()


def replace_module(model):
    model.backbone.vit.norm = copy.deepcopy(model.backbone.vit.norm)


def remove_module(model):
    model.backbone.vit.norm = torch.nn.Identity().eval()


def add_module(model):
    model.backbone.vit.blocks.append(copy.deepcopy(model.backbone.vit.blocks[0]))


CHANGES = [
    replace_parameter, assign_state, move_data, replace_module, remove_module, add_module,
    lambda m: m.double(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("<>"))
def test_what_moves_a_tensor_drops_all_graphs(captures, change):
    model = tiny()
    images = [torch.randn(1, 3, side, 32) for side in (32, 16)]
    for x in images:
        model.predict(x, cuda_graph=True)
    change(model)
    dtype = next(model.parameters()).dtype
    for x in images * 2:
        labels = model.predict(x.to(dtype), cuda_graph=True)
        assert torch.equal(labels, model.predict(x.to(dtype)))
    assert len(captures) == 4


def test_a_parameter_where_none_was_drops_all_graphs(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    norm = model.backbone.vit.norm
    norm.bias = None
    model.predict(images, cuda_graph=True)
    norm.bias = torch.nn.Parameter(torch.randn_like(norm.weight))
    assert torch.equal(model.predict(images, cuda_graph=True), model.predict(images))
    assert len(captures) == 2


def test_the_least_recently_used_graph_goes(captures):
    model = tiny()
    shapes = [(1, 3, 16 * n, 16) for n in range(1, graphs.CAPACITY + 2)]
    for shape in shapes[:-1]:
        model.predict(torch.randn(shape), cuda_graph=True)
    model.predict(torch.randn(shapes[0]), cuda_graph=True)
    model.predict(torch.randn(shapes[-1]), cuda_graph=True)  # one too many: the second goes
    assert len(graphs._caches[model].recordings) == graphs.CAPACITY
    model.predict(torch.randn(shapes[0]), cuda_graph=True)
    assert captures == shapes
    model.predict(torch.randn(shapes[1]), cuda_graph=True)
    assert captures == [*shapes, shapes[1]]


def test_training_mode_is_refused_and_a_return_to_it_noticed(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model.predict(images, cuda_graph=True)
    model.eval().predict(images, cuda_graph=True)
    model.backbone.vit.blocks[0].train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model.predict(images, cuda_graph=True)
    model.eval().predict(images, cuda_graph=True)
    assert model.train().training  # nothing of it is left over
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model.predict(images, cuda_graph=True)


def test_a_failed_capture_leaves_nothing(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    with pytest.raises(TypeError, match="dtype"):
        model.predict(images, torch.float32, cuda_graph=True)
    model.predict(images, cuda_graph=True)
    assert len(graphs._caches[model].recordings) == 1


def test_release_and_the_models_end_free_the_graphs(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    model.predict(images, cuda_graph=True)
    cache = weakref.ref(graphs._caches[model])
    model.release_cuda_graphs()
    gc.collect()
    assert cache() is None
    model.predict(images, cuda_graph=True)
    assert len(captures) == 2
    cache, alive = weakref.ref(graphs._caches[model]), weakref.ref(model)
    Fake.captures = []
    for recording in graphs._caches[model].recordings.values():
        recording.run = None  # a real recording keeps nothing of the model
    del model, recording
    gc.collect()
    assert alive() is None and cache() is None


def test_a_model_with_graphs_can_be_copied_and_saved(captures, tmp_path):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    expected = model.predict(images, cuda_graph=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin.predict(images, cuda_graph=True), expected)
    torch.save(twin, tmp_path / "model.pt")
    assert len(captures) == 2


def test_threads_share_the_graphs(captures):
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    expected, found = model.predict(images), []
    threads = [
        threading.Thread(target=lambda: found.append(model.predict(images, cuda_graph=True)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captures) == 1 and len(found) == 4 and all(torch.equal(x, expected) for x in found)


def test_replays_wait_for_each_other_and_nothing_goes_while_one_runs(captures):
    model = tiny()
    for n in range(1, graphs.CAPACITY + 1):
        model.predict(torch.randn(1, 3, 16 * n, 16), cuda_graph=True)
    assert Fake.steps == ["wait", "capture", "replay", "record"] * graphs.CAPACITY
    assert len({id(r.pool) for r in graphs._caches[model].recordings.values()}) == 1
    Fake.steps.clear()
    model.predict(torch.randn(1, 3, 16, 32), cuda_graph=True)
    assert Fake.steps == ["wait", "synchronize", "capture", "replay", "record"]
    Fake.steps.clear()
    pool = next(iter(graphs._caches[model].recordings.values())).pool
    replace_parameter(model)
    model.predict(torch.randn(1, 3, 16, 32), cuda_graph=True)
    assert Fake.steps == ["synchronize", "wait", "capture", "replay", "record"]
    assert next(iter(graphs._caches[model].recordings.values())).pool is not pool
    Fake.steps.clear()
    model.release_cuda_graphs()
    assert Fake.steps == ["synchronize"]


def test_a_capture_of_the_callers_takes_the_prediction_in(captures, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    assert torch.equal(model.predict(images, cuda_graph=True), model.predict(images)) and captures == []


def test_models_take_turns(captures, monkeypatch):
    """torch allows one capture at a time, and one model's replay waits for another's."""
    begin, running = Fake.__init__, []

    def slow(self, run, images, pool):
        running.append(1)
        time.sleep(0.05)
        assert len(running) == 1, "two captures at a time"
        begin(self, run, images, pool)
        running.pop()

    monkeypatch.setattr(Fake, "__init__", slow)
    models, images, found = [tiny() for _ in range(3)], torch.randn(1, 3, 32, 32), []
    threads = [
        threading.Thread(target=lambda m=m: found.append(m.predict(images, cuda_graph=True))) for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captures) == len(found) == len(Fake.waits) == 3
    assert len(set(map(id, Fake.waits))) == 1


def test_a_hook_may_ask_another_model(captures):
    outer, inner, images = tiny(), tiny(), torch.randn(1, 3, 32, 32)
    found = []
    outer.backbone.register_forward_pre_hook(lambda *_: found.append(inner.predict(images, cuda_graph=True)))
    thread = threading.Thread(target=lambda: outer.predict(images, cuda_graph=True), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(captures) == 2
    assert all(torch.equal(labels, inner.predict(images)) for labels in found)


def test_on_the_cpu_it_says_what_to_do():
    with pytest.raises(ValueError, match="on a GPU, these images are on cpu"):
        tiny().predict(torch.randn(1, 3, 32, 32), cuda_graph=True)


def test_within_compile_the_flag_does_nothing():
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(lambda x: model.predict(x, cuda_graph=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), model.predict(images))
