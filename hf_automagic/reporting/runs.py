"""The snapshot of a log: callbacks, files and the Trainer mixin share one device read, and count from the run's start.

An optimizer counts for life. A Trainer keeps it for a second training, and for another attempt where
`auto_find_batch_size` ran out of memory; a resumed run goes on with the counts of its checkpoint.
"""

import dataclasses
import weakref
from typing import Any

from ..optim.automagic import Automagic
from .rates import read_at_once, summarize_rates, unwrap_optimizer
from .snapshot import OptimizerSnapshot


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an optimizer had counted at some moment: applied steps, skipped steps and events."""

    applied: int = 0
    skipped: int = 0
    events: int = 0


@dataclasses.dataclass
class _Run:
    """One training of an optimizer, told apart by the Trainer's state object."""

    state: weakref.ref[Any]
    start: Counts
    step: int = -1  # of the newest snapshot
    snapshot: OptimizerSnapshot | None = None


_runs: weakref.WeakKeyDictionary[Automagic, _Run] = weakref.WeakKeyDictionary()


def begin_run(optimizer: Any, state: Any) -> None:
    """Notes what an Automagic counted before a run that begins at step 0; reads the device.

    Args:
        optimizer: as a callback receives it, wrapped or not.
        state: the Trainer's.
    """
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, Automagic) and not _is_present(inner, state):
        _runs[inner] = _Run(weakref.ref(state), Counts() if state.global_step else _counts(inner))


def snapshot_at_log(optimizer: Any, state: Any) -> OptimizerSnapshot | None:
    """Returns the snapshot of an Automagic at the present step, taking it if nobody has; None for other optimizers.

    Args:
        optimizer: as a callback receives it, wrapped or not.
        state: the Trainer's, which tells the step and the run.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, Automagic):
        return None
    if not _is_present(inner, state):
        _runs[inner] = _Run(weakref.ref(state), Counts())
    run = _runs[inner]
    if run.snapshot is None or run.step != state.global_step:
        run.step, run.snapshot = state.global_step, since(OptimizerSnapshot.take(inner), run.start)
    return run.snapshot


def optimizer_logs(optimizer: Any, state: Any) -> dict[str, float]:
    """Returns the keys `optim/...` of a log: all of an Automagic's, the learning rates of others."""
    snapshot = snapshot_at_log(optimizer, state)
    if snapshot is not None:
        return snapshot.as_logs()
    rates = summarize_rates(optimizer)
    return {"optim/lr_min": rates.minimum, "optim/lr_mean": rates.mean, "optim/lr_max": rates.maximum}


def since(snapshot: OptimizerSnapshot, start: Counts) -> OptimizerSnapshot:
    """Returns a snapshot whose steps and events are those after a start; events keep their numbers."""
    steps = start.applied + start.skipped
    return dataclasses.replace(
        snapshot,
        applied_steps=snapshot.applied_steps - start.applied,
        skipped_steps=snapshot.skipped_steps - start.skipped,
        event_count=snapshot.event_count - start.events,
        events=tuple(
            dataclasses.replace(event, step=event.step - steps)
            for event in snapshot.events
            if event.number > start.events
        ),
    )


def _is_present(optimizer: Automagic, state: Any) -> bool:
    run = _runs.get(optimizer)
    return run is not None and run.state() is state


def _counts(optimizer: Automagic) -> Counts:
    shared = optimizer.param_groups[0]
    counters, recorded = shared.get("counters", {}), shared.get("events", {}).get("recorded", 0)
    read = read_at_once({"events": recorded, **{name: counters.get(name, 0) for name in ("applied", "skipped")}})
    return Counts(**{name: int(value) for name, value in read.items()})
