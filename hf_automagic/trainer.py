"""The Trainer with our optimizer in view: true rates in all trackers, losses for the context, safe resumes, a card."""

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from .callbacks import CheckpointCallback, attach, is_training_log, update_cards
from .checkpoint import begin_checkpoint, find_problems, find_resumable_checkpoint, lacks_optimizer
from .optim.automagic import Automagic
from .reporting.rates import unwrap_optimizer
from .reporting.runs import optimizer_logs, snapshot_at_log

logger = logging.getLogger(__name__)

STOP_AFTER = 50  # skipped steps in a row: a run that stands still for so long does not recover by itself

_Base = Trainer if TYPE_CHECKING else object


class AutomagicTrainerMixin(_Base):
    """Makes any Trainer show what the optimizer really does, and resume exactly.

    ```python
    class MySFT(AutomagicTrainerMixin, SFTTrainer): ...
    ```

    Training logs get the keys `optim/...` before trackers see them. The optimizer sees the loss of each micro-batch.
    The output folder gets `optimizer_stats/`, the model card a section. bf16 adapters stay bf16 in a resume, where
    PEFT's loader makes them fp32. After 50 skipped steps in a row the run stops.

    Trainers differ in the arguments of these methods, and change them between versions, so the overrides hand over
    whatever they get: the one place where `**kwargs` passes through.

    Attributes:
        allow_fresh_optimizer: whether to resume from a checkpoint without optimizer state; the optimizer then starts
            afresh.
    """

    allow_fresh_optimizer: bool = False
    _kept: "_KeptParameters | None" = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Builds the Trainer, and puts our callbacks in front of its trackers; `remove_callback` takes one off."""
        super().__init__(*args, **kwargs)
        attach(self)
        if not any(isinstance(callback, CheckpointCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(CheckpointCallback())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; resumes from whole checkpoints only.

        With `resume_from_checkpoint=True` it takes the newest that is whole, and says which it passed over and why.

        Raises:
            ValueError: the checkpoint is broken, or lacks the optimizer's state while `allow_fresh_optimizer` is not
                set.
            RuntimeError: 50 steps in a row had a gradient that was not finite.
        """
        args, kwargs = self._with_whole_checkpoint(args, kwargs)
        # DeepSpeed and FSDP load without casting; model_init replaces the model, and must not find it held.
        loads_as_saved = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if isinstance(self.model, nn.Module) and self.model_init is None and not loads_as_saved:
            self._kept = _KeptParameters(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._kept = None

    def _with_whole_checkpoint(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments of `train` with the checkpoint that is resumed, after a look at its files."""
        given = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if not given:
            return args, kwargs
        needs_optimizer = not self.allow_fresh_optimizer
        if given is True:
            found = find_resumable_checkpoint(str(self.args.output_dir), needs_optimizer=needs_optimizer)
            given = True if found is None else str(found)  # without any, the Trainer's own message says so
        elif os.path.isdir(given) and (problems := find_problems(given, needs_optimizer=needs_optimizer)):
            raise ValueError(
                f"{os.path.basename(os.path.normpath(given))} cannot be resumed: {problems[0]}; "
                "resume_from_checkpoint=True finds the newest that can"
            )
        if given is not True and os.path.isdir(given) and lacks_optimizer(given):
            logger.warning("%s lacks the optimizer's state: the optimizer starts afresh", os.path.basename(given))
        return args[1:], {**kwargs, "resume_from_checkpoint": given}

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model; the first file of a checkpoint, which is not whole from here on until the last."""
        folder = kwargs.get("output_dir", args[0] if args else None)
        if folder is not None and self.is_in_train and self.args.should_save:
            begin_checkpoint(folder)
        super().save_model(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Creates the optimizer from parameters in the dtype that they had before a checkpoint was loaded."""
        if self._kept is not None:
            self._kept.put_back()
        return super().create_optimizer(*args, **kwargs)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the best model, which PEFT makes fp32 as it does a checkpoint's."""
        super()._load_best_model(*args, **kwargs)
        if self._kept is not None:
            self._kept.put_back()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes loss and gradients of a micro-batch, and shows the loss to the optimizer."""
        loss = super().training_step(*args, **kwargs)
        inner = unwrap_optimizer(self.optimizer)
        if isinstance(inner, Automagic):  # scaled by the Trainer so that a step's micro-batches add up to its loss
            inner.observe_loss(loss, is_share=True)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the keys `optim/...` in training logs.

        Raises:
            RuntimeError: 50 steps in a row had a gradient that was not finite.
        """
        is_training = is_training_log(logs) and self.optimizer is not None
        if is_training:
            logs.update(optimizer_logs(self.optimizer, self.state))
        super().log(logs, *args, **kwargs)
        snapshot = snapshot_at_log(self.optimizer, self.state) if is_training else None
        if snapshot is not None and snapshot.skipped_in_a_row >= STOP_AFTER:
            raise RuntimeError(
                f"{snapshot.skipped_in_a_row} steps in a row had a gradient that is not finite, the last in "
                f"{snapshot.offender}, and changed nothing; check the data, the loss and the precision"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card, with our section."""
        super().create_model_card(*args, **kwargs)
        update_cards(self)


class AutomagicTrainer(AutomagicTrainerMixin, Trainer):
    """transformers' Trainer with everything of AutomagicTrainerMixin."""


class _KeptParameters:
    """Remembers a model's parameters, and puts them back where loading an adapter cast them.

    PEFT makes 16-bit adapters fp32 as it loads them, in new Parameters (0.21) or in the same. Their values are those
    of the 16-bit file, so that casting back loses nothing; the old Parameters are the ones that an optimizer knows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (owner, name, param, param.dtype)
            for owner in model.modules()
            for name, param in owner.named_parameters(recurse=False)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for owner, name, param, dtype in self._held:
            present = dict(owner.named_parameters(recurse=False)).get(name)
            if present is None or present.dtype == dtype or present.shape != param.shape:
                continue
            if present is param:
                param.data = param.data.to(dtype)  # the only way to change the dtype of a Parameter that others hold
            else:
                param.copy_(present)
                setattr(owner, name, param)
