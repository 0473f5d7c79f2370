"""Automagic: the optimizer itself, a torch.optim.Optimizer around buckets."""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AutomagicConfig, make_config, option_names
from ..quantization import QuantizationStrategy
from .attach import attached_groups, read_names
from .checkpoint_state import load_packed_state, pack_state
from .context import ContextController
from .conversion import LiveStorage
from .describe import describe
from .events import Event, read_events
from .groups import (
    base_lr,
    check_common,
    check_members,
    effective_lr,
    fill_group,
    parameter_names,
    refuse_sparse,
    warn_of_high_start,
)
from .guard import check_gradients, check_rates
from .losses import LossIntake
from .memory import MemoryStats, measure_memory
from .notices import tell_inert_options
from .open_step import OpenStep
from .pairs import PairRanks, check_aligned
from .plan import Plan, prepare_shared, shared_device
from .storage import codecs_of_group
from .watched_state import watch_entries

logger = logging.getLogger(__name__)

# Of state_dict(); grows when an old file needs to be converted. The promise: a file of any schema up to this one loads
# in this version and in every later 1.x, and goes on as it would have; tests/test_old_states.py holds one of each.
SCHEMA = 1


class Automagic(LiveStorage, torch.optim.Optimizer):
    """Steps parameters with CAME's direction at a rate that needs no setting, with states in 8 bits.

    The direction is a bias-corrected CAME (arXiv 2307.02047). The rate follows from a parameter's role, the model's
    width and the step (`optim.groups.base_lr`); `lr_search` lets it climb there from `lr` instead. `group["lr"]` stays
    the scheduler's: what it does to its starting value multiplies the rate, its height has no effect.

    Args:
        params: tensors, (name, tensor) pairs, which tell roles and LoRA pairs, or param groups. A group may set every
            option of `AutomagicConfig` for itself, and say its `role` (see `optim.roles.Role`).
        config: the options; the keywords win over it.
        quantization_strategy: decides, parameter by parameter, what is stored in few bits; see `QuantizationStrategy`.
        **options: options of `AutomagicConfig` by name, `lr` among them.

    Raises:
        TypeError: an option does not exist, or a parameter is of a kind that cannot be stepped.
        ValueError: an option is outside its bounds.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        config: AutomagicConfig | None = None,
        *,
        quantization_strategy: QuantizationStrategy | None = None,
        **options: Any,
    ) -> None:
        """Checks the options and groups; states are created in the first step."""
        self.quantization_strategy = quantization_strategy
        self.config = make_config({**vars(config or AutomagicConfig()), **options})
        self._plan: Plan | None = None
        self._interrupted: OpenStep | None = None
        self.loss_intake = LossIntake()
        super().__init__(read_names(params, self.config.weight_decay), dict(vars(self.config)))
        warn_of_high_start(self.param_groups)
        tell_inert_options(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, filled in with the optimizer's options and the rails of its role."""
        filled = fill_group(param_group, self.config)
        check_common([*self.param_groups, filled])
        super().add_param_group(filled)
        group = self.param_groups[-1]
        check_aligned(group)
        check_members(group)
        codecs_of_group(group, self.quantization_strategy)  # raises for what cannot be stored
        group["schema"] = SCHEMA
        self._plan = None

    def attach(self, model: nn.Module, *, new_modules: Iterable[str] = ()) -> None:
        """Sorts the parameters into groups by what the model tells: roles, rails, LoRA's scalings and pairs.

        For an optimizer that was built from bare parameters. States, tuned rates and a group's own options are kept.
        Call it before a scheduler is made and before a checkpoint is loaded: both count groups.

        Args:
            model: whose parameters these are.
            new_modules: names of freshly initialised modules, which step at the adapters' rate.

        Raises:
            TypeError: a name of `new_modules` is not part of the model.
            ValueError: the model trains none of the parameters.
        """
        self.param_groups[:] = attached_groups(self.param_groups, model, self.config, new_modules)
        self._plan = None
        tell_inert_options(self.param_groups)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Takes one step with the gradients that are there.

        Nothing is read back from the device. With a non-finite gradient anywhere, only the counters change.

        Args:
            closure: computes the loss and the gradients anew, as torch's own optimizers take it.
            loss: the loss of this step, for the context controller; an alternative to `observe_loss`.

        Returns:
            What the closure returned, None without one.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        context_loss = self._take_loss(value, loss)
        self._apply_step([p.grad for group in self.param_groups for p in group["params"]], context_loss)
        return value

    def observe_loss(self, loss: Tensor | float, *, is_share: bool = False) -> None:
        """Hands over a loss of the coming step, for the context; it is not read back.

        Args:
            loss: one number; several micro-batches are averaged.
            is_share: it is a share of the step's loss, as where the model divides by the number of items in the whole
                batch: micro-batches are added up.
        """
        self.loss_intake.hand_over(loss, is_share=is_share)

    def _take_loss(self, *handed: Any) -> Tensor | None:
        """Returns the loss of this step, NaN where none was seen, None without a context  # []"""
        if not any(group["context"] for group in self.param_groups):
            self.loss_intake.clear()
            return None
        for loss in handed:
            if isinstance(loss, (Tensor, float)):
                self.observe_loss(loss)
        # torch's checkpoint loaders take a step at rate 0, without a loss, to have the states made
        is_trial = all(not isinstance(group["lr"], Tensor) and group["lr"] == 0 for group in self.param_groups)
        return self.loss_intake.take(shared_device(self.param_groups), may_lack=is_trial)

    def _apply_step(self, grads: list[Tensor | None], loss: Tensor | None) -> None:
        """Takes a step, or what an interrupted call left of it."""
        present = [grad for grad in grads if grad is not None]
        if not present:
            return
        check_rates(self.param_groups)
        shared = self.param_groups[0]
        opened = self._reopen(present) or OpenStep(loss)
        try:
            if opened.plan is None or not opened.is_looked_at:
                opened.plan = plan = self._current_plan(len(present) == len(grads))
                if plan.fused is not None and not any(isinstance(group["lr"], Tensor) for group in self.param_groups):
                    told = (self.param_groups, grads, loss, shared["max_grad_norm"], shared["lr_pool"])
                    opened.stages = plan.fused_stages(self.state, *told)
                if opened.stages:
                    opened.stages.append(self._adapt_when_due)
                else:
                    plan.adopt(self.state)
                    self._set_rates()
                    opened.gains = opened.plan.pairs.row_gains()
                    positions = [i for i, grad in enumerate(grads) if grad is not None]
                    opened.check = check_gradients(present, positions, shared["max_grad_norm"], plan.ranks)
            opened.finish(self.param_groups, shared["lr_pool"], self._adapt_when_due)
        except (NotImplementedError, RuntimeError):
            refuse_sparse(self.param_groups)  # torch's own words name neither whose nor why
            raise
        finally:
            self._interrupted = None if opened.is_over else opened.watch(present)

    def _reopen(self, grads: list[Tensor]) -> OpenStep | None:
        """Returns the step that was interrupted with these gradients; gives up one that was with others."""
        opened = self._interrupted
        if opened is None or (opened.belongs_to(grads) and opened.fits(self._current_plan())):
            return opened
        logger.warning(
            "a step was interrupted, and %s: %d of the %d stacks of parameters that it had begun have taken it, the "
            "rest has not",
            "parameters are sharded" if opened.is_spread() else "its gradients or options are gone",
            *opened.begun(),
        )
        return None

    def _set_rates(self) -> None:
        """Fixes the rate that this step applies to each group, from what the last step saw."""
        shared = self.param_groups[0]
        one = torch.ones((), device=shared["counters"]["applied"].device)
        for group in self.param_groups:
            multiplier = shared["context_state"]["multiplier"] if group["context"] else one
            group["base_lr"] = base_lr(group, multiplier, shared["counters"]["applied"])
            group["effective_lr"] = group["base_lr"] * multiplier

    def _live_plan(self) -> Plan:
        """Returns the current plan, with all states adopted by its buckets."""
        plan = self._current_plan()
        plan.adopt(self.state)
        return plan

    def _current_plan(self, are_all_stepped: bool = False) -> Plan:
        """Returns the plan, made anew where groups, options or parameters changed."""
        if self._plan is None or not self._plan.is_current(self.param_groups, are_all_stepped):
            prepare_shared(self.param_groups)
            self._plan = Plan(self.param_groups, self.quantization_strategy)
        return self._plan

    @property
    def c_optim(self) -> ContextController:
        """Tells what the context did in the last step: edge case, multiplier, consistency, history."""
        return ContextController(self)

    def events(self, after: int = 0) -> list[Event]:
        """Returns the newest events of the run, oldest first; reads the device and changes nothing.

        Args:
            after: the number of the last event that the reader knows; only newer ones are returned.
        """
        buffer = self.param_groups[0].get("events")
        return read_events(buffer, parameter_names(self.param_groups), after) if buffer else []

    def get_learning_rates(self) -> list[float]:
        """Returns the rate that each group really stepped with last, or will start with; reads the device."""
        return [float(self._get_lr(group, {})) for group in self.param_groups]

    def get_avg_learning_rate(self) -> float:
        """Returns the mean of `get_learning_rates`, weighted by the number of elements; reads the device."""
        sizes = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        total = sum(rate * size for rate, size in zip(self.get_learning_rates(), sizes, strict=True))
        return total / max(1, sum(sizes))

    def _get_lr(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """Returns a group's rate without reading the device; diffusion-pipe calls ostris' Automagic so  # []"""
        if "effective_lr" in group:
            return group["effective_lr"]
        zero = torch.zeros(())
        return effective_lr({**group, "log_rate": zero}, zero + 1, zero)

    @torch.no_grad()
    def pair_ranks(self) -> PairRanks | None:
        """Returns how many directions each LoRA product B A uses; decomposes r x r matrices.

        None without pairs, and where they are sharded.
        """
        return self._current_plan().pairs.ranks()

    def memory_stats(self) -> MemoryStats:
        """Returns the bytes of everything the optimizer holds; before the first step, of what it will hold."""
        return measure_memory(self)

    def describe(self) -> str:
        """Returns a table of the groups: what was found, how it is stored and the rate each really gets."""
        return describe(self)

    def backends(self) -> dict[tuple[str, str], int]:
        """Counts the parameters that each backend steps: (backend, why no faster one) -> parameters."""
        known = self._plan is not None and self._plan.is_current(self.param_groups)
        plan = self._plan if known and self._plan else Plan(self.param_groups, self.quantization_strategy)
        counts: dict[tuple[str, str], int] = {}
        for chosen, (_, bucket) in zip(plan.backends, plan.buckets, strict=True):
            choice = ("eager", bucket.refusal) if bucket.refusal else chosen
            counts[choice] = counts.get(choice, 0) + len(bucket.params)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Returns states and groups as plain tensors, numbers and strings; every tensor has its own storage.

        Each group names the `schema` of its form. What one version saved loads in every later one.
        """
        return pack_state(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit, whatever the parameters' dtype.

        How states are stored stays as this optimizer was built (`config.StorageOptions`): states that were saved in
        another codec, block size or precision are converted in the next step. All other options come from the file.

        Raises:
            ValueError: the file's groups, names or shapes do not fit, or it was written by a newer version. Where only
                positions are known, because either side was built from bare parameters, shapes alone tell.
        """
        load_packed_state(self, super().load_state_dict, state_dict)
        self._plan = self._interrupted = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied optimizer; the stacks are built anew in the next step."""
        super().__setstate__(state)
        watch_entries(self.state)
        self._plan = self._interrupted = None
        vars(self).setdefault("loss_intake", LossIntake())
        vars(self).setdefault("quantization_strategy", None)
        if "config" not in state and "param_groups" in state:
            known = {name: self.defaults[name] for name in option_names()}
            self.config = make_config(copy.deepcopy(known))
