"""The whole DEPICT decoder on every kernel backend: training steps compiled, captured, on streams, under autocast, DDP.

The same bodies run on the CPU, tiny, where a CUDA graph or a stream is plain execution.
"""

import contextlib
import copy

import pytest
import torch

from depict_kernels import ops
from depict_kernels.models import DepictDecoder
from depict_kernels.testing import assert_within_budget

# batch, grid, size, classes, width, heads, head_dim, cross_head_dim by device: several blocks of tokens on a GPU
SHAPES = {"cpu": (1, (1, 2), (2, 3), 5, 24, 2, 20, 10), "cuda": (2, (9, 11), (131, 170), 19, 192, 3, 100, 50)}


@pytest.fixture(params=["sa", "ca"])
def mode(request) -> str:
    return request.param


def make(mode, backend, device, dtype=torch.float32):
    batch, grid, size, classes, width, heads, dim, cross_dim = SHAPES[torch.device(device).type]
    torch.manual_seed(0)
    decoder = DepictDecoder(
        classes, width, mode, 1, heads, dim, 2, cross_dim, backend=backend, step_init=-0.3
    )
    # The classes' small first values make them all alike, and the mask head ill-conditioned.
    torch.nn.init.normal_(decoder.class_embed)
    patches = torch.randn(batch, grid[0] * grid[1], width)
    target = torch.randint(0, classes, (batch, *size))
    target[0, 0, :2] = 255
    return decoder.to(device, dtype), patches.to(device, dtype), target.to(device)


def masks(decoder, patches):
    return decoder(patches, SHAPES[patches.device.type][1])


def loss_of(decoder, patches, target):
    return ops.upsample_cross_entropy(masks(decoder, patches), target, backend=decoder.backend)


def label_map(logits, backend):
    size = SHAPES[logits.device.type][2]
    return ops.upsample_argmax(logits, size, torch.uint8, backend=backend)


def loss_and_gradients(decoder, patches, target, function=loss_of):
    patches = patches.detach().requires_grad_()
    loss = function(decoder, patches, target)
    return [loss.detach(), *torch.autograd.grad(loss, [patches, *decoder.parameters()])]


def on_torch(decoder, dtype):
    twin = copy.deepcopy(decoder).to(dtype)
    for module in twin.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    return twin


def check(values, peers, decoder, patches, target, dtype):
    """``dtype`` of the matrix products: what a few ulp of rounding mean where autocast gives float32 results."""
    truths = loss_and_gradients(on_torch(decoder, torch.float64), patches.double(), target)
    names = ["loss", "patches", *(name for name, _ in decoder.named_parameters())]
    largest = max(t.abs().max().item() for t in truths[1:])
    for name, value, peer, truth in zip(names, values, peers, truths):
        # Parameters' gradients are sums over tokens that cancel: their terms have the size of the largest gradient.
        # Factor 4: both are chains of layers whose roundings differ in every one, and neither is the better one.
        scale = 0.0 if name == "loss" else largest
        # 16 ulp of them: float32 products may be three of TF32, whose roundings are a few times those of one.
        ulps = 16 * torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
        peer = peer.to(value.dtype)
        assert_within_budget(value, peer, truth, factor=4, ulps=ulps, scale=scale, what=name)


def test_against_float64(mode, kernels):
    decoder, *batch = make(mode, *kernels)
    values = loss_and_gradients(decoder, *batch)
    peers = loss_and_gradients(on_torch(decoder, kernels.dtype), *batch)
    check(values, peers, decoder, *batch, kernels.dtype)


def test_repeats_are_bitwise_equal(mode, kernels):
    decoder, *batch = make(mode, *kernels)
    first, second = (loss_and_gradients(decoder, *batch) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_compile_takes_training_and_inference_in_one_graph(mode, kernels):
    decoder, patches, target = make(mode, *kernels)
    inductor = (
        kernels.device == "cuda" and kernels.dtype == torch.bfloat16
    )  # one dtype: it takes half a minute
    options = {"fullgraph": True, "backend": "inductor" if inductor else "aot_eager"}
    values = loss_and_gradients(decoder, patches, target, torch.compile(loss_of, **options))
    check(values, loss_and_gradients(decoder, patches, target), decoder, patches, target, kernels.dtype)

    def infer(patches):
        logits = masks(decoder, patches)
        counts = ops.upsample_confusion(logits, target, backend=kernels.backend)
        return logits, label_map(logits, kernels.backend), counts

    with torch.no_grad():
        logits, labels, counts = torch.compile(infer, **options)(patches)
        assert torch.equal(labels, label_map(logits, kernels.backend))
        assert torch.equal(counts, ops.upsample_confusion(logits, target, backend=kernels.backend))
        truth = masks(on_torch(decoder, torch.float64), patches.double())
        assert_within_budget(logits, masks(decoder, patches), truth, factor=4, what="logits")


WARM_UP = 2


def captured(step, device):
    """``step`` as a CUDA graph, after the warm-up that capturing wants; on the CPU ``step`` itself, warmed up too."""
    if device == "cpu":
        for _ in range(WARM_UP):
            step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cuda_graph_of_a_training_step(mode, optimizer, kernels):
    """Forward, loss, backward and optimizer, captured once: replays train as eager steps do, on new batches.

    16 bit is autocast's, as in training: an optimizer's state in float16 underflows.
    """

    def prepare():
        decoder, patches, target = make(mode, *kernels[:2])
        if optimizer == "sgd":
            optim = torch.optim.SGD(decoder.parameters(), lr=0.01, momentum=0.9, foreach=True)
        else:
            optim = torch.optim.AdamW(decoder.parameters(), lr=1e-3, capturable=kernels.device == "cuda")
        result = torch.zeros((), device=kernels.device)

        def step():
            optim.zero_grad()
            with torch.autocast(kernels.device, kernels.dtype, enabled=kernels.dtype != torch.float32):
                loss = loss_of(decoder, patches, target)
            loss.backward()
            optim.step()
            result.copy_(loss.detach())

        return decoder, patches, target, result, step

    def train(decoder, patches, target, result, step):
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(2):
            patches.copy_(torch.randn(patches.shape, generator=generator))
            target.copy_(torch.randint(0, 5, target.shape, generator=generator))
            step()
            losses.append(result.clone())
        return losses, [p.detach().clone() for p in decoder.parameters()]

    *state, step = prepare()
    for _ in range(WARM_UP):
        step()
    expected = train(*state, step)
    *state, step = prepare()
    replayed = train(*state, captured(step, kernels.device))
    # the same kernels in the same order: equal, unless the library of matrix products takes another algorithm
    torch.testing.assert_close(replayed, expected)
    assert len({loss.item() for loss in replayed[0]}) == 2


def test_cuda_graph_of_inference(mode, kernels):
    decoder, patches, _ = make(mode, *kernels)
    labels = torch.zeros(len(patches), *SHAPES[kernels.device][2], dtype=torch.uint8, device=kernels.device)

    @torch.no_grad()
    def infer():
        labels.copy_(label_map(masks(decoder, patches), kernels.backend))

    replay = captured(infer, kernels.device)
    for seed in (1, 2):
        patches.copy_(torch.randn(patches.shape, generator=torch.Generator().manual_seed(seed)))
        infer()
        expected = labels.clone()
        labels.fill_(255)
        replay()
        assert torch.equal(labels, expected)


def test_a_second_stream(mode, kernels):
    """The inputs come late on a stream of their own: a kernel on another stream would read what was there before."""
    decoder, patches, target = make(mode, *kernels)
    expected = loss_and_gradients(decoder, patches, target)
    late = torch.full_like(patches, torch.nan)
    stream = torch.cuda.Stream() if kernels.device == "cuda" else None
    if stream is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if stream is not None:
            torch.cuda._sleep(50_000_000)
        late.copy_(patches)
        values = loss_and_gradients(decoder, late, target)
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(values, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_device_that_is_not_the_current_one(mode, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    decoder, *batch = make(mode, backend, "cuda:0")
    expected = loss_and_gradients(decoder, *batch)
    for current in (0, 1):
        with torch.cuda.device(current):
            values = loss_and_gradients(decoder.to("cuda:1"), *(t.to("cuda:1") for t in batch))
            assert all(v.device.index == 1 for v in values)
            torch.testing.assert_close([v.cpu() for v in values], [v.cpu() for v in expected])


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
def test_autocast(mode, scaled, kernels):
    """float32 parameters and patches, 16-bit products; a loss scaler's factor goes through the kernels' backward."""
    dtype = kernels.dtype if kernels.as_on_a_gpu else torch.float16
    decoder, *batch = make(mode, *kernels[:2])

    def run(decoder, patches, target):
        scaler = torch.amp.GradScaler(kernels.device, init_scale=2.0**10, enabled=scaled)
        twin = copy.deepcopy(decoder)
        patches = patches.detach().requires_grad_()
        optim = torch.optim.SGD([patches, *twin.parameters()], lr=1.0)
        with torch.autocast(kernels.device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(twin, patches, target)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optim)
        return [loss.detach(), patches.grad, *(p.grad for p in twin.parameters())]

    values, peers = run(decoder, *batch), run(on_torch(decoder, torch.float32), *batch)
    check(values, peers, decoder, *batch, dtype)


def test_data_parallel(mode, kernels, tmp_path):
    """One process: DDP's hooks, buckets and its own streams around the kernels' backward."""
    dist = torch.distributed
    decoder, patches, target = make(mode, *kernels)
    expected = loss_and_gradients(decoder, patches, target)[2:]
    backend = "nccl" if kernels.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        parallel = torch.nn.parallel.DistributedDataParallel(decoder)
        ops.upsample_cross_entropy(masks(parallel, patches), target, backend=kernels.backend).backward()
    torch.testing.assert_close([p.grad for p in decoder.parameters()], expected)
