"""Events: recorded on the device, once for each run of alike steps, and read without being consumed."""

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.optim.events import CAPACITY, Event, EventCode

FINE, BAD = 0.0, torch.nan


def build(**options) -> Automagic:
    params = [torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(3))]
    return Automagic([{"params": params, "names": ["layer.weight", "layer.bias"]}], lr=1e-4, **options)


def step(optimizer: Automagic, weight: float = FINE, bias: float = FINE) -> None:
    for param, poison in zip(optimizer.param_groups[0]["params"], (weight, bias), strict=True):
        param.grad = torch.full_like(param, 0.1 + poison)
    optimizer.step()


def codes(optimizer: Automagic) -> list[tuple[int, str]]:
    return [(event.step, event.code.name) for event in optimizer.events()]


def test_codes_keep_their_names_and_numbers():
    assert {code.name: int(code) for code in EventCode} == {
        "EDGE_CASE": 1,
        "NONFINITE_STEP": 2,
        "NONFINITE_STUCK": 3,
    }


def test_good_steps_are_no_events():
    optimizer = build()
    for _ in range(5):
        step(optimizer)
    assert optimizer.events() == []


def test_a_run_of_skipped_steps_is_one_event_and_names_the_parameter():
    optimizer = build()
    step(optimizer)
    for _ in range(4):
        step(optimizer, bias=BAD)
    step(optimizer)
    step(optimizer, weight=BAD)
    assert codes(optimizer) == [(2, "NONFINITE_STEP"), (7, "NONFINITE_STEP")]
    first, second = optimizer.events()
    assert (first.value, first.threshold) == (1, 1)
    assert "layer.bias" in first.action
    assert "layer.weight" in second.action


def test_ten_skipped_steps_in_a_row_are_stuck():
    optimizer = build()
    for _ in range(9):
        step(optimizer, bias=BAD)
    assert codes(optimizer) == [(1, "NONFINITE_STEP")]
    for _ in range(5):
        step(optimizer, weight=BAD)
    assert codes(optimizer) == [(1, "NONFINITE_STEP"), (10, "NONFINITE_STUCK")]
    stuck = optimizer.events()[1]
    assert (stuck.value, stuck.threshold) == (0, 10)
    assert "layer.weight" in stuck.action


def test_parameters_without_a_name_are_told_by_position_and_role():
    optimizer = Automagic([torch.nn.Parameter(torch.ones(3))], lr=1e-4)
    optimizer.param_groups[0]["params"][0].grad = torch.full((3,), torch.inf)
    optimizer.step()
    assert "parameter 0 (adapter)" in optimizer.events()[0].action


def test_reading_takes_nothing_away_and_a_reader_asks_for_what_is_new():
    optimizer = build()
    for poison in (BAD, FINE, BAD, FINE, BAD):
        step(optimizer, weight=poison)
    events = optimizer.events()
    assert optimizer.events() == events
    assert [event.number for event in events] == [1, 2, 3]
    assert optimizer.events(after=1) == events[1:]
    assert optimizer.events(after=3) == []


def test_the_buffer_keeps_the_newest_and_counts_all():
    optimizer = build()
    for _ in range(CAPACITY + 6):
        step(optimizer, weight=BAD)
        step(optimizer)
    events = optimizer.events()
    assert len(events) == CAPACITY
    assert [event.number for event in events] == list(range(7, CAPACITY + 7))
    assert [event.step for event in events] == list(range(13, 2 * CAPACITY + 13, 2))
    assert optimizer.events(after=2) == events
    assert optimizer.events(after=CAPACITY + 5) == events[-1:]


def test_events_survive_a_checkpoint():
    optimizer, resumed = build(), build()
    step(optimizer, weight=BAD)
    step(optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.events() == optimizer.events()
    step(resumed, bias=BAD)
    assert codes(resumed) == [(1, "NONFINITE_STEP"), (3, "NONFINITE_STEP")]
    assert codes(optimizer) == [(1, "NONFINITE_STEP")]


def test_a_run_that_a_checkpoint_interrupts_stays_one_event():
    optimizer, resumed = build(), build()
    step(optimizer, weight=BAD)
    resumed.load_state_dict(optimizer.state_dict())
    step(resumed, weight=BAD)
    assert codes(resumed) == [(1, "NONFINITE_STEP")]


def test_an_event_is_a_plain_record():
    optimizer = build(context=True)
    step(optimizer, weight=BAD)
    step(optimizer)
    edge = optimizer.events()[-1]
    assert edge == Event(2, EventCode.EDGE_CASE, 1.0, 0.95, edge.action, 2)
    assert "0.5" in edge.action
    with pytest.raises(AttributeError):
        edge.step = 3
