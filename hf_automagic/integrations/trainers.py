"""What a Trainer can do for an optimizer that its constructor cannot: groups of the model, losses, an introduction.

Everything here works on stock classes, `Trainer` and those of TRL; `AutomagicTrainerMixin` adds what these cannot do.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks import logs_keys, update_cards
from ..optim.automagic import Automagic
from ..optim.loss_hook import attach_loss_hook, detach_loss_hooks
from ..peft import param_groups
from ..registry import list_optimizers
from ..reporting.banner import show_banner_logs
from ..reporting.rates import unwrap_optimizer
from ..trainer import AutomagicTrainerMixin
from .training_arguments import describe_law, optim_name

logger = logging.getLogger(__name__)

# Whose compute_loss steps on the loss in the model's output. TRL's others make theirs of log-probabilities, and what
# their models return as loss beside these is another one.
STEP_ON_THE_MODELS_LOSS = {"transformers.trainer.Trainer", "trl.trainer.sft_trainer.SFTTrainer"}


def create_optimizer_with_care(trainer: Any, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `Trainer.create_optimizer`, and looks after an Automagic that comes of it.

    A class handed to the Trainer as `optimizer_cls_and_kwargs` gets our groups, so that roles, rails and pairs are
    those of the model. A context gets the model's losses. A new optimizer is introduced.

    Args:
        trainer: any Trainer.
        create: the method as transformers has it.
        *args: of the method; newer versions may hand over the model.
        **kwargs: likewise.

    Returns:
        What the method returned.
    """
    model = kwargs.get("model", args[0] if args else None)
    model = trainer.model if model is None else model
    is_new, chosen = trainer.optimizer is None, trainer.optimizer_cls_and_kwargs
    if is_new:
        trainer.optimizer_cls_and_kwargs = _with_our_groups(chosen, model, trainer.args.weight_decay)
    try:
        optimizer = create(trainer, *args, **kwargs)
    finally:
        trainer.optimizer_cls_and_kwargs = chosen
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, Automagic):
        _listen(trainer, inner, model)
        _sign_cards(trainer)
        if is_new and trainer.args.should_log:
            show_banner_logs()
            logger.info("%s", _introduction(trainer, inner))
    return optimizer


def _with_our_groups(
    chosen: tuple[Any, dict[str, Any]] | None, model: nn.Module, weight_decay: float
) -> tuple[Any, dict[str, Any]] | None:
    """Completes the choice of a class of ours by groups of the model, where the user made none."""
    cls, kwargs = chosen or (None, {})
    if "params" in kwargs or not (isinstance(cls, type) and issubclass(cls, Automagic)):
        return chosen
    return cls, {"params": param_groups(model, weight_decay=weight_decay), **kwargs}


# Losses.


def _listen(trainer: Any, optimizer: Automagic, model: nn.Module) -> None:
    """Lets the context see the losses that the Trainer steps on, or tells it that none will come."""
    if not _has_context(optimizer):
        return
    if not any(isinstance(callback, _LossWindow) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(_LossWindow())
    detach_loss_hooks(optimizer)  # of a model that the Trainer has wrapped since
    if _follows_gradients_alone(trainer, optimizer):
        optimizer.loss_intake.expects_losses = False
    elif not isinstance(trainer, AutomagicTrainerMixin):
        attach_loss_hook(model, optimizer)


def _has_context(optimizer: Automagic) -> bool:
    return any(group["context"] for group in optimizer.param_groups)


def _follows_gradients_alone(trainer: Any, optimizer: Automagic) -> bool:
    """Whether a context sees no loss, because a stock Trainer computes it where no hook of the model passes."""
    is_stock = not isinstance(trainer, AutomagicTrainerMixin)
    return _has_context(optimizer) and is_stock and _computes_own_loss(trainer)


def _computes_own_loss(trainer: Any) -> bool:
    """Whether the loss that a Trainer steps on is another one than its model returns."""
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    return (
        f"{owner.__module__}.{owner.__qualname__}" not in STEP_ON_THE_MODELS_LOSS
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
        or getattr(trainer.args, "loss_type", "nll") == "dft"  # TRL's SFT, reweighted outside the model
    )


class _LossWindow(TrainerCallback):
    """Forgets losses that no step took: of a step that the fp16 scaler skipped, of a batch that ran out of memory."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Begins to collect the losses of a step."""
        inner = unwrap_optimizer(event.get("optimizer"))
        if isinstance(inner, Automagic):
            inner.loss_intake.clear()


# The card.


def _sign_cards(trainer: Any) -> None:
    """Puts our section into the cards of a stock Trainer: it writes them after the last event for callbacks."""
    if isinstance(trainer, AutomagicTrainerMixin) or "create_model_card" in vars(trainer):
        return
    write_card = trainer.create_model_card

    @functools.wraps(write_card)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        write_card(*args, **kwargs)
        update_cards(trainer)

    trainer.create_model_card = create_model_card


# The banner.


def _introduction(trainer: Any, optimizer: Automagic) -> str:
    """Says whose settings count, what the optimizer found, and what this Trainer cannot do with it."""
    is_string = trainer.optimizer_cls_and_kwargs is None and optim_name(trainer.args) in list_optimizers()
    law = [describe_law(trainer.args)] if is_string else []
    return "\n".join([*law, optimizer.describe(), *_lacks(trainer, optimizer)])


def _lacks(trainer: Any, optimizer: Automagic) -> list[str]:
    """Says in a line what a stock class cannot do, with the remedy; nothing under the mixin."""
    name, lacks = type(trainer).__name__, []
    if not (logs_keys(trainer) or isinstance(trainer, AutomagicTrainerMixin)):
        lacks.append("the logs hold the schedule's learning_rate, and no optim/lr_mean or other key of ours")
    if _follows_gradients_alone(trainer, optimizer):
        lacks.append(f"the context follows the gradients alone, as {name} computes its loss outside the model")
    if not lacks:
        return []
    ours = (
        "hf_automagic.AutomagicTrainer"
        if name == "Trainer"
        else f"class My{name}(hf_automagic.AutomagicTrainerMixin, {name})"
    )
    return [f"Stock {name}: {'; '.join(lacks)}. {ours} mends that."]
