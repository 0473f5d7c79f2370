"""The Trainer with our optimizer in view: true rates in all trackers, losses for the context, safe resumes, a card."""

import logging
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from .callbacks import attach, is_training_log, update_cards
from .optim.automagic import Automagic
from .reporting.rates import unwrap_optimizer
from .reporting.runs import optimizer_logs, snapshot_at_log

logger = logging.getLogger(__name__)

STOP_AFTER = 50  # skipped steps in a row: a run that stands still for so long does not recover by itself

# As Trainer saves it: optimizer.pt, optimizer.bin and the folder optimizer_0 of FSDP, rank0-of-2-optimizer.pt of XLA.
OPTIMIZER_STATE = re.compile(r"(rank\d+-of-\d+-)?optimizer(\.(pt|bin).*|_\d+)")
SCHEDULER_STATE = "scheduler.pt"

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; refuses to resume from a checkpoint that lacks the optimizer's state.

        Raises:
            ValueError: the checkpoint lacks it, and `allow_fresh_optimizer` is not set.
            RuntimeError: 50 steps in a row had a gradient that was not finite.
        """
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if checkpoint and not self.is_deepspeed_enabled:
            checkpoint = get_last_checkpoint(str(self.args.output_dir)) if checkpoint is True else checkpoint
            _check_resume(checkpoint, self.allow_fresh_optimizer)
        # DeepSpeed and FSDP load without casting; model_init replaces the model, and must not find it held.
        loads_as_saved = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if isinstance(self.model, nn.Module) and self.model_init is None and not loads_as_saved:
            self._kept = _KeptParameters(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._kept is not None:
                self._kept.put_back()  # the best model, too, is loaded as fp32
                self._kept = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Creates the optimizer from parameters in the dtype that they had before a checkpoint was loaded."""
        if self._kept is not None:
            self._kept.put_back()
        return super().create_optimizer(*args, **kwargs)

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


def _check_resume(checkpoint: str | None, may_be_fresh: bool) -> None:
    """Raises, or says, that a checkpoint lacks what the Trainer would silently do without."""
    if checkpoint is None or not os.path.isdir(checkpoint):
        return  # the Trainer's own message says so
    files = os.listdir(checkpoint)
    if SCHEDULER_STATE in files and any(OPTIMIZER_STATE.fullmatch(name) for name in files):
        return
    name = os.path.basename(os.path.normpath(checkpoint))
    if not may_be_fresh:
        raise ValueError(
            f"{name} lacks optimizer.pt or {SCHEDULER_STATE}, so that the optimizer would silently start afresh; "
            "resume from one saved without save_only_model, or set trainer.allow_fresh_optimizer = True"
        )
    logger.warning("%s lacks the optimizer's state: the optimizer starts afresh", name)


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
