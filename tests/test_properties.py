"""Whatever is asked for of whatever parameters: finite weights or a sentence, and a state that comes back as it was.

100 examples in the suite; 10,000 with `pytest --hypothesis-profile=thorough tests/test_properties.py`.
"""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_automagic import Automagic, AutomagicConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROLES = ["adapter", "lora_A", "lora_B", "full", "bias", "norm", "magnitude", "new", "embedding"]
STEPS = 3

# What is bounded by a rule of its own is drawn within it, everything else from its declared bounds.
NUMBERS = {
    "lr": st.sampled_from([0.0, 1e-8, 1e-5, 1e-3, 1e-1]),
    "min_lr": st.sampled_from([0.0, 1e-7]),
    "max_lr": st.sampled_from([1e-7, 1e-3, 1.0]),
    "rail_steps": st.sampled_from([0, 1, 100]),
    "lr_speed": st.floats(0, 2.3),
    "lr_drift": st.floats(0, 1),
    "mask_band": st.sampled_from([1.0, 4.0, 1e4]),
    "loraplus_lr_ratio": st.sampled_from([1e-3, 1.0, 16.0]),
    "clip_threshold": st.sampled_from([1e-3, 1.0, 1e30]),
    "weight_decay": st.sampled_from([0.0, 0.1, 10.0]),
    "max_grad_norm": st.sampled_from([None, 1e-6, 1.0, 1e6]),
    "edge_case_threshold": st.floats(0, 1),
    "adaptation_rate": st.floats(0, 1),
    "eta": st.sampled_from([0.0, 2.0, 1e3]),
    "rank_penalty_strength": st.sampled_from([0.0, 0.01, 1.0]),
    "low_rank_emphasis": st.floats(1, 3),
    "edge_penalty": st.sampled_from([0.0, 0.1, 10.0]),
    "edge_threshold": st.sampled_from([0.0, 0.6, 10.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.05, 10.0]),
    "detail_preservation": st.floats(0, 1),
    "block_error_target": st.sampled_from([0.0, 0.007, 1.0]),
    "betas": st.sampled_from([(0.8, 0.99, 0.999), (0.9, 0.999, 0.9999), (0.0, 0.0, 0.0), (0.99, 0.5, 0.9)]),
    "eps": st.sampled_from([(1e-30, 1e-16, 1e-8), (1e-30, 1e-30, 1e-30), (0.0, 0.0, 0.0)]),
    "momentum_scales": st.sampled_from([(), (1,), (1, 5), (1, 5, 10, 25)]),
    "spatial_axes": st.sampled_from([(), (0,), (1,), (0, 1)]),
    "warmup_steps": st.integers(0, 3),
    "sync_frequency": st.integers(1, 3),
    "rank_penalty_every": st.integers(1, 3),
    "context_window": st.integers(21, 40),
    "seed": st.integers(0, 2**31 - 1),
    "min_8bit_size": st.sampled_from([0, 64, 4096]),
    "block_size": st.sampled_from([32, 64, 128, 4096]),
    "min_block_size": st.sampled_from([32, 64]),
    "max_block_size": st.sampled_from([64, 1024]),
    "storage_overrides": st.just(None),
}
# combinations that the options' own rules refuse, each in a sentence
REFUSALS = r"must|needs|lies|is not|cannot|no option|share"


def option(field: Any) -> Any:
    if field.name in NUMBERS:
        return NUMBERS[field.name]
    if field.metadata["choices"] is not None:
        return st.sampled_from(field.metadata["choices"])
    if field.name == "codec":
        return st.sampled_from(["softsign", "affine", "dynamic"])
    assert field.type in (bool, "bool"), f"{field.name} needs a row in NUMBERS"
    return st.booleans()


FIELDS = {field.name: option(field) for field in dataclasses.fields(AutomagicConfig)}
OPTIONS = st.fixed_dictionaries({}, optional=FIELDS)
SHAPES = st.one_of(
    st.sampled_from([(), (1,), (0,), (0, 3), (3, 0), (1, 1), (1, 40), (40, 1), (4, 3, 3, 3), (2, 3, 5), (64, 70)]),
    st.lists(st.integers(1, 12), min_size=0, max_size=4).map(tuple),
    st.tuples(st.integers(1, 6), st.integers(30, 300)),
)
KINDS = st.sampled_from(["noise", "zero", "constant", "one spike", "tiny", "huge", "missing", "nan"])


@st.composite
def groups(draw: Any) -> list[dict[str, Any]]:
    """Some groups with roles; adapters come in pairs now and then."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        dtype, role = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ROLES))
        shapes = draw(st.lists(SHAPES, min_size=0, max_size=3))
        found.append({"shapes": shapes, "dtype": dtype, "role": role})
    if draw(st.booleans()):
        rank, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
        for role, shape in (("lora_A", (rank, 9)), ("lora_B", (11, rank))):
            found.append({"shapes": [shape], "dtype": dtype, "role": role, "pairs": [0], "scalings": [2.0]})
    return found


def build(wanted: list[dict[str, Any]], options: dict[str, Any]) -> tuple[list[torch.nn.Parameter], Automagic]:
    generator = torch.Generator().manual_seed(0)
    built, params = [], []
    for group in wanted:
        some = [
            torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(group["dtype"])) for s in group["shapes"]
        ]
        built.append({**{k: v for k, v in group.items() if k not in ("shapes", "dtype")}, "params": some})
        params += some
    return params, Automagic(built, **options)


def fill(params: list[torch.nn.Parameter], kinds: list[str], step: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        noise = torch.randn(p.shape, generator=generator)
        largest = torch.finfo(p.dtype).max
        kind = kinds[(i + step) % len(kinds)]
        grad = {
            "noise": noise,
            "zero": noise * 0,
            "constant": noise * 0 + 0.5,
            "one spike": torch.where(torch.arange(noise.numel()).view(p.shape) == 0, 1e4, noise * 1e-6),
            "tiny": noise * 1e-30,
            "huge": noise.clamp(-1, 1).double() * min(largest, 1e18) * 0.5,
            "missing": None,
            "nan": noise * torch.nan,
        }[kind]
        p.grad = None if grad is None else grad.to(p.dtype)


def step_all(params: list[torch.nn.Parameter], optimizer: Automagic, kinds: list[str], steps: range) -> None:
    for step in steps:
        fill(params, kinds, step)
        optimizer.step(loss=torch.tensor(1.0 / (1 + step)))


def assert_same(left: Any, right: Any, path: str = "") -> None:
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, path
        assert left.shape == right.shape, path
        assert torch.equal(left.nan_to_num(7), right.nan_to_num(7)), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    else:
        assert left == right, path


@given(wanted=groups(), options=OPTIONS, kinds=st.lists(KINDS, min_size=1, max_size=4))
@pytest.mark.matrix("T6", "T20")
def test_every_configuration_steps_to_finite_weights_and_comes_back_from_a_file(wanted, options, kinds):
    try:
        params, optimizer = build(wanted, options)
    except (TypeError, ValueError) as refusal:
        with pytest.raises(type(refusal), match=REFUSALS):
            raise
        return
    step_all(params, optimizer, kinds, range(STEPS))
    assert all(bool(p.isfinite().all()) for p in params)
    for state in optimizer.state.values():
        assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())
    assert all(bool(group["log_rate"].isfinite()) for group in optimizer.param_groups if "log_rate" in group)

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    twins, twin = build(wanted, options)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    twin.load_state_dict(copy.deepcopy(loaded))
    assert_same(twin.state_dict()["state"], loaded["state"])
    assert_same(list(twin.state_dict()["param_groups"]), list(loaded["param_groups"]))
    for owned, one in ((params, optimizer), (twins, twin)):
        step_all(owned, one, kinds, range(STEPS, STEPS + 1))
    assert_same([p.data for p in params], [p.data for p in twins])
    assert_same(optimizer.state_dict(), twin.state_dict())
