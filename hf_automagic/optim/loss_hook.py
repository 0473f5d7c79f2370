"""A forward hook that shows a model's training loss to its optimizer, so that no training loop needs rewriting."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .losses import LossIntake


def attach_loss_hook(model: nn.Module, optimizer: Any) -> RemovableHandle:
    """Lets the optimizer see the losses that the model's own forward computes while it trains.

    A call counts when gradients are on, the model is in training mode and its loss requires a gradient. The
    micro-batches of a step are averaged; they are summed where `num_items_in_batch` was passed, because each loss is
    then a share of the step's. Neither the model nor the optimizer keeps the other alive, and copies of the model are
    not listened to. Attaching the same two again replaces the hook.

    Args:
        model: the module that the training loop calls; its output has `loss`, or is a tuple that starts with a scalar.
        optimizer: an Automagic; not a wrapper around one.

    Returns:
        A handle whose `remove()` takes the hook off.

    Raises:
        TypeError: the optimizer takes no losses.
    """
    intake = getattr(optimizer, "loss_intake", None)
    if not isinstance(intake, LossIntake):
        kind = type(optimizer).__name__
        raise TypeError(f"attach_loss_hook needs an Automagic, got {kind}; of a wrapper pass the optimizer inside")
    if model in intake.hooks:
        intake.hooks[model].remove()
    intake.hooks[model] = model.register_forward_hook(LossHook(optimizer), with_kwargs=True)
    return intake.hooks[model]


def detach_loss_hooks(optimizer: Any) -> None:
    """Takes every hook of an Automagic off the models that it sits on."""
    for handle in list(optimizer.loss_intake.hooks.values()):
        handle.remove()
    optimizer.loss_intake.hooks.clear()


class LossHook:
    """Shows the loss in a forward's output to one optimizer; its copy, in a copied or pickled model, shows nothing."""

    def __init__(self, optimizer: Any = None) -> None:
        """Remembers the optimizer weakly; without one the hook does nothing."""
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copies and pickles as a hook without an optimizer."""
        return LossHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Shows the loss of a training call; the output stays as it is."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or not (module.training and torch.is_grad_enabled()):
            return
        loss = find_loss(output)
        if loss is not None and loss.requires_grad:
            optimizer.loss_intake.notice(loss, is_share=kwargs.get("num_items_in_batch") is not None)


def find_loss(output: Any) -> Tensor | None:
    """Returns the loss in a model's output: `output.loss`, `output["loss"]`, the first of a tuple, the output itself.

    A named loss may hold a number for each device and is averaged; without a name only a scalar counts  # []
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named.mean() if named.is_floating_point() and named.numel() else None
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() and first.ndim == 0 else None
