"""The fused kernels compute what eager stacks compute: on the CPU through triton's interpreter, and on a GPU."""

import copy
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_automagic import Automagic

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)
runs_kernels = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED) or importlib.util.find_spec("triton") is None,
    reason="needs a GPU, or triton with TRITON_INTERPRET=1",
)

# exact and odd blocks, several tiles, ragged tails, a convolution, vectors, a scalar
SHAPES = [(16, 512), (300, 16), (34, 130), (7, 33), (17,), (5, 1), (4, 3, 3, 3), ()]
FEW = [(16, 512), (300, 16), (34, 130), (17,)]  # the interpreter takes seconds a step


@dataclasses.dataclass(frozen=True)
class Case:
    """Options, and what happens to the gradients."""

    name: str
    options: dict[str, Any]
    missing: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # step -> parameters
    broken: tuple[int, ...] = ()  # steps with a NaN or an infinity
    zero: tuple[int, ...] = ()  # steps without any gradient but zeros
    losses: bool = False
    second_group: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = [
    Case("default", {}, missing={2: (0, 3), 3: (1,)}),
    Case("fp32 states", {"quantize_states": False, "rail_steps": 2}),
    Case("balanced", {"lr_granularity": "element", "sync_frequency": 2}, missing={1: (1,)}),
    Case("aggressive", {"vector_precision": "log16"}, missing={2: (0, 3)}),
    Case("affine", {"codec": "affine", "block_size": 64, "warmup_steps": 3}),
    Case("clipped by norm", {"max_grad_norm": 0.01}, missing={2: (0, 3)}, zero=(0,)),
    Case("a broken gradient", {}, broken=(1, 2), zero=(0,)),
    Case("cautious", {"cautious": True, "weight_decay": 0.1, "weight_decay_mode": "cautious"}),
    Case("decay", {"weight_decay": 0.1, "lr_search": True, "lr_pool": "group", "betas": (0.0, 0.9, 0.99)}),
    Case("a search", {"lr_search": True}, missing={2: (0, 3)}, broken=(1,)),
    Case("context", {"context": True}, losses=True, broken=(2,)),
    Case("the user's rate", {"self_tuning": False}),
    Case(
        "one group in eager stacks", {"max_grad_norm": 0.01}, missing={2: (1,)}, broken=(3,),
        second_group={"error_correction": True},
    ),
]  # fmt: skip


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(DEVICE, dtype)) for s in shapes]


def build(params: list[torch.nn.Parameter], case: Case, backend: str) -> Automagic:
    groups = [{"params": params[0::2], "lr": 1e-4}, {"params": params[1::2], "lr": 3e-4, **case.second_group}]
    return Automagic(groups, backend=backend, **case.options)


def take(optimizers: list[Automagic], case: Case, steps: range, dtype: torch.dtype) -> None:
    """Steps several optimizers with the same gradients, a function of the number of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        lists = [[p for i in range(len(o.param_groups[0]["params"])) for p in _at(o, i)] for o in optimizers]
        for i, some in enumerate(zip(*lists, strict=True)):
            grad = torch.randn(some[0].shape, generator=generator) * 1e-3 + 5e-4
            grad = grad * 0 if step in case.zero else grad
            if step in case.broken and i == 2:
                grad.view(-1)[3] = float("nan") if step % 2 else float("inf")
            for p in some:
                p.grad = None if i in case.missing.get(step, ()) else grad.to(DEVICE, dtype)
        for optimizer in optimizers:
            optimizer.step(loss=torch.tensor(1 + 0.1 * step, device=DEVICE) if case.losses else None)


def _at(optimizer: Automagic, i: int) -> list[torch.nn.Parameter]:
    return [group["params"][i] for group in optimizer.param_groups if i < len(group["params"])]


def assert_alike(eager: Automagic, fused: Automagic, starts: list[torch.Tensor], deep: float = 1.0) -> None:
    """Compares weights, states, rates, counters and events.

    Sums are added in another order, and divisions are the device's fast ones: a few units in the last place. Codes
    may therefore differ by one where a value lies on the edge between two, weights in few bits by their spacing.
    """
    ours = [p for group in fused.param_groups for p in group["params"]]
    theirs = [p for group in eager.param_groups for p in group["params"]]
    for p, q, start in zip(theirs, ours, starts, strict=True):
        way = (p.detach().float() - start.float()).norm()
        apart = (p.detach().float() - q.detach().float()).norm()
        limit = 1e-4 if p.dtype == torch.float32 else 2e-2
        assert float(apart) <= deep * limit * float(way) + 1e-9, tuple(p.shape)
        assert eager.state[p].keys() == fused.state[q].keys()
        for name, value in eager.state[p].items():
            _assert_state(name, value, fused.state[q][name], deep)
    for mine, other in zip(eager.param_groups, fused.param_groups, strict=True):
        for name in ("log_rate", "base_lr", "effective_lr", "update_rms"):
            torch.testing.assert_close(mine[name], other[name], rtol=1e-4 * deep, atol=1e-6)
    assert {k: int(v) for k, v in eager.param_groups[0]["counters"].items()} == {
        k: int(v) for k, v in fused.param_groups[0]["counters"].items()
    }
    assert [(e.step, e.code) for e in eager.events()] == [(e.step, e.code) for e in fused.events()]


def _assert_state(name: str, value: torch.Tensor, other: torch.Tensor, deep: float) -> None:
    assert value.dtype == other.dtype
    if name.endswith("residual"):  # two counts a byte, of what lies beyond the code
        assert int((value != other).sum()) <= max(2, int(0.02 * deep * value.numel())), name
    elif name == "lr_mask" or name.endswith("codes"):
        unlike = (value.to(torch.int32) - other.to(torch.int32)).abs()
        few = max(2, int(0.002 * deep * unlike.numel()))  # elements on an edge
        assert int((unlike > 1).sum()) <= (0 if deep == 1 else few), name
        assert int((unlike > 0).sum()) <= few, name
    else:
        spread = float(value.float().abs().max()) if value.numel() else 0.0
        apart = (value.float() - other.float()).abs() - deep * (2e-3 * other.float().abs() + 1e-5 * spread)
        # a code that differs by one moves a momentum by up to 1/64 of its block's largest, and with it the next scale
        few = max(2, int(0.002 * apart.numel())) if deep > 1 and name.endswith(("scale", "zero")) else 0
        assert int((apart > 0).sum()) <= few, name
        assert not bool((apart > spread / 64).any()), name


def run_both(
    case: Case, dtype: torch.dtype, steps: int, shapes: list[tuple[int, ...]], deep: float = 1.0
) -> Automagic:
    eager = build(parameters(dtype, shapes), case, "eager")
    fused = build(parameters(dtype, shapes), case, "triton")
    starts = [p.detach().clone() for group in eager.param_groups for p in group["params"]]
    take([eager, fused], case, range(steps), dtype)
    assert_alike(eager, fused, starts, deep)
    return fused


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_compute_what_eager_stacks_compute(case: Case):
    fused = run_both(case, torch.float32, 4, SHAPES if case is CASES[0] else FEW)
    backends = {backend for backend, _ in fused._plan.backends}
    assert backends == ({"triton", "eager"} if case.second_group else {"triton"})


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_weights_in_few_bits_are_rounded_by_the_same_draws(case: Case, dtype):
    run_both(case, dtype, 2, [*FEW, (7, 33)])  # rows of an odd length begin within a pair


@runs_kernels
def test_states_move_between_backends_in_the_middle_of_a_run():
    case, dtype = CASES[0], torch.float32
    params = parameters(dtype, FEW)
    starts = [p.detach().clone() for p in [*params[0::2], *params[1::2]]]
    optimizer = build(params, case, "triton")
    eager = build(parameters(dtype, FEW), case, "eager")
    for i, backend in enumerate(("triton", "eager", "triton")):
        for group in optimizer.param_groups:
            group["backend"] = backend
        take([optimizer, eager], case, range(i, i + 1), dtype)
    assert_alike(eager, optimizer, starts)


@runs_kernels
def test_states_put_in_by_hand_are_those_of_the_next_step():
    case, dtype = CASES[0], torch.float32
    optimizers = [build(parameters(dtype, FEW), case, backend) for backend in ("eager", "triton")]
    starts = [p.detach().clone() for group in optimizers[0].param_groups for p in group["params"]]
    take(optimizers, case, range(1), dtype)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.update({name: value * 2 for name, value in state.items() if name.startswith("exp_avg_sq")})
    take(optimizers, case, range(1, 2), dtype)
    assert_alike(*optimizers, starts)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_gives_the_same_bits(dtype):
    case = CASES[2]
    optimizer = build(parameters(dtype, FEW), case, "triton")
    take([optimizer], case, range(2), dtype)
    twin = build(copy.deepcopy([p for i in range(2) for p in _at(optimizer, i)]), case, "triton")
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take([optimizer, twin], case, range(2, 4), dtype)
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(v, twin.state[q][name]) for name, v in optimizer.state[p].items())


@runs_kernels
@pytest.mark.parametrize("change", ["transposed", "unaligned", "moved weight"])
def test_gradients_and_weights_may_lie_anywhere(change):
    case, dtype, shapes = CASES[0], torch.float32, [(16, 512), (64, 64)]
    optimizers = [build(parameters(dtype, shapes), case, backend) for backend in ("eager", "triton")]
    starts = [p.detach().clone() for group in optimizers[0].param_groups for p in group["params"]]
    take(optimizers, case, range(2), dtype)
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            assert p.grad is not None
            if change == "transposed":
                p.grad = p.grad.mT.contiguous().mT
            elif change == "unaligned":
                p.grad = torch.cat([p.grad.new_zeros(1), p.grad.flatten()])[1:].view(p.shape)
            else:
                p.data = p.data.clone()
        optimizer.step()
    assert_alike(*optimizers, starts)


@runs_kernels
def test_what_is_not_fused_is_named():
    params = [
        torch.nn.Parameter(torch.zeros(8, 64, device=DEVICE)),
        torch.nn.Parameter(torch.zeros(64, device=DEVICE)),
    ]
    optimizer = Automagic(params, backend="triton", momentum_scales=(1, 5))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "MultiScaleMomentum" in optimizer.describe()


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run in this process")
@pytest.mark.slow
def test_the_interpreter_runs_the_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = ["tests/test_triton.py", "tests/test_triton_interruptions.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


GPU_SHAPES = [*SHAPES, (16, 4096), (4096, 16), (1024, 4), (4, 1024), (257, 1031), (2048, 512), (64, 3000), (3000,)]


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_the_gpu_kernels_and_stacks_agree_on_larger_shapes(case: Case, dtype):
    run_both(case, dtype, 5, GPU_SHAPES, deep=4.0)


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_on_the_gpu_they_agree_fifty_steps_deep(case: Case):
    run_both(case, torch.float32, 50, GPU_SHAPES, deep=50.0)


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu_two_runs_give_the_same_bits(dtype):
    case = CASES[0]
    twins = [build(parameters(dtype, GPU_SHAPES), case, "auto") for _ in range(2)]
    take(twins, case, range(10), dtype)
    for group, other in zip(*(o.param_groups for o in twins), strict=True):
        assert all(map(torch.equal, group["params"], other["params"]))


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("case", [c for c in CASES if not c.second_group], ids=lambda case: case.name)
def test_a_fused_step_asks_the_device_nothing_and_launches_little(case: Case):
    optimizer = build(parameters(torch.bfloat16, GPU_SHAPES * 8), case, "auto")
    quiet = dataclasses.replace(case, missing={}, broken=(), zero=())
    take([optimizer], quiet, range(2), torch.bfloat16)
    loss = torch.ones((), device=DEVICE) if case.losses else None
    optimizer.step(loss=loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        optimizer.step(loss=loss)
    launched = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kinds = len({(p.shape[-1:], p.ndim > 1) for group in optimizer.param_groups for p in group["params"]})
    assert len(launched) <= 8 + 4 * kinds + (250 if case.losses else 0)


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("layers", [2, 16])
def test_a_lora_takes_at_most_24_launches_whatever_its_depth(layers):
    shapes = [(16, 512), (512, 16), (16, 1408), (1408, 16)] * layers
    params = parameters(torch.bfloat16, shapes)
    optimizer = Automagic(params)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    assert sum(e.device_type == torch.autograd.DeviceType.CUDA for e in recorded.events()) <= 24
