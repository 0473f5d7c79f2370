"""Open steps: how far a step has come, so that one that was interrupted is finished and never half repeated.

Memory may run out, or a person may press Ctrl-C, in the middle of a step. Every part of a step computes first, which
may fail, and then writes, which allocates nothing; what has been written is noted here. If `step()` is called again
with the gradients that the interrupted call had, it goes on where that one broke, and the result is that of a step
that was never interrupted, to the bit. If the gradients have changed since, the interrupted step is given up, which
is said: some parameters have then taken one step more than others, each whole with its states; of a matrix larger
than a chunk (`bucket.CHUNK_BYTES`) it may be some of the rows. Counters, rates and events do not know that step.

Where parameters are sharded over ranks, there is no such promise: an interrupted step is given up in any case.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import observe_step
from .events import record_events
from .guard import GradientCheck, count_step
from .plan import Plan
from .sweep import StepInputs, Sweep
from .tuning import BucketSums, add_pools, measure_updates, tune_rates


@dataclasses.dataclass(eq=False)
class OpenStep:
    """One step, from its gradients to its events.

    Args:
        loss: of the step, None without a context  # []
        check: what the guard found; the rates and `gains` are fixed together with it.
        gains: ALLoRA's gains by bucket, from the weights before the step.
        plan: the buckets; another plan cannot go on with this step.
        sweeps: for each bucket that was begun, how far each of its chunks has come.
        shrunk: the pairs whose spectrum was shrunk.
        edge: what the context reported.
        finished: how many of the things that close a step are done.
        stages: where kernels step all buckets at once, what they do, one after another; the last few close the step.
        is_over: whether all is done.
    """

    loss: Tensor | None
    check: GradientCheck | None = None
    gains: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    plan: Plan | None = None
    sweeps: list[list[Sweep]] = dataclasses.field(default_factory=list)
    shrunk: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    edge: dict[str, Tensor] | None = None
    stages: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    finished: int = 0
    is_over: bool = False
    _watched: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def watch(self, grads: Sequence[Tensor]) -> "OpenStep":
        """Remembers the gradients without keeping them alive; returns itself."""
        self._watched = tuple((weakref.ref(grad), _version(grad)) for grad in grads)
        return self

    def belongs_to(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients that the step was taken with, unchanged."""
        return len(grads) == len(self._watched) and all(
            watched() is grad and version == _version(grad)
            for (watched, version), grad in zip(self._watched, grads, strict=True)
        )

    def fits(self, plan: Plan) -> bool:
        """Whether the buckets are still those of the step; once all have stepped, it does not matter."""
        if self.stages:
            return self.plan is plan and plan.fused is not None and plan.fused.is_in_place()
        return not self.is_spread() and (self.plan in (None, plan) or self.finished > 0)

    @property
    def is_looked_at(self) -> bool:
        """Whether the guard has seen the gradients, or the kernels are about to."""
        return self.check is not None or bool(self.stages)

    def is_spread(self) -> bool:
        """Whether other ranks hold rows of the step's parameters, so that it cannot be finished."""
        return self.plan is not None and self.plan.is_spread

    def finish(self, groups: list[dict[str, Any]], lr_pool: str, adapt: Callable[[], None]) -> None:
        """Steps the buckets that are left, and prepares what the next step will use.

        Args:
            groups: all param groups, with the rates that the step applies.
            lr_pool: 'global' or 'group'.
            adapt: what the optimizer does at the end of a step.
        """
        for action in (self.stages or self._stages(groups, lr_pool, adapt))[self.finished :]:
            action()
            self.finished += 1
        self.is_over = True

    def _stages(
        self, groups: list[dict[str, Any]], lr_pool: str, adapt: Callable[[], None]
    ) -> list[Callable[[], None]]:
        """Steps the buckets; returns what closes the step."""
        assert self.plan is not None
        assert self.check is not None
        plan, check, shared = self.plan, self.check, groups[0]
        inputs = [
            _inputs(groups[index]["effective_lr"], check, bucket.device, self.gains.get(number))
            for number, (index, bucket) in enumerate(plan.buckets)
        ]
        self.sweeps += [[] for _ in inputs[len(self.sweeps) :]]
        measured = plan.step(inputs, self.sweeps)
        applied = [group["effective_lr"] for group in groups]
        return [
            lambda: shared.update(host_steps=shared.get("host_steps", 0) + 1),
            lambda: plan.pairs.shrink_spectra(applied, check.finite, shared["host_steps"], self.shrunk),
            lambda: count_step(shared["counters"], check),
            lambda: measure_updates(groups, measured, check.finite),
            lambda: tune_rates(groups, measured, check.finite, lr_pool),
            lambda: self._observe(groups, measured, check.finite),
            lambda: record_events(shared["events"], shared["counters"], self.edge),
            adapt,
        ]

    def _observe(self, groups: list[dict[str, Any]], measured: Sequence[BucketSums], finite: Tensor) -> None:
        """Shows the step to the context."""
        if self.loss is not None:
            pools = [sums.pool for sums in measured if groups[sums.group]["context"] and sums.pool]
            self.edge = observe_step(groups, add_pools(self.loss.device, pools), self.loss, finite)

    def begun(self) -> tuple[int, int]:
        """Counts the chunks that are written, and those that the buckets begun so far have; of kernels, the stages."""
        if self.stages:
            return self.finished, len(self.stages)
        sweeps = [sweep for bucket in self.sweeps for sweep in bucket]
        return sum(sweep.is_over for sweep in sweeps), len(sweeps)


def _inputs(lr: Tensor, check: GradientCheck, device: torch.device, row_gain: Tensor | None) -> StepInputs:
    clip = None if check.clip is None else check.clip.to(device)
    return StepInputs(lr.to(device), check.finite.to(device), clip, row_gain)


def _version(tensor: Tensor) -> int:
    """Returns torch's count of in-place changes of a tensor; one made in inference mode keeps none."""
    return -1 if tensor.is_inference() else tensor._version
