"""The arms: every optimizer under test, by name, built for a model at a starting rate."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_automagic import AutomagicConfig, create_automagic_optimizer

from .tasks import Task

Make = Callable[[nn.Module, Task, float], Optimizer]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One optimizer under test.

    Args:
        name: in tables and keys.
        make: builds it  # (model, task, starting rate)
        records: whether its step reads nothing on the host, so that a whole step can be recorded once and replayed.
        note: what it is, for the card.
        scheduled: whether the schedule acts on it.
    """

    name: str
    make: Make
    records: bool
    note: str
    scheduled: bool = True


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Lists what is trained."""
    return [p for p in model.parameters() if p.requires_grad]


def _ours(factor: float = 1.0, **options: Any) -> Make:
    """Ours as a user builds it; `factor` multiplies every role's rail."""

    def make(model: nn.Module, task: Task, lr: float) -> Optimizer:
        rail = {} if factor == 1.0 else {"max_lr": factor * AutomagicConfig.max_lr}
        return create_automagic_optimizer(model, lr=lr, new_modules=task.new_modules, **rail, **options)

    return make


def _one_rail(model: nn.Module, task: Task, lr: float) -> Optimizer:
    optimizer = create_automagic_optimizer(model, lr=lr, new_modules=task.new_modules, rail_steps=0)
    for group in optimizer.param_groups:
        group["max_lr"] = 1e-4 if group["is_full_weight"] else 1e-3
    return optimizer


def _adamw(model: nn.Module, task: Task, lr: float) -> Optimizer:
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, fused=True, capturable=on_gpu)


def _adamw_8bit(model: nn.Module, task: Task, lr: float) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trainable(model), lr=lr, weight_decay=0.0)


def _adafactor(model: nn.Module, task: Task, lr: float) -> Optimizer:
    return torch.optim.Adafactor(trainable(model), lr=lr)


def _came(model: nn.Module, task: Task, lr: float) -> Optimizer:
    from came_pytorch import CAME

    return CAME(trainable(model), lr=lr)


def _prodigy(model: nn.Module, task: Task, lr: float) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(trainable(model), lr=1.0, d0=lr)


def _schedule_free(model: nn.Module, task: Task, lr: float) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(trainable(model), lr=lr, warmup_steps=15)
    optimizer.train()
    return optimizer


def _ancestor(model: nn.Module, task: Task, lr: float) -> Optimizer:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.reference.ancestor import AncestorAutomagic

    return AncestorAutomagic(trainable(model), lr=lr)


OURS = "automagic_8bit"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(OURS, _ours(), True, "the string; the starting rate has no effect"),
        Arm("rails x0.3", _ours(0.3), True, "ours with every rail at 0.3"),
        Arm("rails x3", _ours(3.0), True, "ours with every rail at 3"),
        Arm("search", _ours(lr_search=True), True, "ours, climbing from the starting rate to the rail"),
        Arm("AdamW", _adamw, True, "torch, fused, no decay"),
        Arm("AdamW8bit", _adamw_8bit, False, "bitsandbytes"),
        Arm("Adafactor", _adafactor, False, "torch"),
        Arm("CAME", _came, False, "came-pytorch, as published"),
        Arm("Prodigy", _prodigy, False, "prodigyopt, lr 1, d0 = the starting rate"),
        Arm("schedule-free", _schedule_free, False, "AdamWScheduleFree, 15 steps of warm-up", scheduled=False),
        Arm("ancestor", _ancestor, False, "Automagic v1 with an exact mask; no schedule acts on it", scheduled=False),
        Arm("- roles and width", _one_rail, True, "one rail of 1e-3, full weights a tenth, as before this table"),
        Arm("- fall", _ours(rail_steps=0), True, "the rail stays up"),
        Arm("search, no drift", _ours(lr_search=True, lr_drift=0.0), True, "the plain hypergradient rule"),
        Arm("- 8 bits", _ours(quantize_states=False), True, "states in fp32"),
        Arm("- factoring", _ours(factored=False), True, "a full second moment; no row and column means"),
        Arm("+ element mask", _ours(lr_granularity="element"), True, "a rate for every element"),
        Arm("+ cautious", _ours(cautious=True), True, "cautious mask"),
        Arm("+ ALLoRA", _ours(allora=True), True, "row gains on LoRA"),
        Arm("+ context", _ours(context=True), True, "the C-Optim context"),
    )
}
