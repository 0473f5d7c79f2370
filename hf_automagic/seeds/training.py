"""The first seed's ways to train: quantise late, quantise less where the loss turns up, quantise by own rules."""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.loss_hook import find_loss
from ..peft import param_groups
from .classes import Automagic_CameAMP_8Bit, Params
from .config import Optimizer8BitConfig

logger = logging.getLogger(__name__)

COMPARED = 100  # losses in each of the two means that AdaptiveOptimizer compares
WORSE = 1.1  # ratio of the means from which on it quantises less
SMALLEST_BLOCK = 128  # that it goes down to


def progressive_quantization_training(
    model: nn.Module,
    dataloader: Iterable[Any],
    total_epochs: int,
    train_epoch: Callable[[Any, Any, Any], Any] | None = None,
    config: Optimizer8BitConfig | None = None,
) -> Automagic_CameAMP_8Bit:
    """Trains a first quarter of the epochs with fp32 states, converts them to 8 bits, and trains the rest.

    The states are converted and none is lost, where the seed's own snippet starts a new optimizer.

    Args:
        model: what to train.
        dataloader: gone through once an epoch.
        total_epochs: the states change at epoch `total_epochs // 4`.
        train_epoch: trains one epoch, given model, optimizer and dataloader; by default a step for each batch, with
            the loss that `model(**batch)` or `model(*batch)` returns.
        config: options of both stages; by default blocks of 128 with error correction, the seed's second stage.

    Returns:
        The optimizer.
    """
    config = config or Optimizer8BitConfig(block_size=128)
    groups = param_groups(model, weight_decay=config.weight_decay)
    optimizer = Automagic_CameAMP_8Bit(groups, **{**vars(config), "quantize_states": False})
    for epoch in range(total_epochs):
        if epoch == total_epochs // 4:
            optimizer.set_quantization(True)
        (train_epoch or _train_epoch)(model, optimizer, dataloader)
    return optimizer


def _train_epoch(model: nn.Module, optimizer: Automagic_CameAMP_8Bit, dataloader: Iterable[Any]) -> None:
    for batch in dataloader:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        loss = find_loss(output)
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} returned no loss, got {type(output).__name__}; pass your own train_epoch"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)


class AdaptiveOptimizer:
    """Steps with `Automagic_CameAMP_8Bit` and halves its block size while the loss gets worse.

    Every 100 steps the mean of the last 100 losses is compared with that of the 100 before; where it is more than 1.1
    times as large, the live states are requantised in blocks of half the size, down to 128.

    Args:
        model_params: what to train.
        base_config: options to start from; a copy is kept, whose `block_size` tells the present one.
    """

    def __init__(self, model_params: Params, base_config: Optimizer8BitConfig) -> None:
        """Builds the optimizer."""
        self.base_config = dataclasses.replace(base_config)
        self.optimizer = Automagic_CameAMP_8Bit(model_params, **vars(self.base_config))
        self._losses: deque[Tensor] = deque(maxlen=2 * COMPARED)  # on the device: read when they are compared
        self._steps = 0

    @property
    def performance_history(self) -> list[float]:
        """The last losses, 200 at most, oldest first; reads the device."""
        return torch.stack(list(self._losses)).tolist() if self._losses else []

    def step_with_adaptation(self, loss: Tensor) -> None:
        """Takes the gradients of a loss and one step, and adapts where it is due."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(loss=loss)
        self._losses.append(loss.detach().to(torch.float32).reshape(()))
        self._steps += 1
        if self._steps % COMPARED == 0 and self._steps >= 2 * COMPARED:
            self._adapt_configuration()

    def _adapt_configuration(self) -> None:
        history = self.performance_history
        older, recent = sum(history[:COMPARED]) / COMPARED, sum(history[COMPARED:]) / COMPARED
        halved = self.base_config.block_size // 2
        if recent > WORSE * older and halved >= SMALLEST_BLOCK:
            self.optimizer.requantize(block_size=halved)
            self.base_config.block_size = halved
            logger.info("the mean loss rose from %.4g to %.4g: block size %d from here", older, recent, halved)


class CustomQuantizationStrategy:
    """The first seed's example of own rules, for `quantization_strategy=`; any object with both methods will do."""

    @staticmethod
    def should_quantize(param_name: str, param_shape: torch.Size, param_type: str) -> bool:
        """Returns whether a parameter has more than 10,000 elements."""
        return param_shape.numel() > 10_000

    @staticmethod
    def get_block_size(param_shape: torch.Size) -> int:
        """Returns 512 above a million elements, 256 above a hundred thousand, else 128."""
        return 512 if param_shape.numel() > 1_000_000 else 256 if param_shape.numel() > 100_000 else 128
