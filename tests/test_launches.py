"""Kernels are launched where the scratch lies, one by one or as a CUDA graph, with the same results."""

import ctypes
import functools
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_triton import CASES, FEW, Case, assert_alike, build, needs_triton, parameters, take


class Kernel:
    """A kernel that notes what it was launched with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def warmup(self, *arguments: Any, **options: Any) -> Any:
        return {(3, 1, 1): lambda *addresses, stream: self.seen.append(addresses)}


@needs_triton
def test_launches_follow_the_scratch(monkeypatch):
    from hf_automagic.kernels import launch

    monkeypatch.setattr(launch, "IS_DIRECT", True)
    monkeypatch.setattr(launch.Series, "_find_graph", lambda self: None)
    kernel, kept, (first, second) = Kernel(), torch.zeros(4), torch.zeros(2, 2, 64)
    second = second.clone()
    series = launch.Series([launch.Launch(kernel, 3, (first[1], kept, first, first[:0], 0.5))], first)
    for scratch in (first, second, first):
        series.begin(scratch)
        series.run()
        assert kernel.seen.pop() == (scratch[1].data_ptr(), kept.data_ptr(), scratch.data_ptr(), 0, 0.5)
    assert kernel.seen == []


@needs_triton
def test_launches_follow_the_scratch_after_an_interrupted_beginning(monkeypatch):
    from hf_automagic.kernels import launch

    monkeypatch.setattr(launch, "IS_DIRECT", True)
    monkeypatch.setattr(launch.Series, "_find_graph", lambda self: None)
    kernel, first, second = Kernel(), torch.zeros(64), torch.zeros(64)
    series = launch.Series([launch.Launch(kernel, 3, (first,)) for _ in range(2)], first)
    follow = launch.Launch.follow

    def interrupted(self: Any, place: int) -> None:
        follow(self, place)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.Launch, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        series.begin(second)
    monkeypatch.setattr(launch.Launch, "follow", follow)
    series.begin(second)
    series.run()
    assert kernel.seen == [(second.data_ptr(),)] * 2


@needs_triton
def test_a_graph_is_replayed_once_whenever_ctrl_c_comes(monkeypatch):
    from hf_automagic.kernels import launch

    class Base:  # of a graph, whose replay is C that Ctrl-C finds running
        replay = functools.partial(ctypes.CDLL(None)["raise"], signal.SIGINT)

    class Graph(Base):
        pass

    found: list[Graph] = []
    monkeypatch.setattr(launch.Series, "_find_graph", lambda self: found.append(Graph()) or found[-1])
    scratch = torch.zeros(64)
    series = launch.Series([launch.Launch(Kernel(), 3, (scratch,))], scratch)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            series.run()
    finally:
        signal.signal(signal.SIGINT, before)
    series.run()
    assert len(found) == 1


@needs_triton
def test_graphs_are_kept_for_the_places_that_come_again(monkeypatch):
    from hf_automagic.kernels import launch

    monkeypatch.setattr(launch, "IS_DIRECT", True)
    monkeypatch.setattr(launch, "IS_NVIDIA", SimpleNamespace(value=True))
    monkeypatch.setattr(launch, "REMEMBERED", 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch.Series, "_capture", lambda self: self.place)
    series = launch.Series([], torch.zeros(1))
    for place, graph in ((1, None), (1, 1), (2, None), (3, None), (1, 1), (4, None), (2, None), (1, 1), (4, 4)):
        series.place = place
        assert series._find_graph() == graph, place
        assert len(series.graphs) <= 3


def graphs(optimizer: Any) -> list[Any]:
    kernels = optimizer._plan.fused.kernels
    return [graph for planned in kernels.planned.values() for series in planned for graph in series.graphs.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_graph_steps_as_its_launches_do(monkeypatch, case, dtype):
    from hf_automagic.kernels.launch import Series

    recorded, launched = (build(parameters(dtype, FEW), case, "triton") for _ in range(2))
    find, between = Series._find_graph, []
    for step in range(16):
        between[:] = [torch.empty(4096 * (step % 3) + 1, device="cuda")]  # moves the scratch about
        state = torch.cuda.get_rng_state()
        for optimizer, found in ((recorded, find), (launched, lambda self: None)):
            monkeypatch.setattr(Series, "_find_graph", found)
            if step < 10:
                take([optimizer], case, range(step, step + 1), dtype)
            else:  # with what was there, so that the scratch comes back to where it was
                optimizer.step(loss=torch.ones((), device="cuda") if case.losses else None)
        assert torch.equal(torch.cuda.get_rng_state(), state)
    assert any(graph is not None for graph in graphs(recorded))
    assert graphs(launched) == []
    for group, other in zip(recorded.param_groups, launched.param_groups, strict=True):
        assert all(map(torch.equal, group["params"], other["params"]))
        assert torch.equal(group["update_rms"], other["update_rms"])
        for p, q in zip(group["params"], other["params"], strict=True):
            assert all(torch.equal(v, launched.state[q][name]) for name, v in recorded.state[p].items())


@pytest.mark.gpu
def test_launches_that_cannot_be_recorded_go_one_by_one(monkeypatch, caplog):
    from hf_automagic.kernels import launch

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no graph today")

    monkeypatch.setattr(launch, "_refusals", [])
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    case = Case("", {})
    refused, eager = (build(parameters(torch.float32, FEW), case, backend) for backend in ("triton", "eager"))
    starts = [p.detach().clone() for group in eager.param_groups for p in group["params"]]
    take([refused, eager], case, range(1), torch.float32)
    for optimizer in (refused, eager):
        for _ in range(6):
            optimizer.step()
    assert set(graphs(refused)) == {None}
    assert caplog.text.count("no graph today") == 1
    assert_alike(eager, refused, starts)


@pytest.mark.gpu
def test_a_recorded_step_can_itself_be_recorded():
    case = Case("", {"self_tuning": False})
    whole, alone = (build(parameters(torch.float32, FEW), case, "triton") for _ in range(2))
    take([whole, alone], case, range(4), torch.float32)
    for _ in range(3):
        alone.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole.step()
    for _ in range(3):
        graph.replay()
    for p, q in zip(whole.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
