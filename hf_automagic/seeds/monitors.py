"""The first seed's monitors: they read an optimizer when they are called, log at INFO, and return what they read."""

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..optim.automagic import Automagic
from ..optim.groups import is_stepped
from .views import get_memory_stats, high_precision_states, quantized_states

logger = logging.getLogger(__name__)


class MemoryMonitor:
    """Takes training steps and logs the memory of the states every so many of them.

    Args:
        optimizer: an Automagic.
        log_frequency: steps between two lines.
    """

    def __init__(self, optimizer: Automagic, log_frequency: int = 100) -> None:
        """Starts at step 0."""
        self.optimizer, self.log_frequency, self.step_count = optimizer, log_frequency, 0

    def step(self, loss_fn: Callable[[], Tensor]) -> Tensor:
        """Takes one step on the loss that `loss_fn` computes, and returns the loss."""
        self.optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        self.optimizer.step(loss=loss)
        self.step_count += 1
        if self.step_count % self.log_frequency == 0:
            stats = get_memory_stats(self.optimizer)
            logger.info(
                "step %d: %.2f MB quantized, %.2f MB in high precision, %.2f%% of the same states in fp32",
                self.step_count,
                stats["total_quantized_memory"] / 2**20,
                stats["total_high_precision_memory"] / 2**20,
                100 * stats["compression_ratio"],
            )
        return loss.detach()


def check_memory_leak(optimizer: Automagic) -> dict[str, int]:
    """Collects garbage, then returns what is held: `optimizer_memory` and `gpu_memory` in bytes.

    Neither grows from one call to the next in a run that does not leak.
    """
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
    held = {
        "optimizer_memory": optimizer.memory_stats().total_bytes,
        "gpu_memory": torch.cuda.memory_allocated() if on_gpu else 0,
    }
    logger.info("optimizer %.2f MB, GPU %.2f MB", held["optimizer_memory"] / 2**20, held["gpu_memory"] / 2**20)
    return held


def check_quantization_quality(optimizer: Automagic) -> dict[int, dict[str, float]]:
    """Returns the relative L2 error that storing costs each state held as codes, by parameter and name.

    The log also names the norm of what rounding still owes, zero where `error_correction` is off.
    """
    errors: dict[int, dict[str, float]] = {}
    for number, states in quantized_states(optimizer).items():
        for name, state in states.items():
            if state.fields:
                errors.setdefault(number, {})[name] = error = float(state.relative_error)
                owed = float(state.error_accumulator.norm())
                logger.info("parameter %d, %s: relative error %.3g, owed %.3g", number, name, error, owed)
    return errors


def monitor_learning_rates(optimizer: Automagic) -> dict[int, dict[str, float]]:
    """Returns `min`, `max` and `mean` of the rates that each parameter's elements stepped with last."""
    masks = high_precision_states(optimizer)
    rates: dict[int, dict[str, float]] = {}
    position = 0
    for group, rate in zip(optimizer.param_groups, optimizer.get_learning_rates(), strict=True):
        for param in group["params"]:
            if is_stepped(param):
                own = masks.get(position, {}).get("lr_mask", torch.tensor(rate))
                found = {"min": float(own.min()), "max": float(own.max()), "mean": float(own.mean())}
                rates[position] = found
                logger.info("parameter %d: learning rate %s", position, found)
            position += 1
    return rates
