"""Automagic: the optimizer itself, a torch.optim.Optimizer around buckets."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AutomagicConfig, make_config, option_names
from ..quantization import QuantizationStrategy
from .attach import attached_groups, read_names
from .bucket import StepInputs
from .checkpoint_state import load_packed_state, pack_state
from .context import ContextController, observe_step
from .conversion import LiveStorage
from .describe import describe
from .events import Event, read_events, record_events
from .groups import (
    base_lr,
    check_param,
    effective_lr,
    fill_group,
    parameter_names,
    warn_of_high_start,
)
from .guard import GradientCheck, check_gradients, count_step
from .losses import LossIntake
from .memory import MemoryStats, measure_memory
from .notices import tell_inert_options
from .pairs import PairRanks, check_aligned
from .plan import Plan, prepare_shared, shared_device
from .storage import codecs_of_group
from .tuning import BucketSums, add_pools, measure_updates, tune_rates

SCHEMA = 1  # of state_dict(); grows when an old file needs to be converted


class Automagic(LiveStorage, torch.optim.Optimizer):
    """Steps parameters with CAME's direction at a learning rate that tunes itself, with states in 8 bits.

    The direction is a bias-corrected CAME (arXiv 2307.02047). One rate for all parameters follows the agreement
    between gradients and momentum, between rails that depend on a parameter's role. `group["lr"]` stays the
    scheduler's: what it does to its starting value multiplies the tuned rate.

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
        self.loss_intake = LossIntake()
        super().__init__(read_names(params, self.config.weight_decay), dict(vars(self.config)))
        warn_of_high_start(self.param_groups)
        tell_inert_options(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, filled in with the optimizer's options and the rails of its role."""
        super().add_param_group(fill_group(param_group, self.config))
        group = self.param_groups[-1]
        check_aligned(group)
        for param, name in zip(group["params"], parameter_names([group]), strict=True):
            check_param(param, name)
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

        Nothing is read back from the device. A non-finite gradient anywhere makes the whole step change nothing but
        the counters.

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
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._apply_step(context_loss)
            self._adapt_when_due()
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
        return self.loss_intake.take(shared_device(self.param_groups))

    def _apply_step(self, loss: Tensor | None) -> None:
        """Looks at all gradients, steps all buckets, and prepares what the next step will use."""
        plan, groups = self._live_plan(), self.param_groups
        if plan.fused is not None and not any(isinstance(group["lr"], Tensor) for group in groups):
            plan.fused.step(groups, loss, self.config.max_grad_norm, self.config.lr_pool)
            return
        shared, counters = groups[0], groups[0]["counters"]
        every = [p.grad for group in groups for p in group["params"]]
        positions = [i for i, grad in enumerate(every) if grad is not None]
        grads = [grad for grad in every if grad is not None]
        check = check_gradients(grads, positions, self.config.max_grad_norm)
        self._set_rates()
        gains = plan.pairs.row_gains()
        measured = []
        for number, (index, bucket) in enumerate(plan.buckets):
            inputs = _inputs(groups[index]["applied_lr"], check, bucket.device, gains.get(number))
            measured.append(BucketSums(index, *bucket.step(inputs), bucket.numel_with_grad()))
        shared["host_steps"] = shared.get("host_steps", 0) + 1
        plan.pairs.shrink_spectra([group["applied_lr"] for group in groups], check.finite, shared["host_steps"])
        count_step(counters, check)
        measure_updates(groups, measured, check.finite)
        tune_rates(groups, measured, check.finite, self.config.lr_pool)
        edge = None
        if loss is not None:
            pools = [sums.pool for sums in measured if groups[sums.group]["context"] and sums.pool]
            edge = observe_step(groups, add_pools(loss.device, pools), loss, check.finite)
        record_events(shared["events"], counters, edge)

    def _set_rates(self) -> None:
        """Fixes the rate that this step applies to each group, from what the last step saw."""
        shared = self.param_groups[0]
        one = torch.ones((), device=shared["counters"]["applied"].device)
        for group in self.param_groups:
            multiplier = shared["context_state"]["multiplier"] if group["context"] else one
            group["base_lr"] = base_lr(group, multiplier, shared["counters"]["applied"])
            group["applied_lr"] = group["base_lr"] * multiplier

    def _live_plan(self) -> Plan:
        """Returns the current plan, with all states adopted by its buckets."""
        plan = self._current_plan()
        plan.adopt(self.state)
        return plan

    def _current_plan(self) -> Plan:
        """Returns the plan, made anew where groups, options or parameters changed."""
        if self._plan is None or not self._plan.is_current(self.param_groups):
            self._plan = Plan(self.param_groups, self.quantization_strategy)
            prepare_shared(self.param_groups)
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
        rates = []
        for group in self.param_groups:
            if "applied_lr" in group:
                rates.append(float(group["applied_lr"]))
            else:
                zero = torch.zeros(())
                rates.append(float(effective_lr({**group, "log_rate": zero}, zero + 1, zero)))
        return rates

    def get_avg_learning_rate(self) -> float:
        """Returns the mean of `get_learning_rates`, weighted by the number of elements; reads the device."""
        sizes = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        total = sum(rate * size for rate, size in zip(self.get_learning_rates(), sizes, strict=True))
        return total / max(1, sum(sizes))

    @torch.no_grad()
    def pair_ranks(self) -> PairRanks | None:
        """Returns how many directions each LoRA product B A uses, None without pairs; decomposes r x r matrices."""
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
        for choice, (_, bucket) in zip(plan.backends, plan.buckets, strict=True):
            counts[choice] = counts.get(choice, 0) + len(bucket.params)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Returns states and groups as plain tensors, numbers and strings; every tensor has its own storage."""
        return pack_state(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit, whatever the parameters' dtype.

        How states are stored stays as this optimizer was built (`config.StorageOptions`): states that were saved in
        another codec, block size or precision are converted in the next step. All other options come from the file.

        Raises:
            ValueError: the file's groups or shapes do not fit, or it was written by a newer version.
        """
        load_packed_state(self, super().load_state_dict, state_dict)
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied optimizer; the stacks are built anew in the next step."""
        super().__setstate__(state)
        self._plan = None
        vars(self).setdefault("loss_intake", LossIntake())
        vars(self).setdefault("quantization_strategy", None)
        if "config" not in state and "param_groups" in state:
            known = {name: self.defaults[name] for name in option_names()}
            self.config = make_config(copy.deepcopy(known))


def _inputs(lr: Tensor, check: GradientCheck, device: torch.device, row_gain: Tensor | None) -> StepInputs:
    clip = None if check.clip is None else check.clip.to(device)
    return StepInputs(lr.to(device), check.finite.to(device), clip, row_gain)
