"""The training loop.

A step is ``train.accumulate`` micro-steps and one update. Its loss is the mean over all valid pixels of all
micro-steps of all processes, so that neither the number of processes nor that of micro-steps changes what is
computed. Between log steps nothing waits for the device: losses and gradient norms stay there.

What a resumed run needs to go on exactly as if never interrupted is in ``Trainer.state``; the data order and
everything random about a sample are functions of (seed, epoch, sample) and need no state.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from depict_kernels import ops
from train import build, checkpoint, optim
from train.ade20k import may_start_at_0
from train.config import scoring, to_dict
from train.distributed import World, gather, on_main, sum_over
from train.errors import UserError
from train.inference import evaluate
from train.interrupts import undivided
from train.loader import to_device, train_loader
from train.logs import RunLog
from train.metrics import SegmentationMetrics
from train.schema import Config, Loss
from train.transforms import DeviceAugment

# So many updates in a row without a finite gradient are no longer the loss scaler looking for its scale.
MOST_SKIPPED_IN_A_ROW = 50


class LossModule(nn.Module):
    """The model's loss as a forward, which is what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.ignore_index = ops.default_ignore_index(model.num_classes)
        self.label_smoothing = loss.label_smoothing
        weights = loss.class_weights
        if weights is not None and len(weights) != model.num_classes:
            raise UserError(
                f"loss.class_weights: {len(weights)} weights for {model.num_classes} classes; one each is right"
            )
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """images (b, 3, H, W) float, target (b, H, W) -> sum of the loss over the valid pixels, a scalar."""
        return self.model.loss(
            images,
            target,
            ignore_index=self.ignore_index,
            weight=self.weights,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def valid_weight(self, target: Tensor) -> Tensor:
        """What a mean over ``target`` divides by: its valid pixels, each times its class weight; float64."""
        valid = target != self.ignore_index
        if self.weights is None:
            return valid.sum(dtype=torch.float64)
        known = target.long().clamp(0, len(self.weights) - 1)
        return (self.weights[known] * valid).sum(dtype=torch.float64)


class Trainer:
    """One training run in ``folder``. ``resume`` is the state of a checkpoint, None to start."""

    def __init__(
        self, config: Config, world: World, folder: Path, resume: dict[str, Any] | None = None
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.device = world.device
        root = build.data_root(config, world)
        self.classes = build.class_list(config, root)
        self.train_set = build.split(config, root, config.data.train_split, self.classes)
        self.val_set = build.split(config, root, config.data.val_split, self.classes)
        self.train_set.require_labels(weights=config.loss.class_weights)
        self.val_set.require_labels(config.eval.max_images)

        _seed(config.train.seed)
        self.model = build.model(config, self.classes.num_classes, weights=resume is None)
        self.anew = build.start_weights(self.model, config) if resume is None else []
        self.model.to(self.device)
        self.loss_module = LossModule(self.model, config.loss).to(self.device)
        self.augment = DeviceAugment(self.model.mean, self.model.std, config.data.photometric_distortion)
        self.optimizer = optim.create_optimizer(self.model, config.optim, fused=self.device.type == "cuda")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")
        decay = config.train.ema_decay
        self.ema = None if decay is None else ModelEmaV3(self.model, decay, use_warmup=True)

        images_per_step = config.data.batch_size * config.train.accumulate
        self.steps_per_epoch = len(self.train_set) / images_per_step
        self.total_steps = config.train.steps or max(1, round(config.train.epochs * self.steps_per_epoch))
        self.eval_every = config.train.eval_every or max(1, round(self.steps_per_epoch))

        self.step = 0
        self.saved_step: int | None = None  # what last.pt holds
        self.images_before = len(self.train_set)  # at the checkpoint
        self.evaluated_step = -1
        self.best_miou, self.best_step = -1.0, -1
        self.scored_otherwise: list[str] = []  # why best_miou is no score of this configuration
        self.untrained_miou: float | None = None
        self.doubted = False
        # One row per step since the last log line: loss of this process's share, norm of the gradient.
        self.window = torch.zeros(min(config.train.log_every, self.total_steps), 2, device=self.device)
        self.window_images: list[list[int]] = []
        # Steps without a finite gradient: in all, and in a row.
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._clock, self._clock_step = 0.0, 0  # when the training was at which step
        self.log = RunLog(folder, self.total_steps, main=world.main, tensorboard=config.train.tensorboard)

        # Different from here on: each process drops other paths.
        _seed(config.train.seed + 1_000_003 * (world.rank + 1))
        if resume is not None:
            self._restore(resume)

        forward: nn.Module = self.loss_module
        if config.train.compile:
            forward = torch.compile(forward)
        if world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)
            # The argument of this name is deprecated from torch 2.13 on, its successor unknown before.
            forward.broadcast_buffers = False
        self.forward = forward

    # -------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Runs from the current step to the last one.

        Ctrl-C lets the step end and saves it (one process; of several the last checkpoint stays as it is), and is
        raised as a KeyboardInterrupt that says where the run goes on.
        """
        self.log.start(self.step, self.evaluated_step)
        try:
            if self.step == 0 and self.evaluated_step < 0 and self.config.train.score_untrained:
                self.untrained_miou = self.evaluate_now(self.model)["miou"]
            if self.scored_otherwise:
                self._score_best_again()
            if self._evaluation_due():  # interrupted between a step and its evaluation
                self._evaluate()
            self._loop()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._where_it_goes_on()) from None
        finally:
            self.log.stop()

    def _loop(self) -> None:
        settings = self.config.train
        batches = iter(
            train_loader(
                self.train_set,
                self.config.data,
                seed=settings.seed,
                rank=self.world.rank,
                world_size=self.world.size,
                start_step=self.step * settings.accumulate,
                pin_memory=self.device.type == "cuda",
            )
        )
        self.forward.train()
        self._clock, self._clock_step = time.perf_counter(), self.step
        try:
            while self.step < self.total_steps:
                micro_batches = [next(batches) for _ in range(settings.accumulate)]
                with undivided() if self.world.size == 1 else contextlib.nullcontext():
                    self._update(micro_batches)
                    self.step += 1
                due = self._evaluation_due()
                if self.step % settings.log_every == 0 or self.step == self.total_steps:
                    self._report()
                self.log.advance(self.step)
                if due or self.step % settings.save_every == 0:
                    self.save()
                if due:
                    self._evaluate()
        except KeyboardInterrupt:
            # Of several processes each is at another place.
            if self.world.size == 1 and self.saved_step != self.step > 0:
                self.save()
            raise

    def _where_it_goes_on(self) -> str:
        if self.saved_step is None:
            return "stopped before the first checkpoint: the same command starts from the beginning"
        again = "the same command without run.overwrite" if self.config.run.overwrite else "the same command"
        return f"stopped; {self.folder / 'last.pt'} holds step {self.saved_step}: {again} goes on there"

    def _update(self, batches: list[dict[str, Any]]) -> None:
        settings = self.config.optim
        self.window_images.append([i for batch in batches for i in batch["index"].tolist()])
        row = self.window[len(self.window_images) - 1].zero_()
        batches = [to_device(batch, self.device) for batch in batches]
        valid = sum(self.loss_module.valid_weight(batch["target"]) for batch in batches)
        sum_over(self.world, valid)
        # Gradients are averaged over the processes, hence the factor; nothing valid anywhere gives 0, not NaN.
        scale = torch.where(valid > 0, self.world.size / valid, 0.0).float()

        for i, batch in enumerate(batches):
            images, target = self.augment(batch)
            last = i == len(batches) - 1
            accumulating = self.world.size > 1 and not last
            with self.forward.no_sync() if accumulating else contextlib.nullcontext():
                with self.autocast():
                    loss = self.forward(images, target) * scale
                self.scaler.scale(loss).backward()
            row[0] += loss.detach() / self.world.size

        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_grad or math.inf)
        row[1] = norm
        skipped = ~torch.isfinite(norm)
        self.skipped[0] += skipped
        self.skipped[1] = (self.skipped[1] + 1) * skipped
        optim.set_learning_rate(
            self.optimizer, optim.learning_rate(self.step, self.total_steps, self.config.optim)
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, self.step + 1)

    def autocast(self) -> torch.autocast:
        """Around the model, as ``train.precision`` has it."""
        dtype = build.autocast_dtype(self.config)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    # ------------------------------------------------------------------------------ what needs the device

    def _check(self) -> list[list[float]]:
        """The window so far as [loss over all processes, gradient norm] per step; raises on NaN and the like."""
        try:
            ops.raise_on_bad_target()
        except ValueError as error:
            raise UserError(
                f"up to step {self.step}: {error}; `python train/run.py check-data` names the file"
            ) from None
        window = self.window[: len(self.window_images)].clone()
        window[:, 0] = sum_over(self.world, window[:, 0].contiguous())
        rows = window.tolist()
        in_a_row = self.skipped[1].item()
        if self.scaler.is_enabled():
            if in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"the gradient was not finite in {in_a_row} steps in a row up to step {self.step}, at any "
                    f"loss scale. {self._remedy()}"
                )
            return rows
        for i, (loss, norm) in enumerate(rows):
            if not math.isfinite(loss) or not math.isfinite(norm):
                step = self.step - len(rows) + i + 1
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                names = ", ".join(self.train_set.names[index] for index in self.window_images[i][:8])
                raise UserError(
                    f"{what} at step {step} (images of process {self.world.rank}: {names}). {self._remedy()}"
                )
        return rows

    def _remedy(self) -> str:
        last = self.folder / "last.pt"
        kept = f"{last} is kept as it was before" if last.exists() else "No checkpoint had been written yet"
        return (
            f"{kept}. Lower --optim.lr, set --optim.clip_grad 1.0, lengthen --optim.warmup_steps or use "
            "--train.precision fp32; `python train/run.py check-data` looks for bad files"
        )

    def _report(self) -> None:
        rows = self._check()
        finite = [row for row in rows if math.isfinite(row[0])] or rows
        seconds = (time.perf_counter() - self._clock) / max(1, self.step - self._clock_step)
        images = self.config.data.batch_size * self.config.train.accumulate
        values = {
            "epoch": self.step / self.steps_per_epoch,
            "loss": sum(loss for loss, _ in finite) / len(finite),
            "grad_norm": rows[-1][1],
            "lr": optim.learning_rate(self.step - 1, self.total_steps, self.config.optim),
            "images_per_s": images / seconds,
            "seconds_per_step": seconds,
        }
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
            values["skipped_steps"] = self.skipped[0].item()
        self.log.train(self.step, values)
        self.window_images.clear()
        self._clock, self._clock_step = time.perf_counter(), self.step

    # ------------------------------------------------------------------------------------------ evaluation

    def _evaluation_due(self) -> bool:
        due = self.step > 0 and (self.step % self.eval_every == 0 or self.step == self.total_steps)
        return due and self.evaluated_step < self.step

    def evaluate_now(self, model: nn.Module) -> dict[str, Any]:
        """Scores of ``model`` on the validation split, logged; the random generators stay as they were."""
        begun = time.perf_counter()
        results = self._scores(model)
        shown = {key: results[key] for key in ("miou", "pixel_accuracy", "mean_accuracy")}
        self.log.evaluation(self.step, shown)
        self.evaluated_step = self.step
        self._clock += time.perf_counter() - begun  # the evaluation's time is not the training's
        return results

    def _scores(self, model: nn.Module) -> dict[str, Any]:
        before = checkpoint.rng_state(self.device)
        metrics = self.measure(model)
        checkpoint.set_rng_state(before, self.device)
        self._doubt_labels((metrics.confusion.sum(1) > 0).cpu().numpy())
        return metrics.results()

    def _doubt_labels(self, seen: np.ndarray) -> None:
        """Says once where 0 may be a class of the annotations: all classes would be off by one, and train."""
        data, last = self.config.data, self.classes.num_classes
        if self.doubted or not data.reduce_zero_label or self.config.eval.max_images is not None:
            return
        self.doubted = True
        if may_start_at_0(seen):
            self.log.say(
                f"warning: label {last}, the last class's, occurs nowhere in {data.val_split}, and {last - 1} does: if "
                "0 is the first class and not unlabelled, give --data.reduce_zero_label false"
            )

    def measure(self, model: nn.Module) -> SegmentationMetrics:
        """The confusion matrix of ``model`` over the validation split, every process doing its share."""
        return evaluate(
            model,
            self.val_set,
            self.config.eval,
            world=self.world,
            amp_dtype=build.autocast_dtype(self.config),
            progress=self.log.evaluating,
        )

    def _evaluate(self) -> None:
        results = self.evaluate_now(self.averaged)
        if results["miou"] > self.best_miou:
            self.best_miou, self.best_step = results["miou"], self.step
            state = {
                "step": self.step,
                "miou": self.best_miou,
                "model": self.averaged.state_dict(),
                "config": to_dict(self.config),
                "classes": list(self.classes.names),
            }
            on_main(self.world, lambda: checkpoint.save(self.folder / "best.pt", state))
        self.save()

    def _score_best_again(self) -> None:
        """Later models are compared with best.pt under this configuration, not with its score under another one."""
        best = copy.deepcopy(self.model)  # its memory is that of the gradients, which are not there yet
        state = self.load_best(best)
        self.best_miou, self.best_step = self._scores(best)["miou"], state["step"]
        state |= {"miou": self.best_miou}
        on_main(self.world, lambda: checkpoint.save(self.folder / "best.pt", state))
        why = "; ".join(self.scored_otherwise)
        self.log.say(f"best.pt of step {self.best_step} scored again ({why}): miou {self.best_miou:.4f}")

    def load_best(self, model: nn.Module) -> dict[str, Any]:
        """Loads the weights of best.pt into ``model``; the whole checkpoint."""
        path = self.folder / "best.pt"
        state = on_main(self.world, lambda: checkpoint.load(path))
        checkpoint.load_weights(model, state["model"], path, state["config"], self.config)
        return state

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    # --------------------------------------------------------------------------------------------- saving

    def save(self) -> None:
        """Writes last.pt, after making sure that it deserves the name of a good checkpoint."""
        rows = self._check()
        rng = gather(self.world, checkpoint.rng_state(self.device))
        on_main(self.world, lambda: checkpoint.save(self.folder / "last.pt", self.state(rows, rng)))
        self.saved_step = self.step

    def state(self, window: list[list[float]], rng: list[dict[str, Any]]) -> dict[str, Any]:
        """All that ``_restore`` needs; ``rng`` has one entry per process."""
        return {
            "step": self.step,
            "images": len(self.train_set),
            "evaluated_step": self.evaluated_step,
            "best_miou": self.best_miou,
            "best_step": self.best_step,
            "untrained_miou": self.untrained_miou,
            "window": window,
            "skipped": self.skipped.tolist(),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "config": to_dict(self.config),
            "classes": list(self.classes.names),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        path = Path(state.get("file", self.folder / "last.pt"))
        if state["step"] > self.total_steps:
            raise UserError(
                f"{path}: is at step {state['step']}, and this run would end at step {self.total_steps}; give more "
                "--train.steps (or --train.epochs)"
            )
        checkpoint.load_weights(self.model, state["model"], path, state["config"], self.config)
        if self.ema is not None:
            # A run that had no average yet starts one from its weights.
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        self._restore_optimizer(state, path)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated_step = state["step"], state["evaluated_step"]
        if path.resolve() == (self.folder / "last.pt").resolve():
            self.saved_step = self.step
        self.best_miou, self.best_step = state["best_miou"], state["best_step"]
        if self.best_step >= 0:
            keys = tuple(scoring(self.config))
            self.scored_otherwise = checkpoint.differences(state["config"], to_dict(self.config), keys)
        self.untrained_miou = None if self.scored_otherwise else state["untrained_miou"]
        self.images_before = state["images"]
        self.skipped.copy_(torch.tensor(state["skipped"]))
        # The losses are already summed over the processes: the main process carries them on. Where log_every was
        # another one, those since its last multiple count.
        since = self.step % self.config.train.log_every
        rows = state["window"][-since:] if since else []
        if rows:
            self.window[: len(rows)] = torch.tensor(rows)
            if not self.world.main:
                self.window[: len(rows), 0] = 0
        self.window_images = [[]] * len(rows)
        if len(state["rng"]) == self.world.size:
            checkpoint.set_rng_state(state["rng"][self.world.rank], self.device)
        else:  # another number of processes: the same data order, but other random paths
            _seed(self.config.train.seed + 7_000_003 * (self.step + 1) + self.world.rank)

    def _restore_optimizer(self, state: dict[str, Any], path: Path) -> None:
        """The optimiser's memory from the checkpoint; its settings (weight decay, betas, ...) are this run's."""
        changed = checkpoint.differences(state["config"], to_dict(self.config), ("optim.",))
        named = f" ({'; '.join(changed)})" if changed else ""
        refusal = UserError(f"{path}: its optimizer state does not fit this run's optimizer{named}")
        if any(text.startswith("optim.name:") for text in changed):
            raise refusal
        # The rate is set anew before every update.
        own = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError):
            raise refusal from None
        for group, settings in zip(self.optimizer.param_groups, own):
            group.update(settings)


def _seed(seed: int) -> None:
    """All generators that a model may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries may draw from it)
    torch.manual_seed(seed)
