"""Events: what a person should know about a run, written on the device in step() and read when something is logged."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CAPACITY = 64  # events kept; older ones make room
EVENT_BYTES = CAPACITY * 4 * 4 + 8  # of the buffer
STUCK_AFTER = 10  # skipped steps in a row that count as stuck


class EventCode(enum.IntEnum):
    """Kinds of events; names and numbers are stable, since logs and checkpoints hold them."""

    EDGE_CASE = 1
    NONFINITE_STEP = 2
    NONFINITE_STUCK = 3  # NONFINITE_STEP + 1: record_events counts on it


@dataclasses.dataclass(frozen=True)
class Event:
    """One event of a run.

    Args:
        step: number of the step() call, skipped ones included, from 1; of a run of alike steps the first.
        code: what happened.
        value: the instability of an edge case; of a skipped step the position of the parameter whose gradient is not
            finite.
        threshold: what was reached: the instability that makes an edge case, or the number of skipped steps in a row.
        action: what the optimizer did, in words.
        number: counts the events of the run from 1, so that a reader knows what is new.
    """

    step: int
    code: EventCode
    value: float
    threshold: float
    action: str
    number: int


def new_events(device: torch.device) -> dict[str, Tensor]:
    """Creates an empty buffer: rows of step, code, value, threshold, newest last, and how many were ever recorded."""
    return {
        "rows": torch.zeros((CAPACITY, 4), device=device),  # float32 holds step numbers up to 16 million
        "recorded": torch.zeros((), dtype=torch.int64, device=device),
    }


def record_events(
    events: dict[str, Tensor], counters: Mapping[str, Tensor], edge: Mapping[str, Tensor] | None
) -> None:
    """Records the event of this step where there is one; at most one happens, as an edge case needs an applied step.

    Args:
        events: the buffer, changed.
        counters: the guard's, with this step counted.
        edge: `started`, `value` and `threshold` of an edge case, None without a context.
    """
    run = counters["consecutive"]
    is_stuck = run == STUCK_AFTER
    happened = (run == 1) | is_stuck
    step, code = counters["applied"] + counters["skipped"], is_stuck + int(EventCode.NONFINITE_STEP)
    row = torch.stack([step, code, counters["offender"], run]).to(torch.float32)
    if edge is not None:
        edge_row = torch.stack([step, torch.full_like(step, EventCode.EDGE_CASE), edge["value"], edge["threshold"]])
        row, happened = torch.where(edge["started"], edge_row, row), edge["started"] | happened
    rows = events["rows"]
    events |= {
        "rows": torch.where(happened, torch.cat([rows[1:], row[None]]), rows),
        "recorded": events["recorded"] + happened,
    }


def read_events(events: Mapping[str, Tensor], names: Sequence[str], after: int = 0) -> list[Event]:
    """Reads the buffer back, oldest first; changes nothing.

    Args:
        events: the buffer.
        names: of the parameters, by position.
        after: only events with a larger number.
    """
    recorded = int(events["recorded"])
    kept = min(recorded, CAPACITY, max(0, recorded - after))
    rows = events["rows"].tolist()[CAPACITY - kept :]
    return [_read_row(row, number, names) for number, row in enumerate(rows, start=recorded - kept + 1)]


def _read_row(row: Sequence[float], number: int, names: Sequence[str]) -> Event:
    step, number_of_code, value, threshold = (float(f"{field:.7g}") for field in row)  # 0.95, not 0.949999988
    code = EventCode(int(number_of_code))
    return Event(int(step), code, value, threshold, _describe(code, int(value), names), number)


def name_at(position: int, names: Sequence[str]) -> str:
    """Returns the name of a parameter that was recorded by its position, which may be gone since."""
    return names[position] if 0 <= position < len(names) else f"parameter {position}"


def _describe(code: EventCode, position: int, names: Sequence[str]) -> str:
    if code is EventCode.EDGE_CASE:
        return "the rate's multiplier moves towards 0.5"
    name = name_at(position, names)
    if code is EventCode.NONFINITE_STEP:
        return f"the step was skipped: the gradient of {name} is not finite"
    return f"{STUCK_AFTER} steps in a row skipped, the last for the gradient of {name}: check data, loss and precision"
