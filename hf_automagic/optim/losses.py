"""Loss intake: collects what a step is told about its loss, for the context, without reading it back."""

import logging
import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)


class LossIntake:
    """Collects the losses of the coming step from those who hand them over and from hooks that see them pass.

    What is handed over wins: a closure on a hooked model would count the same loss twice. Only running sums are kept,
    so that a model that is never stepped piles nothing up.
    """

    def __init__(self) -> None:
        """Starts without a loss and without hooks."""
        self.hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
        self._handed, self._hooked = _RunningLoss(), _RunningLoss()
        self.expects_losses = True  # off where it is known, or has been said, that none come

    def hand_over(self, loss: Tensor | float, *, is_share: bool = False) -> None:
        """Takes a loss from the training loop.

        Args:
            loss: one number, on any device.
            is_share: the micro-batches of a step add up to its loss; otherwise they are averaged.

        Raises:
            ValueError: the loss is not one number.
        """
        self._handed.add(loss, is_share)

    def notice(self, loss: Tensor, *, is_share: bool = False) -> None:
        """Takes a loss that a hook saw pass; see `hand_over`."""
        self._hooked.add(loss, is_share)

    def clear(self) -> None:
        """Forgets what was collected."""
        self._handed, self._hooked = _RunningLoss(), _RunningLoss()

    def take(self, device: torch.device, *, may_lack: bool = False) -> Tensor:
        """Returns the step's loss and forgets it: the mean over all ranks, NaN where none saw one  # [], float32.

        Every rank of a distributed run must call it once a step, with a loss or without.

        Args:
            device: where the loss is wanted.
            may_lack: nothing needs to be said of a step without a loss.
        """
        loss = self._handed.value() if self._handed.count else self._hooked.value()
        if not (may_lack or self._handed.count + self._hooked.count):
            self._say_once()
        self.clear()
        return _mean_over_ranks(loss, device)

    def _say_once(self) -> None:
        if self.expects_losses:
            logger.warning(
                "context is on and this step saw no loss: the context follows the gradients alone. Use step(closure), "
                "step(loss=loss), observe_loss(loss) or attach_loss_hook(model, optimizer)."
            )
        self.expects_losses = False


class _RunningLoss:
    """The losses of the micro-batches of one step, summed as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None
        self._are_shares = False

    def add(self, loss: Tensor | float, is_share: bool) -> None:
        if not isinstance(loss, Tensor):
            loss = torch.full((), float(loss))
        if loss.numel() != 1:
            raise ValueError(f"a loss must be one number, got a tensor of shape {tuple(loss.shape)}; pass loss.mean()")
        # a copy: loops divide their loss in place once it has been seen
        loss = loss.detach().to(torch.float32, copy=True).reshape(())
        self._total = loss if self._total is None else self._total + _move(loss, self._total.device)
        self._are_shares |= is_share
        self.count += 1

    def value(self) -> Tensor | None:
        if self._total is None or self._are_shares:
            return self._total
        return self._total / self.count


def _mean_over_ranks(loss: Tensor | None, device: torch.device) -> Tensor:
    """Averages over the ranks that saw a loss; the others take part with a count of zero  # [], float32."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not joined or torch.distributed.get_world_size() == 1:
        return torch.full((), torch.nan, device=device) if loss is None else _move(loss, device)
    pair = torch.zeros(2, device=device)
    if loss is not None:
        pair = torch.stack([_move(loss, device), torch.ones((), device=device)])
    torch.distributed.all_reduce(pair)
    return pair[0] / pair[1]


def _move(loss: Tensor, device: torch.device) -> Tensor:
    """Moves to a device; only a copy to the host waits, since its reader would not."""
    return loss.to(device, non_blocking=device.type != "cpu")
