"""Optimiser, parameter groups and learning-rate schedule.

The learning rate is a function of the step alone: resuming needs no scheduler state.
"""

from __future__ import annotations

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from train.schema import Optim


def create_optimizer(model: nn.Module, optim: Optim, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over ``parameter_groups``. ``fused`` (CUDA) also spares the loss scaler its host sync."""
    groups = parameter_groups(model, optim.weight_decay, optim.layer_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused or None)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused or None)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups with ``weight_decay`` and ``lr_scale``, covering every trainable parameter exactly once.

    The backbone's i-th of n layers (timm's ``group_matcher``: the stem counts as the first, the final norm
    belongs to the last block) learns ``layer_decay ** (n - 1 - i)`` times as fast as the decoder. Vectors and
    scalars (norms, biases, step sizes) and the position, class-token and class embeddings do not decay.
    """
    spared = model.no_weight_decay()
    vit, prefix = model.backbone.vit, "backbone.vit."
    groups = param_groups_layer_decay(
        vit,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        no_weight_decay_list={name.removeprefix(prefix) for name in spared if name.startswith(prefix)},
    )
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            (no_decay if parameter.ndim <= 1 or name in spared else decay).append(parameter)
    groups.append({"params": decay, "weight_decay": weight_decay, "lr_scale": 1.0})
    groups.append({"params": no_decay, "weight_decay": 0.0, "lr_scale": 1.0})
    return [group for group in groups if group["params"]]


def learning_rate(step: int, total_steps: int, optim: Optim) -> float:
    """Rate of the ``step``-th update (from 0): linear warm-up, then polynomial decay to ``min_lr``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 - min(1.0, done)) ** optim.poly_power


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
