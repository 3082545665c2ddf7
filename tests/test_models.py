"""Decoders and models: the paper's counts, its exact invariance, upstream weights, any ViT, any size."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depict_kernels import ops
from depict_kernels.models import (
    DepictDecoder,
    LinearDecoder,
    PretrainedWeightsError,
    SegmenterDecoder,
    create_model,
    list_models,
    load_upstream_checkpoint,
    load_upstream_decoder,
)

DECODERS = {
    "segmenter": lambda c, d: SegmenterDecoder(c, d),
    "depict-sa": lambda c, d: DepictDecoder(c, d, "sa"),
    "depict-ca": lambda c, d: DepictDecoder(c, d, "ca"),
    "linear": lambda c, d: LinearDecoder(c, d),
}
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def tiny(name="depict_sa_vit_tiny", classes=5, img_size=32, **kwargs):
    torch.manual_seed(0)
    kwargs.setdefault("backbone_kwargs", TINY)
    return create_model(name, classes, img_size=img_size, **kwargs).eval()


# Million parameters and forward GFLOPs with 150 classes (official code, counted).
COUNTS = [
    (192, 32, {"segmenter": (1.030, 4.42), "depict-sa": (0.203, 5.83), "depict-ca": (0.291, 5.05)}),
    (384, 32, {"segmenter": (4.050, 13.31), "depict-sa": (0.407, 6.70), "depict-ca": (0.582, 6.04)}),
    (768, 32, {"segmenter": (16.063, 44.53), "depict-sa": (0.813, 8.44), "depict-ca": (1.165, 8.03)}),
    (1024, 40, {"segmenter": (28.495, 120.69), "depict-sa": (1.084, 17.97), "depict-ca": (1.553, 17.79)}),
]


@pytest.mark.parametrize(
    ("width", "side", "kind", "parameters", "gflops"),
    [(d, s, kind, *counts) for d, s, table in COUNTS for kind, counts in table.items()],
)
def test_parameters_and_flops_are_the_papers(width, side, kind, parameters, gflops):
    with torch.device("meta"):
        decoder = DECODERS[kind](150, width).eval().requires_grad_(False)
        patches = torch.empty(1, side * side, width)
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 3) == parameters
    for (
        module
    ) in decoder.modules():  # registered operators: torch 2.11 counts 0 for its own attention on some devices
        if hasattr(module, "backend"):
            module.backend = "reference"
    with FlopCounterMode(display=False) as counter:
        decoder(patches, (side, side))
    # 0.005 for the published rounding, and upstream's counter saw 1e-3 of it differently at most
    assert math.isclose(counter.get_total_flops() / 1e9, gflops, abs_tol=0.0051)


@pytest.mark.parametrize("mode", ["sa", "ca"])
def test_rotating_each_heads_projection_changes_nothing(mode):
    torch.manual_seed(0)
    decoder = DepictDecoder(7, 24, mode, num_heads=3, head_dim=8, cross_head_dim=4).double()
    patches = torch.randn(2, 6, 24, dtype=torch.float64)
    before = decoder(patches, (2, 3))
    with torch.no_grad():
        for layer in [*decoder.layers, *getattr(decoder, "cross_layers", [])]:
            rotation, _ = torch.linalg.qr(torch.randn(3, layer.head_dim, layer.head_dim).double())
            heads = layer.proj.unflatten(0, (3, layer.head_dim))
            layer.proj.copy_((rotation @ heads).flatten(0, 1))
    torch.testing.assert_close(decoder(patches, (2, 3)), before)


def depict_by_formula(sd, patches, grid, mode):
    """DEPICT written from the paper's formulas on upstream's state dict, one head at a time, float64."""
    width = patches.shape[-1]
    norm = lambda x, key: F.layer_norm(x, x.shape[-1:], sd[f"{key}.weight"], sd[f"{key}.bias"])

    def layer(x, key, queries=None):
        w = norm(x, f"{key}.norm")
        q = w if queries is None else queries
        proj, step = sd[f"{key}.fn.proj"], sd[f"{key}.fn.step_size"]
        out = torch.zeros_like(x if queries is None else queries)
        d = proj.shape[0] // 3
        for h in range(3):
            p = proj[h * d : (h + 1) * d]
            scores = (q @ p.T) @ (w @ p.T).transpose(1, 2) / d**0.5
            out += scores.softmax(-1) @ (w @ p.T) @ p
        return (x if queries is None else queries) + step * out

    classes = sd["cls_emb"].expand(patches.shape[0], -1, -1)
    if mode == "sa":
        x = torch.cat([patches, classes], 1)
        for i in range(3):
            x = layer(x, f"net.layers.{i}")
        x = norm(x, "decoder_norm")
        patches, classes = x[:, : patches.shape[1]], x[:, patches.shape[1] :]
    else:
        for i in range(3):
            patches = layer(patches, f"snet.layers.{i}")
        patches = norm(patches, "snorm")
        for i in range(3):
            classes = layer(patches, f"cnet.layers.{i}", classes)
        classes = norm(classes, "cnorm")
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    masks = norm(unit(patches) @ unit(classes).transpose(1, 2), "mask_norm")
    assert masks.shape[-1] == sd["cls_emb"].shape[1] and width == classes.shape[-1]
    return masks.transpose(1, 2).reshape(patches.shape[0], -1, *grid)


def upstream_state_dict(mode, classes=7, width=24):
    """Random weights under upstream's keys and shapes (heads 3; head widths 100 and 50 as in its code)."""
    torch.manual_seed(1)
    sd = {"cls_emb": torch.randn(1, classes, width)}
    nets = {"net": 100} if mode == "sa" else {"snet": 100, "cnet": 50}
    norms = ["decoder_norm"] if mode == "sa" else ["snorm", "cnorm"]
    for net, head_dim in nets.items():
        for i in range(3):
            norms.append(f"{net}.layers.{i}.norm")
            sd[f"{net}.layers.{i}.fn.proj"] = torch.randn(3 * head_dim, width) * width**-0.5
            sd[f"{net}.layers.{i}.fn.step_size"] = torch.randn(1)
    for key, size in [*((n, width) for n in norms), ("mask_norm", classes)]:
        sd[f"{key}.weight"], sd[f"{key}.bias"] = torch.rand(size) + 0.5, torch.randn(size)
    return {k: v.double() for k, v in sd.items()}


@pytest.mark.parametrize("mode", ["sa", "ca"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_upstream_weights_give_the_papers_formula(mode, backend):
    sd = upstream_state_dict(mode)
    decoder = DepictDecoder(7, 24, mode, backend=backend).double()
    load_upstream_decoder(decoder, sd)
    patches = torch.randn(2, 6, 24, dtype=torch.float64)
    torch.testing.assert_close(decoder(patches, (2, 3)), depict_by_formula(sd, patches, (2, 3), mode))
    load_upstream_decoder(decoder, {f"decoder.{k}": v for k, v in sd.items()} | {"encoder.x": patches})


def test_upstream_loading_is_strict_and_loads_nothing_on_failure():
    sd = upstream_state_dict("sa")
    decoder = DepictDecoder(7, 24, "sa").double()
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    del sd["mask_norm.bias"]
    sd["net.layers.9.fn.proj"] = torch.zeros(2)
    sd["cls_emb"] = sd["cls_emb"][:, :5]
    with pytest.raises(ValueError) as error:
        load_upstream_decoder(decoder, sd)
    for words in (
        "missing mask_norm.bias",
        "unexpected net.layers.9.fn.proj",
        "cls_emb has shape (1, 5, 24)",
    ):
        assert words in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    with pytest.raises(ValueError, match="unexpected snet") as error:
        load_upstream_decoder(decoder, upstream_state_dict("ca"))
    assert "missing layers.0.proj; " in str(error.value) and " more; unexpected" in str(error.value)
    assert len(str(error.value)) < 700
    twice = upstream_state_dict("sa")
    with pytest.raises(ValueError, match="cls_emb and class_embed are both class_embed"):
        load_upstream_decoder(decoder, twice | {"class_embed": twice["cls_emb"] + 1})


def test_a_checkpoint_of_ours_is_told_from_upstreams():
    model = tiny(upstream_backbone=True)
    with pytest.raises(ValueError, match=r"own weights go through model\.load_state_dict"):
        load_upstream_checkpoint(model, model.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint\['model'\] has them"):
        load_upstream_checkpoint(model, {"model": torch.zeros(1)})


@pytest.mark.parametrize("name", list(DECODERS))
def test_patches_that_do_not_fit_are_named(name):
    decoder = DECODERS[name](5, 64)
    with pytest.raises(ValueError, match=r"grid \(3, 5\)"):
        decoder(torch.zeros(1, 14, 64), (3, 5))
    with pytest.raises((ValueError, RuntimeError), match="64"):
        decoder(torch.zeros(1, 15, 60), (3, 5))


def test_image_size_of_one_number_alone_is_named():
    with pytest.raises(ValueError, match="img_size must be two integers"):
        tiny(img_size=(224,))


@pytest.mark.parametrize("make", [lambda c: DepictDecoder(c, 16), lambda c: SegmenterDecoder(c, 64)])
def test_masks_normalised_over_one_or_two_classes_are_warned_of(make):
    for classes, words in ((1, "constant"), (2, "plus and minus one")):
        with pytest.warns(UserWarning, match=f"num_classes={classes}.*{words}.*segmenter_linear"):
            make(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(3)
        LinearDecoder(2, 16)


@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_fully_sharded(name, tmp_path):
    """FSDP, each block of the backbone and the decoder a unit; it takes no scalar parameters."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist = torch.distributed
    model = tiny(name, backbone_kwargs=TINY).eval()
    images, target = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    expected = model.loss(images, target)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for unit in (*model.backbone.vit.blocks, model.decoder, model):
            fsdp.fully_shard(unit, mesh=mesh)
        fsdp.register_fsdp_forward_method(model, "loss")
        loss = model.loss(images, target)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), gradients[key])
    finally:
        dist.destroy_process_group()


def test_whole_upstream_checkpoint_reproduces_upstreams_vit():
    """Position embeddings resized bilinearly and LayerNorm eps 1e-5: written here from upstream's description."""
    model = tiny(upstream_backbone=True).double()
    vit = model.backbone.vit
    sd = {f"encoder.{k}": torch.randn_like(v) * 0.1 for k, v in vit.state_dict().items()}
    sd |= {"encoder.head.weight": torch.zeros(10, 48), "encoder.head.bias": torch.zeros(10)}
    decoder_sd = upstream_state_dict("sa", classes=5, width=48)
    load_upstream_checkpoint(model, sd | {f"decoder.{k}": v for k, v in decoder_sd.items()})
    images = torch.randn(1, 3, 48, 64, dtype=torch.float64)  # 3 x 4 patches where the model has 2 x 2

    get = lambda key: sd[f"encoder.{key}"]
    norm = lambda x, key: F.layer_norm(x, (48,), get(f"{key}.weight"), get(f"{key}.bias"), 1e-5)
    x = F.conv2d(images, get("patch_embed.proj.weight"), get("patch_embed.proj.bias"), stride=16)
    x = torch.cat([get("cls_token"), x.flatten(2).mT], 1)
    pos = get("pos_embed")
    grid = F.interpolate(pos[:, 1:].mT.reshape(1, 48, 2, 2), (3, 4), mode="bilinear")
    x = x + torch.cat([pos[:, :1], grid.flatten(2).mT], 1)
    for i in range(2):
        y = F.linear(
            norm(x, f"blocks.{i}.norm1"), get(f"blocks.{i}.attn.qkv.weight"), get(f"blocks.{i}.attn.qkv.bias")
        )
        q, k, v = y.reshape(1, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        o = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(1, -1, 48)
        x = x + F.linear(o, get(f"blocks.{i}.attn.proj.weight"), get(f"blocks.{i}.attn.proj.bias"))
        y = F.gelu(
            F.linear(
                norm(x, f"blocks.{i}.norm2"),
                get(f"blocks.{i}.mlp.fc1.weight"),
                get(f"blocks.{i}.mlp.fc1.bias"),
            )
        )
        x = x + F.linear(y, get(f"blocks.{i}.mlp.fc2.weight"), get(f"blocks.{i}.mlp.fc2.bias"))
    patches = norm(x, "norm")[:, 1:]
    torch.testing.assert_close(model.backbone(images), patches)
    torch.testing.assert_close(model(images), depict_by_formula(decoder_sd, patches, (3, 4), "sa"))
    with pytest.raises(ValueError, match="upstream_backbone=True"):
        load_upstream_checkpoint(tiny(), sd)
    whole = sd | {f"decoder.{k}": v for k, v in decoder_sd.items()}
    with pytest.raises(ValueError, match="do not fit VisionTransformer: unexpected norm.weight$"):
        load_upstream_checkpoint(model, whole | {"norm.weight": torch.zeros(48)})


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_keeps_the_contract(kind):
    """Per-image independence, class count, gradient in every parameter, one class, empty batch."""
    torch.manual_seed(0)
    decoder = DECODERS[kind](6, 32).eval()
    patches = torch.randn(3, 8, 32)
    masks = decoder(patches, (2, 4))
    assert masks.shape == (3, 6, 2, 4)
    torch.testing.assert_close(decoder(patches[1:2], (2, 4)), masks[1:2], rtol=1e-4, atol=1e-5)
    masks.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert all(p.grad.abs().max() > 0 for n, p in decoder.named_parameters() if "attn.qkv.bias" not in n)
    assert DECODERS[kind](1, 32)(patches, (2, 4)).shape == (3, 1, 2, 4)
    assert decoder(patches[:0], (2, 4)).shape == (0, 6, 2, 4)
    with pytest.raises(ValueError, match="num_classes"):
        DECODERS[kind](0, 32)


@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_backends_agree_in_a_whole_model(name):
    model = tiny(name)
    images, target = torch.randn(2, 3, 40, 56), torch.randint(0, 5, (2, 40, 56))
    values = {}
    for backend in ("reference", "torch", "auto"):
        model.backend = backend
        assert model.backend == backend
        model.zero_grad()
        loss = model.loss(images, target, label_smoothing=0.1)
        loss.backward()
        values[backend] = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}
    for backend in ("torch", "auto"):
        torch.testing.assert_close(values[backend], values["reference"], rtol=1e-4, atol=1e-5)


def test_sizes_the_patch_does_not_divide_are_padded_and_cropped():
    model = tiny()
    images, target = torch.randn(2, 3, 37, 50), torch.randint(0, 5, (2, 37, 50)).to(torch.uint8)
    padded = F.pad(images, (0, 14, 0, 11))
    torch.testing.assert_close(model(images), model(padded))
    z = F.interpolate(model(padded), (48, 64), mode="bilinear")
    label = z.argmax(1)[:, :37, :50]
    assert (model.predict(images) == label).float().mean() > 0.999
    expected = F.cross_entropy(z, F.pad(target.long(), (0, 14, 0, 11), value=255), ignore_index=255)
    torch.testing.assert_close(model.loss(images, target), expected)
    per_pixel = model.loss(images, target, reduction="none")
    torch.testing.assert_close(per_pixel.mean(), expected)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"), [(torch.uint8, -1), (torch.int8, None), (torch.int16, 1 << 15)]
)
def test_padding_keeps_an_ignore_index_that_the_target_cannot_hold(dtype, ignore_index):
    model = tiny()
    images, target = torch.randn(1, 3, 17, 16), torch.zeros(1, 17, 16, dtype=torch.int64)
    a = model.loss(images, target.to(dtype), ignore_index=ignore_index)
    torch.testing.assert_close(a, model.loss(images, target))


@pytest.mark.parametrize(
    ("backbone", "patch", "options"),
    [
        ("vit_tiny_patch16_224", 16, {"depth": 1}),
        ("deit_tiny_distilled_patch16_224", 16, {"depth": 1}),
        ("vit_small_patch14_reg4_dinov2", 14, {"depth": 1}),
        ("vit_small_patch14_dinov2", 14, {"depth": 1}),
        ("deit3_small_patch16_224", 16, {"depth": 1}),
        ("vit_base_patch16_siglip_224", 16, {"depth": 1}),
    ],
)
def test_any_vit_with_any_size(backbone, patch, options):
    model = tiny(backbone=backbone, backbone_kwargs=options, img_size=64)
    assert model.patch_size == patch
    for size in ((64, 64), (33, 90)):
        masks = model(torch.randn(1, 3, *size))
        assert masks.shape == (1, 5, -(-size[0] // patch), -(-size[1] // patch)) and masks.isfinite().all()
    model.train()
    model.loss(torch.randn(1, 3, 33, 90), torch.randint(0, 5, (1, 33, 90))).backward()
    # no parameter without gradient: DistributedDataParallel would wait for it
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_model_names():
    assert len(list_models()) == 18
    assert list_models("depict_ca*tiny") == ["depict_ca_vit_tiny"]
    assert (
        len(
            create_model(
                "depict_sa_vit_large_depth6", img_size=32, backbone_kwargs={"depth": 1}
            ).decoder.layers
        )
        == 6
    )
    with pytest.raises(ValueError, match="did you mean depict_sa_vit_small"):
        create_model("depict_sa_vit_smal")
    with pytest.raises(ValueError, match="did you mean vit_small_patch16_384"):
        create_model("depict_sa_vit_small", backbone="vit_smal_patch16_384")
    with pytest.raises(ValueError, match="not a plain ViT"):
        create_model("depict_sa_vit_small", backbone="resnet18")
    with pytest.raises(ValueError, match="images of one size only.*Beit"):
        create_model("depict_sa_vit_small", backbone="beit_base_patch16_224")


def test_patch_of_a_hybrid_is_what_one_embedding_stands_for():
    model = create_model(
        "depict_sa_vit_tiny", 5, backbone="vit_tiny_r_s16_p8_224", img_size=60, backbone_kwargs={"depth": 1}
    ).eval()
    assert model.patch_size == 32 and model.backbone.vit.patch_embed.grid_size == (2, 2)
    images = torch.randn(1, 3, 33, 70)
    assert model(images).shape == (1, 5, 2, 3) and model.predict(images).shape == (1, 33, 70)


def test_pretrained_weights_from_a_local_file(tmp_path):
    import timm

    torch.manual_seed(3)
    source = timm.create_model("vit_tiny_patch16_384", img_size=64, depth=1, num_classes=9)
    path = tmp_path / "vit.pth"
    torch.save(source.state_dict(), path)
    model = create_model(
        "depict_sa_vit_tiny", 5, checkpoint_path=str(path), img_size=64, backbone_kwargs={"depth": 1}
    )
    torch.testing.assert_close(model.backbone.vit.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(model.backbone.vit.pos_embed, source.pos_embed)
    resized = create_model(
        "depict_sa_vit_tiny", 5, checkpoint_path=str(path), img_size=96, backbone_kwargs={"depth": 1}
    )
    assert resized.backbone.vit.pos_embed.shape[1] == 1 + 36
    with pytest.raises(PretrainedWeightsError, match="--model.pretrained false"):
        create_model("depict_sa_vit_tiny", 5, checkpoint_path=str(path), backbone_kwargs={"depth": 2})
    with pytest.raises(PretrainedWeightsError, match="no file"):
        create_model("depict_sa_vit_tiny", 5, checkpoint_path=str(tmp_path / "none.pth"))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(PretrainedWeightsError, match="could not load"):
        create_model("depict_sa_vit_tiny", 5, checkpoint_path=str(path), backbone_kwargs={"depth": 1})


def test_missing_pretrained_weights_stop_with_a_way_on():
    with pytest.raises(PretrainedWeightsError, match="no pretrained weights.*--model.pretrained false"):
        create_model("depict_sa_vit_tiny", pretrained=True, backbone="vit_small_patch16_36x1_224")


@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_compile_takes_the_whole_model_in_one_graph(name):
    model = tiny(name)
    images, target = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, target), model.loss(images, target))
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_prediction_holds_nothing_that_only_this_package_knows(strict):
    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny("depict_ca_vit_tiny").eval()
            self.model.backend = "torch"

        def forward(self, images):
            return self.model.predict(images)

    images = torch.randn(2, 3, 32, 32)
    predict = Predict()
    program = torch.export.export(predict, (images,), strict=strict)
    assert not any("depict_kernels" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(images), predict(images))


def test_bf16_autocast_trains():
    model = tiny("depict_ca_vit_tiny")
    images, target = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    exact = model.loss(images, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, target)
        assert model(images).dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bad_images_and_targets():
    model = tiny()
    with pytest.raises(TypeError, match="normalised"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="height and width"):
        model.loss(torch.zeros(1, 3, 32, 32), torch.zeros(1, 30, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="target value 9"):
        model.loss(torch.zeros(1, 3, 32, 32), torch.full((1, 32, 32), 9))


def test_predict_is_argmax_of_the_upsampled_masks():
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    label = model.predict(images, torch.uint8)
    assert label.dtype == torch.uint8
    assert torch.equal(label.long(), ops.upsample_argmax(model(images), (32, 32)))


def test_step_init_starts_near_the_identity():
    decoder = DepictDecoder(5, 24, "ca", step_init=-0.1)
    steps = [p for name, p in decoder.named_parameters() if name.endswith(".step")]
    assert len(steps) == 6 and all(s.item() == pytest.approx(-0.1) and s.requires_grad for s in steps)
    drawn = DepictDecoder(5, 24, "ca")
    assert len({p.item() for name, p in drawn.named_parameters() if name.endswith(".step")}) == 6


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_classes": 2.5}, "num_classes must be an integer, got 2.5"),
        ({"num_classes": "150"}, "num_classes must be an integer, got '150'"),
        ({"decoder_kwargs": {"depth": "x"}}, "depth must be an integer, got 'x'"),
        ({"decoder_kwargs": {"num_heads": 1.5}}, "num_heads must be an integer, got 1.5"),
    ],
)
@pytest.mark.parametrize("kind", ["depict_sa", "segmenter_mask"])
def test_sizes_that_are_no_integers_are_named(kind, changes, words):
    with pytest.raises(TypeError, match=words):
        create_model(f"{kind}_vit_tiny", img_size=32, backbone_kwargs={"depth": 1}, **changes)
