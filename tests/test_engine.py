"""The training loop: what a step computes, what it refuses, and what a run leaves behind."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import arguments, configuration, make_data, settings

from depict_kernels.models import create_model
from train import build, checkpoint, optim, plots
from train import run as command_line
from train.command_train import finish
from train.distributed import World
from train.engine import LossModule, Trainer
from train.errors import UserError
from train.logs import RunLog, read_metrics, trim_metrics
from train.schema import Loss, Optim

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def trainer(data, tmp_path, resume=None, **overrides) -> Trainer:
    folder = tmp_path / "tiny"
    folder.mkdir(exist_ok=True)
    return Trainer(configuration(data, tmp_path, **overrides), CPU, folder, resume)


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def weights(module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


# ------------------------------------------------------------------------------------------ optimiser


@pytest.mark.parametrize("name", ["depict_sa_vit_tiny", "depict_ca_vit_tiny", "segmenter_mask_vit_tiny"])
def test_parameter_groups(name):
    model = create_model(name, 5, img_size=32, backbone_kwargs={"depth": 3, "embed_dim": 48, "num_heads": 3})
    groups = optim.parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
    of = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in of, "a parameter in two groups would be updated twice"
            of[id(parameter)] = group["weight_decay"], group["lr_scale"]
    found = {key: of[id(parameter)] for key, parameter in model.named_parameters()}
    # stem 0, blocks 1 to 3 with the norm in the last: 0.5 ** (3 - layer).
    expected = {
        "backbone.vit.pos_embed": (0.0, 0.125),
        "backbone.vit.cls_token": (0.0, 0.125),
        "backbone.vit.patch_embed.proj.weight": (0.1, 0.125),
        "backbone.vit.patch_embed.proj.bias": (0.0, 0.125),
        "backbone.vit.blocks.0.attn.qkv.weight": (0.1, 0.25),
        "backbone.vit.blocks.1.attn.qkv.weight": (0.1, 0.5),
        "backbone.vit.blocks.2.norm1.weight": (0.0, 1.0),
        "backbone.vit.norm.weight": (0.0, 1.0),
        "decoder.class_embed": (0.0, 1.0),
        "decoder.mask_norm.weight": (0.0, 1.0),
    }
    if "depict" in name:
        expected |= {"decoder.layers.0.step": (0.0, 1.0), "decoder.layers.0.proj": (0.1, 1.0)}
    assert {key: found[key] for key in expected} == expected
    assert all(decay == 0.0 for key, (decay, _) in found.items() if key.endswith((".bias", ".step")))


def test_learning_rate_schedule():
    """The paper's: (lr - min_lr) (1 - t / T) ** 0.9 + min_lr."""
    paper = Optim(lr=1e-3, min_lr=1e-5, poly_power=0.9)
    for step in (0, 1, 500, 999):
        assert optim.learning_rate(step, 1000, paper) == pytest.approx(
            0.00099 * (1 - step / 1000) ** 0.9 + 1e-5
        )
    assert optim.learning_rate(1000, 1000, paper) == pytest.approx(1e-5)
    warm = Optim(lr=1e-3, warmup_steps=4)
    rates = [optim.learning_rate(step, 100, warm) for step in range(6)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3]) and rates[5] < 1e-3


# --------------------------------------------------------------------------------- what a step computes


def test_loss_and_gradient_are_the_mean_over_all_valid_pixels(data, tmp_path):
    """Against the model's own mean over the whole batch at once, with very unequal micro-steps."""
    run = trainer(data, tmp_path, data__batch_size=2, train__accumulate=4, optim__name="sgd", optim__lr=1.0,
                  optim__momentum=0.0, optim__min_lr=1.0, train__steps=1)  # fmt: skip
    model = create_model_like(run)
    batches = first_batches(run, 4)
    counts = [int(run.loss_module.valid_weight(batch["target"])) for batch in batches]
    assert max(counts) > 5 * min(counts), "the micro-steps must be unequal for this test to mean anything"
    images, targets = zip(*(run.augment(batch) for batch in batches))
    before = weights(model)
    loss = model.loss(torch.cat(images), torch.cat(targets))
    loss.backward()
    naive = sum(model.loss(x, y).item() for x, y in zip(images, targets)) / 4
    assert abs(naive - loss.item()) > 0.01 * loss.item()

    run.train()
    assert losses(tmp_path / "tiny")[0] == pytest.approx(loss.item(), rel=1e-6)
    after = weights(run.model)
    for key, parameter in model.named_parameters():
        step = before[key] - after[key]
        torch.testing.assert_close(
            step, parameter.grad, rtol=1e-3, atol=1e-6 + 1e-6 * before[key].abs().max()
        )


def create_model_like(run: Trainer):
    model = create_model(
        run.config.model.name,
        run.classes.num_classes,
        img_size=run.config.data.crop_size,
        backbone_kwargs=run.config.model.backbone_kwargs,
        decoder_kwargs=run.config.model.decoder_kwargs,
    )
    model.load_state_dict(run.model.state_dict())
    return model


def first_batches(run: Trainer, count: int) -> list[dict]:
    from train.loader import train_loader

    stream = iter(train_loader(run.train_set, run.config.data, seed=run.config.train.seed))
    return [next(stream) for _ in range(count)]


def test_accumulation_changes_nothing(data, tmp_path):
    curves = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        run = trainer(data, folder, data__batch_size=batch_size, train__accumulate=accumulate)
        run.train()
        curves.append(losses(folder / "tiny"))
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)


def test_all_ignored_step_changes_no_weight(data, tmp_path, monkeypatch):
    run = trainer(data, tmp_path, optim__name="sgd", train__steps=2)
    augment = run.augment
    # The count is taken before the augmentation, so both must see the empty target.
    monkeypatch.setattr(run.loss_module, "valid_weight", lambda target: torch.zeros((), dtype=torch.float64))
    run.augment = lambda batch: (augment(batch)[0], torch.full_like(batch["target"], 255))
    before = weights(run.model)
    run.train()
    assert losses(tmp_path / "tiny") == [0.0, 0.0]
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 1.0, 0.0, 3.0]], ids=["equal", "weighted"])
def test_valid_weight_is_what_the_mean_divides_by(data, tmp_path, class_weights):
    run = trainer(data, tmp_path, loss__class_weights=class_weights)
    batch = first_batches(run, 1)[0]
    images, target = run.augment(batch)
    weight = None if class_weights is None else torch.tensor(class_weights)
    mean = run.model.loss(images, target, weight=weight)
    total = run.loss_module(images, target)
    assert (total / run.loss_module.valid_weight(target)).item() == pytest.approx(mean.item(), rel=1e-6)


def test_class_weights_of_another_length_are_refused():
    model = create_model("segmenter_linear_vit_tiny", 5, img_size=32, backbone_kwargs={"depth": 1})
    with pytest.raises(UserError, match=r"loss.class_weights: 3 weights for 5 classes"):
        LossModule(model, Loss(class_weights=[1.0, 1.0, 1.0]))


def test_gradient_clipping(data, tmp_path):
    run = trainer(data, tmp_path, optim__name="sgd", optim__lr=1.0, optim__min_lr=1.0, optim__momentum=0.0,
                  optim__clip_grad=0.01, train__steps=1)  # fmt: skip
    before = weights(run.model)
    run.train()
    moved = sum((before[key] - value).pow(2).sum() for key, value in run.model.state_dict().items()).sqrt()
    assert read_metrics(tmp_path / "tiny" / "metrics.jsonl")[0]["grad_norm"] > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_moving_average_is_what_is_evaluated_and_kept(data, tmp_path):
    run = trainer(data, tmp_path, train__ema_decay=0.5, train__steps=4)
    expected = weights(run.model)
    update = run._update

    def follow(batches):
        update(batches)
        decay = run.ema.get_decay(run.step + 1)
        for key, value in run.model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value

    run._update = follow
    run.train()
    best = checkpoint.load(tmp_path / "tiny" / "best.pt")["model"]
    for key, value in expected.items():
        torch.testing.assert_close(best[key], value)
    assert not torch.equal(best["decoder.class_embed"], run.model.decoder.class_embed)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(data, tmp_path, precision):
    curves = {}
    for name in ("fp32", precision):
        (tmp_path / name).mkdir()
        trainer(data, tmp_path / name, train__precision=name, train__steps=8, optim__lr=1e-3).train()
        curves[name] = losses(tmp_path / name / "tiny")
    assert curves[precision] != curves["fp32"]
    assert curves[precision] == pytest.approx(curves["fp32"], rel=0.05)
    assert curves["fp32"][-1] < curves["fp32"][0]


def test_fp16_overflow_is_skipped_and_counted(data, tmp_path):
    run = trainer(data, tmp_path, train__precision="fp16", train__steps=8)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    run.train()
    lines = [line for line in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[0]["skipped_steps"] == 1 and lines[-1]["loss_scale"] < 2.0**40
    assert checkpoint.load(tmp_path / "tiny" / "last.pt")["scaler"]["scale"] == lines[-1]["loss_scale"]


def test_compiled_step_computes_the_same(data, tmp_path, monkeypatch):
    """Through torch.compile's tracing (backend eager: no compiler is needed)."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="eager", fullgraph=True))
    curves = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        run = trainer(data, folder, train__compile=compiled, train__steps=3)
        assert compiled == (type(run.forward).__name__ == "OptimizedModule")
        run.train()
        curves.append(losses(folder / "tiny"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


# ------------------------------------------------------------------------------------ what goes wrong


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    run = trainer(data, tmp_path, train__steps=9, train__save_every=3, train__log_every=2)
    update = run._update

    def poison(batches):
        if run.step == 4:
            with torch.no_grad():
                run.model.decoder.class_embed.fill_(math.nan)
        update(batches)

    run._update = poison
    with pytest.raises(UserError) as error:
        run.train()
    text = str(error.value)
    assert "the loss is nan at step 5" in text and "image_0" in text and "optim.lr" in text
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())


def test_nan_before_a_save_is_not_saved(data, tmp_path):
    """The save comes before the log line that would have noticed."""
    run = trainer(data, tmp_path, train__steps=9, train__save_every=2, train__log_every=9)
    update = run._update

    def poison(batches):
        update(batches)
        if run.step == 3:
            run.window[3, 1] = math.inf

    run._update = poison
    with pytest.raises(UserError, match="gradient's norm is inf at step 4"):
        run.train()
    assert checkpoint.load(tmp_path / "tiny" / "last.pt")["step"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_computes_in_the_runs_precision(precision, data, tmp_path):
    """During training, in the final scores, in the pictures."""
    run = trainer(data, tmp_path, train__precision=precision, train__steps=2)
    seen = set()
    run.model.backbone.register_forward_hook(
        lambda module, inputs, output: seen.add((torch.is_autocast_enabled("cpu"), module.training))
    )
    run.train()
    finish(run)
    low = precision == "bf16"
    assert seen == {(low, True), (low, False)}


# --------------------------------------------------------------------------------------- what is reported


def test_the_plot_of_scores_shows_the_baselines_that_the_results_name(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "GENERATED", tmp_path / "generated")
    figures, draw = [], plots.score_figure
    monkeypatch.setattr(plots, "score_figure", lambda *a: (figures.append(draw(*a)), figures[-1])[1])
    keys = settings(tmp_path, tmp_path / "runs", train__steps=2, train__score_untrained=True)
    keys |= {"data.root": None, "data.generate.train_images": 4, "data.generate.val_images": 2}
    keys |= {"data.generate.height": 32, "data.generate.width": 32}
    assert command_line.main(arguments(keys)) == 0
    results = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    labels = {line.get_label() for line in figures[0].axes[0].lines}
    for name, key in (
        ("untrained model", "untrained_miou"),
        ("per-pixel classifier of colour and position", "pixel_baseline_miou"),
    ):
        assert f"mIoU of the {name}: {100 * results[key]:.1f} %" in labels


def test_trimmed_metrics_end_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [("eval", 0), ("train", 2), ("train", 4), ("eval", 4), ("train", 6)]
    path.write_text(
        "".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in lines) + '{"kind": "tra'
    )
    trim_metrics(path, step=4, evaluated_step=0)
    assert [(line["kind"], line["step"]) for line in read_metrics(path)] == [
        ("eval", 0),
        ("train", 2),
        ("train", 4),
    ]


def test_damaged_and_foreign_lines_cost_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    bad = [
        b'{"kind": "train", "st',
        b"\xff\xfe",
        b'{"note": "mine"}',
        b"[1]",
        b'{"kind": "note", "step": 1}',
        b"",
    ]
    path.write_bytes(b"\n".join([*bad, *(b"\n".join([json.dumps(line).encode(), *bad]) for line in good)]))
    assert read_metrics(path) == good
    trim_metrics(path, step=2, evaluated_step=0)
    assert read_metrics(path) == good[:2]


def test_log_without_tensorboard_says_so(tmp_path, monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **options):
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    log = RunLog(tmp_path, 10)
    log.start(0, -1)
    log.train(1, {"loss": math.nan, "lr": 0.1, "images_per_s": 5.0, "seconds_per_step": 60.0})
    log.stop()
    out = capsys.readouterr().out
    assert "pip install tensorboard" in out and "  0:09:00 left" in out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_an_evaluation_ends_with_a_line(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    log = RunLog(tmp_path, 10, tensorboard=False)
    for done, clock[0] in ((1, 1000.0), (2, 1030.0), (3, 1061.0), (4, 1065.0)):
        log.evaluating(done, 4, 2.0)
    assert capsys.readouterr().out.splitlines() == [
        "evaluating 3/4  2.0 images/s",
        "evaluating 4/4  2.0 images/s",
    ]


def test_log_every_may_change_on_resume(data, tmp_path):
    first = trainer(data, tmp_path, train__steps=8, train__log_every=10)
    first.train()
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    state["window"] = [[1.0, 1.0]] * 8  # as a longer run has it here, which logs at step 10
    again = trainer(data, tmp_path, state, train__steps=14, train__log_every=4)
    again.train()
    assert again.step == 14 and len(losses(tmp_path / "tiny")) >= 2
    # Longer than the run: no memory for steps that never come.
    assert len(trainer(data, tmp_path, train__steps=6, train__log_every=10**12).window) == 6


def test_new_optimiser_settings_hold_on_resume(data, tmp_path):
    first = trainer(data, tmp_path, train__steps=1)
    first.train()
    state = checkpoint.load(tmp_path / "tiny" / "last.pt")
    again = trainer(data, tmp_path, state, train__steps=2, optim__weight_decay=0.25)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.0, 0.25}
    assert len(again.optimizer.state) == len(first.optimizer.state) > 0
    with pytest.raises(UserError, match="optim.name: adamw in the checkpoint, sgd now"):
        trainer(data, tmp_path, state, train__steps=2, optim__name="sgd")


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_split_without_a_label_is_refused_at_the_start(split, tmp_path):
    root = make_data(tmp_path / "data")
    first, *others = sorted((root / "annotations" / split).iterdir())
    good = first.read_bytes()
    for path in (first, *others):
        Image.new("L", Image.open(path).size, 0).save(path)
    with pytest.raises(UserError, match=f"no labelled pixel in {split}; .*check-data"):
        trainer(root, tmp_path)
    others[-1].write_bytes(good)
    trainer(root, tmp_path)
    if split == "training":
        path = others[-1]
        Image.open(path).point(lambda value: min(value, 1)).save(path)  # the first class alone
        trainer(root, tmp_path, loss__class_weights=[0.5, 1, 1, 1, 0])
        with pytest.raises(UserError, match="no labelled pixel of a class whose weight is not 0 in training"):
            trainer(root, tmp_path, loss__class_weights=[0, 1, 1, 1, 1])
    else:
        with pytest.raises(UserError, match="no labelled pixel in validation"):
            trainer(root, tmp_path, eval__max_images=1)


def test_a_minute_without_a_line_says_the_step(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.logs.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, 100, tensorboard=False)
    log.start(0, -1)
    for step, now[0] in ((1, 50.0), (2, 61.0), (3, 90.0)):
        log.advance(step)
    log.train(4, {"loss": 1.0, "lr": 1e-3, "images_per_s": 2.0, "seconds_per_step": 3.0})
    for step, now[0] in ((5, 149.0), (6, 151.0)):
        log.advance(step)
    RunLog(tmp_path, 100, main=False, tensorboard=False).advance(7)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {step}/100" for step in (2, 4, 6)
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_labels_that_may_start_at_0_are_told_once(first, tmp_path, capsys):
    data = make_data(tmp_path / "own")
    for path in (data / "annotations").rglob("*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.maximum(labels, 1) - (1 - first)).save(path)
    of = trainer(data, tmp_path, train__steps=2, train__eval_every=1)
    of.train()
    hint = "label 5, the last class's, occurs nowhere in validation, and 4 does"
    assert capsys.readouterr().out.count(hint) == 1 - first
