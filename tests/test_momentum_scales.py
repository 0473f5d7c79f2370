"""Multi-scale momentum (stage 2): several horizons, the first of which is all that confidence and rate see."""

import pytest
import torch

from hf_automagic.config import AutomagicConfig, parse_option
from hf_automagic.optim.recipes import build_chain
from hf_automagic.transforms.momentum import Momentum, MultiScaleMomentum, scale_name
from tests.reference import came
from tests.stage_cases import (
    BETAS,
    check_against_reference,
    context,
    engine,
    gradients,
    noise,
    run_engine,
    start,
    take_step,
)

LINEAR = {"w": (7, 33), "v": (17,)}
SETS = [(1, 5, 10, 25), (1, 3, 7, 15), (1, 10, 25, 50)]  # those of the second seed


@pytest.mark.parametrize("scales", SETS, ids=str)
def test_optimizer_equals_the_reference(scales):
    check_against_reference(LINEAR, {"momentum_scales": scales})


def test_order_before_averages_raw_gradients_over_all_scales():
    check_against_reference(LINEAR, {"momentum_scales": (1, 4), "momentum_order": "before"})


@pytest.mark.parametrize("scales", SETS, ids=str)
def test_combination_is_the_formula(scales):
    transform = MultiScaleMomentum(0.9, scales)
    state = {spec.name: torch.zeros(1, 4, 6, dtype=torch.float64) for spec in transform.states()}
    momenta = {k: torch.zeros(4, 6, dtype=torch.float64) for k in scales}
    for step in range(1, 30):
        u = noise(4, 6, seed=step)
        combined, changed = transform.apply(u[None], state, None, context(u[None], step=step))
        state |= {name: changed[name] for name in state}
        momenta = {k: came.ema(m, u, came.scale_beta(0.9, k)) for k, m in momenta.items()}
        assert (combined[0] - came.combine_scales(momenta, 0.9, step)).abs().max() < 1e-12
    for k in scales:
        assert (state[scale_name(k)][0] - momenta[k]).abs().max() < 1e-14


def test_a_constant_gradient_passes_unchanged_from_the_first_step():
    transform, u = MultiScaleMomentum(0.9, (1, 5, 25)), noise(1, 3, 4)
    state = {spec.name: torch.zeros(1, 3, 4, dtype=torch.float64) for spec in transform.states()}
    for step in range(1, 8):
        combined, changed = transform.apply(u, state, None, context(u, step=step))
        state |= {name: changed[name] for name in state}
        assert (combined - u).abs().max() < 1e-13


def test_longer_scales_look_further_back():
    """Behind a gradient that grows steadily, scale k lags about k / (1 - beta1) steps, by 1/k weighted."""

    def lag(scales: tuple[int, ...]) -> float:
        transform = MultiScaleMomentum(0.8, scales)
        state = {spec.name: torch.zeros(1, 1, 1, dtype=torch.float64) for spec in transform.states()}
        for step in range(1, 2001):
            u = torch.full((1, 1, 1), float(step), dtype=torch.float64)
            combined, changed = transform.apply(u, state, None, context(u, step=step))
            state |= {name: changed[name] for name in state}
        return step - combined.item()

    lags = [lag(scales) for scales in [(1,), (1, 3, 7, 15), (1, 5, 10, 25), (1, 10, 25, 50)]]
    assert lags == sorted(set(lags))
    assert lags[2] / lags[0] == pytest.approx(4 / (1 + 1 / 5 + 1 / 10 + 1 / 25), rel=0.1)


def test_more_scales_steady_the_direction():
    """Under pure noise the combination's spread shrinks with every scale that is added."""

    def spread(scales: tuple[int, ...]) -> float:
        transform = MultiScaleMomentum(0.9, scales)
        state = {spec.name: torch.zeros(1, 60, 60, dtype=torch.float64) for spec in transform.states()}
        for step in range(1, 200):
            u = noise(1, 60, 60, seed=step)
            combined, changed = transform.apply(u, state, None, context(u, step=step))
            state |= {name: changed[name] for name in state}
        return combined.std().item()

    spreads = [spread(scales) for scales in [(1,), (1, 5), (1, 5, 10), (1, 5, 10, 25)]]
    assert spreads == sorted(set(spreads), reverse=True)


@pytest.mark.parametrize("scales", SETS, ids=str)
def test_each_set_moves_the_weights_differently(scales):
    ends = {other: run_engine(LINEAR, momentum_scales=other)["w"] for other in [(), *SETS]}
    assert all((ends[scales] - end).abs().max() > 1e-4 for other, end in ends.items() if other != scales)


@pytest.mark.parametrize("scales", [(), (1,)], ids=str)
def test_one_scale_is_plain_momentum(scales):
    chain = build_chain(AutomagicConfig(betas=BETAS, momentum_scales=scales), True)
    assert Momentum(0.9) in chain
    assert not any(isinstance(transform, MultiScaleMomentum) for transform in chain)


def test_first_scale_alone_enters_the_confidence_and_the_rate():
    """The other scales change where the weights go, and no other state."""
    states = []
    for scales in ((), (1, 5, 25)):
        optimizer, params = engine(start(LINEAR), self_tuning=True, momentum_scales=scales)
        for grads in gradients(LINEAR, 8):
            take_step(optimizer, params, grads)
        states.append((optimizer.state[params["w"]], optimizer.param_groups[0]["log_rate"]))
    (plain, rate), (scaled, other_rate) = states
    assert torch.equal(rate, other_rate)
    assert scaled.keys() - plain.keys() == {"exp_avg_k5", "exp_avg_k25"}
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_every_scale_is_stored_in_8_bits():
    shapes = {"w": (64, 256)}
    optimizer, params = engine(start(shapes), quantize_states=True, momentum_scales=(1, 5, 10, 25))
    for grads in gradients(shapes, 1):
        take_step(optimizer, params, grads)
    state = optimizer.state[params["w"]]
    for k in (1, 5, 10, 25):
        assert scale_name(k) not in state
        assert state[f"{scale_name(k)}_codes"].element_size() == 1
        assert state[f"{scale_name(k)}_codes"].shape == (64, 256)


def test_a_run_resumes_bit_for_bit():
    shapes = {"w": (64, 80)}
    options = {"momentum_scales": (1, 5, 10), "quantize_states": True}
    drawn = list(gradients(shapes, 8))
    optimizer, params = engine({"w": start(shapes)["w"].float()}, **options)
    for grads in drawn[:4]:
        take_step(optimizer, params, grads)
    resumed, copies = engine({"w": params["w"].detach()}, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for grads in drawn[4:]:
        take_step(optimizer, params, grads)
        take_step(resumed, copies, grads)
    assert torch.equal(params["w"], copies["w"])


def test_scales_are_read_and_checked_at_the_door():
    assert parse_option("momentum_scales", "1:5:10:25") == (1, 5, 10, 25)
    assert AutomagicConfig(momentum_scales=[1, 5]).momentum_scales == (1, 5)
    with pytest.raises(ValueError, match=r"momentum_scales must hold 1, .* got \(5, 25\)"):
        AutomagicConfig(momentum_scales=(5, 25))
    with pytest.raises(ValueError, match=r"momentum_scales must hold different whole numbers, got \(1, 2.5\)"):
        AutomagicConfig(momentum_scales=(1, 2.5))
    with pytest.raises(ValueError, match=r"different whole numbers, got \(1, 5, 5\)"):
        AutomagicConfig(momentum_scales=(1, 5, 5))
    with pytest.raises(ValueError, match="momentum_scales must be between 1 and 1000, got 0"):
        AutomagicConfig(momentum_scales=(0, 1))
