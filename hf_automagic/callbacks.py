"""Callbacks for any Trainer: rates really applied, events, memory, and the files, plots and card that a run leaves.

The `**event` of their methods is transformers' protocol: an event brings what the Trainer has at hand.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checkpoint import write_manifest
from .optim.automagic import Automagic
from .optim.events import Event, EventCode
from .reporting.card import start_card, update_card
from .reporting.plots import draw_plots
from .reporting.rates import unwrap_optimizer
from .reporting.runs import begin_run, optimizer_logs, snapshot_at_log
from .reporting.stats import RunRecord, StatsWriter, describe_event, describe_run

logger = logging.getLogger(__name__)

KEPT_EVENTS = 100  # in trainer_state.json, which is written with every checkpoint


def is_training_log(logs: dict[str, Any] | None) -> bool:
    """Says whether a log is one of training steps, and neither of an evaluation nor the summary at the end."""
    return logs is not None and "loss" in logs


def attach(trainer: Any, *callbacks: TrainerCallback) -> None:
    """Puts callbacks of this module in front of a Trainer's trackers, so that these see the keys `optim/...`.

    `AutomagicTrainer` does so by itself. A stock Trainer calls trackers before the callbacks that it is given.

    Args:
        trainer: any Trainer, before `train()`.
        *callbacks: what to attach unless one of its kind is there; without any, an `OptimizerStatsCallback` and an
            `EdgeCaseCallback`.
    """
    present = trainer.callback_handler.callbacks
    kinds = {type(callback) for callback in present}
    added = list(callbacks) or [OptimizerStatsCallback(), EdgeCaseCallback()]
    ours = [callback for callback in present if isinstance(callback, _LoggingCallback)]
    ours += [callback for callback in added if type(callback) not in kinds]
    present[:] = ours + [callback for callback in present if callback not in ours]


def update_cards(trainer: Any) -> None:
    """Puts the section into the model card that a Trainer has just written, where it keeps statistics."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, OptimizerStatsCallback):
            callback.update_card(trainer.args.output_dir, trainer.optimizer)


def logs_keys(trainer: Any) -> bool:
    """Says whether a callback of this module adds keys `optim/...` to a Trainer's logs."""
    return any(isinstance(callback, _LoggingCallback) for callback in trainer.callback_handler.callbacks)


class _LoggingCallback(TrainerCallback):
    """Adds keys to training logs: to what later callbacks see, and to `state.log_history`."""

    def read_logs(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[str, float]:
        """Returns the keys to add."""
        return optimizer_logs(optimizer, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Notes where the run's counts begin."""
        begin_run(event.get("optimizer"), state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Adds the keys that nobody has added."""
        logs, optimizer = event.get("logs"), event.get("optimizer")
        if logs is None or not is_training_log(logs) or optimizer is None:
            return
        missing = {k: v for k, v in self.read_logs(args, state, optimizer).items() if k not in logs}
        logs.update(missing)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(missing)


class EffectiveLRCallback(_LoggingCallback):
    """Logs the learning rates that an optimizer, whosever it is, really steps with, as `optim/lr_min|mean|max`.

    Understands Prodigy, D-Adaptation, Adafactor, schedule-free optimizers, bitsandbytes, torch's own and Automagic.
    The logged `learning_rate` stays the schedule's.
    """

    def read_logs(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[str, float]:
        """Returns the rates, those of each kind of parameter too where it is an Automagic."""
        return {k: v for k, v in optimizer_logs(optimizer, state).items() if k.startswith("optim/lr_")}


class MemoryCallback(_LoggingCallback):
    """Logs the megabytes of the optimizer's state, `optim/state_mb`, and the peak of a GPU, `optim/device_peak_mb`."""

    def read_logs(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[str, float]:
        """Counts the state's tensors, and asks the allocator; neither waits for the device."""
        inner = unwrap_optimizer(optimizer)
        if isinstance(inner, Automagic):
            size = inner.memory_stats().total_bytes
        else:
            tensors = [t for held in inner.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
        logs = {"optim/state_mb": size / 2**20}
        if args.device.type == "cuda":
            logs["optim/device_peak_mb"] = torch.cuda.max_memory_allocated(args.device) / 2**20
        return logs


class EdgeCaseCallback(TrainerCallback, ExportableState):
    """Tells of each event of an Automagic once: on screen, and as a record in `events` and in `trainer_state.json`.

    Says once, too, when parameters are trained that the optimizer does not know, as after switching the adapter.
    """

    def __init__(self) -> None:
        """Starts without events."""
        self.events: list[dict[str, Any]] = []
        self.told = 0
        self._has_warned = False

    def state(self) -> dict[str, Any]:
        """Returns what `trainer_state.json` keeps: the newest events, and the number of the last one told."""
        return {"args": {}, "attributes": {"events": self.events[-KEPT_EVENTS:], "told": self.told}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Notes what happened before this run, or before its checkpoint, and was told then."""
        begin_run(event.get("optimizer"), state)
        self.told, self._has_warned = _newest_event(event.get("optimizer")), False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Tells what is new."""
        optimizer, model = event.get("optimizer"), event.get("model")
        snapshot = snapshot_at_log(optimizer, state) if is_training_log(event.get("logs")) else None
        if snapshot is None:
            return
        for happened in snapshot.events:
            if happened.number > self.told:
                self.told = happened.number
                self.events.append(describe_event(happened, state.global_step))
                if state.is_world_process_zero:
                    logger.warning("step %d, %s: %s", happened.step, _title(happened), happened.action)
        if not self._has_warned and model is not None:
            self._warn_of_strangers(unwrap_optimizer(optimizer), model)

    def _warn_of_strangers(self, optimizer: Any, model: torch.nn.Module) -> None:
        """Says once which trainable parameters are in no group; silent where the optimizer holds copies of its own."""
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {id(p): name for name, p in model.named_parameters() if p.requires_grad or id(p) in ours}
        strangers = [name for key, name in named.items() if key not in ours]
        if strangers and ours <= named.keys():
            self._has_warned = True
            logger.warning(
                "%d trainable parameter(s) are in no group of the optimizer and stay as they are, the first is %s; "
                "make the optimizer after choosing the adapter, or call add_param_group",
                len(strangers),
                strangers[0],
            )


def _newest_event(optimizer: Any) -> int:
    """Returns the number of the newest event of an Automagic, 0 without one."""
    inner = unwrap_optimizer(optimizer)
    return max((event.number for event in inner.events()), default=0) if isinstance(inner, Automagic) else 0


def _title(event: Event) -> str:
    if event.code is EventCode.EDGE_CASE:
        return f"{event.code.name} (instability {event.value:.2f}, threshold {event.threshold:.2f})"
    return event.code.name


class CheckpointCallback(TrainerCallback):
    """Writes `checkpoint_manifest.json` into each checkpoint: sizes and digests, by which a broken one is found.

    `AutomagicTrainer` has it, and resumes from the newest whole checkpoint; see `find_resumable_checkpoint`.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Waits for the files of all processes, and writes the manifest."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_manifest(folder)


class OptimizerStatsCallback(_LoggingCallback):
    """Writes `optimizer_stats/` into the output folder: numbers and events as they come, plots and card at the end.

    Works with every optimizer; events, rails and the card's section need an Automagic. A run resumed at a checkpoint
    continues the files from there, a run begun anew starts them anew.

    Args:
        plots: whether to draw; needs matplotlib, `pip install hf_automagic[plot]`.
        card: whether to keep the section of the model card up to date.
    """

    def __init__(self, *, plots: bool = True, card: bool = True) -> None:
        """Chooses what is made beside the files."""
        self.plots, self.card = plots, card
        self._writer: StatsWriter | None = None
        self._written = 0  # number of the last event on file
        self._has_measured = False  # whether config.json tells the memory of states that exist

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Starts the files, or continues them where the run resumes."""
        super().on_train_begin(args, state, control, **event)
        optimizer = event.get("optimizer")
        if not state.is_world_process_zero or optimizer is None:
            return
        self._writer, self._has_measured = StatsWriter(str(args.output_dir)), False
        self._writer.start(state.global_step)
        self._writer.write_config(describe_run(optimizer, args))
        self._written = self._writer.last_event() if state.global_step else _newest_event(optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Adds the keys, and appends them and what happened to the files."""
        super().on_log(args, state, control, **event)
        logs, optimizer = event.get("logs"), event.get("optimizer")
        if self._writer is None or logs is None or not is_training_log(logs):
            return
        self._writer.append_row(state.global_step, logs)
        snapshot = snapshot_at_log(optimizer, state)
        for happened in snapshot.events if snapshot is not None else ():
            if happened.number > self._written:
                self._written = happened.number
                self._writer.append_event(describe_event(happened, state.global_step))
        if not self._has_measured:
            self._has_measured = True
            self._writer.write_config(describe_run(optimizer, args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Draws the plots and brings the card up to date."""
        self.draw()
        self.update_card(args.output_dir, event.get("optimizer"))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Draws the plots and brings the card up to date, for what is pushed; begins a card where there is none.

        A checkpoint is pushed before the Trainer has written its card.
        """
        readme = Path(str(args.output_dir)) / "README.md"
        if self._writer is not None and self.card and not readme.exists():
            start_card(readme, str(args.hub_model_id or Path(str(args.output_dir)).name).rpartition("/")[2])
        self.on_train_end(args, state, control, **event)

    def draw(self) -> None:
        """Draws the plots of what is on file."""
        if self._writer is None or not self.plots:
            return
        try:
            draw_plots(RunRecord.read(self._writer.folder), self._writer.folder)
        except ImportError as error:
            self.plots = False
            logger.warning("no plots: %s", error)

    def update_card(self, output_dir: str | None, optimizer: Any) -> None:
        """Brings the section of the model card up to date, where there is a card.

        A Trainer writes its card anew when it pushes, after every callback: `update_cards` then puts the section back.

        Args:
            output_dir: where the card is.
            optimizer: the run's.
        """
        readme = Path(output_dir or ".") / "README.md"
        is_ours = isinstance(unwrap_optimizer(optimizer), Automagic)
        if self._writer is not None and self.card and is_ours and readme.is_file():
            update_card(readme, RunRecord.read(self._writer.folder))
