"""Prediction by CUDA graphs on a GPU; what is captured anew and when has its tests in test_graphs.py."""

import pytest
import torch
from tiny_inference import tiny

from depict_kernels.models import graphs

BACKENDS = ["torch", "triton", "cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_gpu_replays_are_predictions(name, backend):
    model = tiny(name, "cuda")
    model.backend = backend
    sizes = [(2, 3, 32, 32), (1, 3, 45, 70)]
    for seed in range(3):
        torch.manual_seed(seed)
        for size in sizes:
            images = torch.randn(size, device="cuda")
            labels = model.predict(images, torch.uint8, cuda_graph=True)
            kept = labels.clone()
            assert torch.equal(labels, model.predict(images, torch.uint8))
            model.predict(torch.randn_like(images), torch.uint8, cuda_graph=True)
            assert torch.equal(labels, kept), "a later replay wrote into labels that were given out"
    assert len(graphs._caches[model].recordings) == len(sizes)


@pytest.mark.gpu
def test_gpu_weights_may_change_in_place_and_be_replaced():
    model, images = tiny(device="cuda"), torch.randn(2, 3, 32, 32, device="cuda")
    model.predict(images, cuda_graph=True)
    first = graphs._caches[model].recordings
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    (recording,) = first.values()
    assert torch.equal(model.predict(images, cuda_graph=True), model.predict(images))
    assert next(iter(first.values())) is recording
    half = model.half()
    assert torch.equal(half.predict(images.half(), cuda_graph=True), half.predict(images.half()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast_whose_casts_outlive_their_context(dtype):
    model, images = tiny(device="cuda"), torch.randn(2, 3, 32, 32, device="cuda")
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        with torch.autocast("cuda", dtype):
            model.predict(images)  # fills autocast's cache of weights
            labels = model.predict(images, cuda_graph=True)
            assert torch.equal(labels, model.predict(images))
        torch.full((2**20,), torch.nan, device="cuda")  # takes over what the cache had


@pytest.mark.gpu
def test_gpu_inference_mode_streams_and_release():
    model, images = tiny(device="cuda"), torch.randn(2, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        expected = model.predict(images, cuda_graph=True)
    other = torch.randn_like(images)
    plain = model.predict(other)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            found.append((turn % 2, model.predict(images if turn % 2 else other, cuda_graph=True)))
    torch.cuda.synchronize()
    for odd, labels in found:
        assert torch.equal(labels, expected if odd else plain)
    model.release_cuda_graphs()
    assert torch.equal(model.predict(images, cuda_graph=True), expected)
