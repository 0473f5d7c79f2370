"""Adapters, the rate and the codes inside a whole step."""

import math

import pytest
import torch

from . import lora, self_tuning
from .config import Pair, ParamOptions, ReferenceConfig
from .optimizer import ReferenceOptimizer
from .runs import noise, noisy_gradients, one, run

# adapters


def test_allora_multiplies_the_direction_of_both_halves():
    a, b = noise(4, 30), noise(20, 4, seed=1)
    params = [("a", a, "lora_A", ParamOptions()), ("b", b, "lora_B", ParamOptions())]
    pairs = [Pair("a", "b", 0.5)]
    damped = ReferenceOptimizer(params, ReferenceConfig(allora=True), pairs)
    plain = ReferenceOptimizer(params, ReferenceConfig(), pairs)
    for optimizer in (damped, plain):
        optimizer.step({"a": noise(4, 30, seed=2), "b": noise(20, 4, seed=3)})
    gains, gain_a = lora.allora_gains(a, b, 0.5, 2.0)
    assert torch.equal(damped.params["a"].trace["d"], plain.params["a"].trace["d"] * gain_a)
    assert torch.equal(damped.params["b"].trace["d"], plain.params["b"].trace["d"] * gains[:, None])


def test_rank_penalty_comes_after_the_write_of_every_nth_step():
    params = [
        ("a", noise(4, 30), "lora_A", ParamOptions(lr=1e-2)),
        ("b", noise(20, 4, seed=1), "lora_B", ParamOptions()),
    ]
    config = ReferenceConfig(rank_penalty=True, rank_penalty_every=2, rank_penalty_strength=1.0)
    penalised = ReferenceOptimizer(params, config, [Pair("a", "b")])
    plain = ReferenceOptimizer(params, ReferenceConfig())
    for step in range(2):
        assert torch.equal(penalised.params["a"].matrix, plain.params["a"].matrix)
        for optimizer in (penalised, plain):
            optimizer.step({"a": noise(4, 30, seed=step), "b": noise(20, 4, seed=step)})
    a, b = lora.shrink_spectrum(plain.params["a"].matrix, plain.params["b"].matrix, 1e-2, 1.0, 1.2, 2)
    assert torch.equal(penalised.params["a"].matrix, a)
    assert torch.equal(penalised.params["b"].matrix, b)


# the rate


def test_the_rate_of_a_step_comes_from_the_step_before():
    """Step 1 has no previous momentum, step 2 sees it agree, step 3 is the first to move faster, by e^kappa."""
    optimizer, rates = one(torch.zeros(16, 24), ReferenceConfig(self_tuning=True, kappa=0.1), lr=1e-5), []
    for _ in range(60):
        optimizer.step({"w": noise(16, 24)})
        rates.append(optimizer.params["w"].lr)
    assert rates[:3] == pytest.approx([1e-5, 1e-5, 1e-5 * math.exp(0.1)])
    assert rates[-1] == pytest.approx(1e-3)
    assert optimizer.log_rates["global"] == pytest.approx(math.log(100))  # at the rail, not wound up beyond it


def test_a_rate_that_starts_outside_the_rails_is_brought_back():
    optimizer = one(torch.zeros(8, 9), ReferenceConfig(self_tuning=True), lr=1.0)
    optimizer.step({"w": noise(8, 9)})
    assert optimizer.params["w"].lr == 1e-3
    optimizer.step({"w": -noise(8, 9)})
    optimizer.step({"w": -noise(8, 9)})
    assert optimizer.params["w"].lr < 1e-3


def test_groups_can_tune_their_own_rates():
    options = [ParamOptions(lr=1e-5, group=group) for group in ("calm", "torn")]
    params = [("calm", torch.zeros(8, 9), "full", options[0]), ("torn", torch.zeros(8, 9), "full", options[1])]
    optimizer = ReferenceOptimizer(params, ReferenceConfig(self_tuning=True, lr_pool="group"))
    for step in range(10):
        optimizer.step({"calm": noise(8, 9), "torn": noise(8, 9) * (-1) ** step})
    assert optimizer.log_rates["calm"] > 0.5
    assert optimizer.log_rates["torn"] < -0.5


def test_adaptation_stops_when_told():
    optimizer = one(
        torch.zeros(8, 9), ReferenceConfig(self_tuning=True, granularity="element", adapt_steps=5), lr=1e-5
    )
    for _ in range(5):
        optimizer.step({"w": noise(8, 9)})
    log_rate, codes = optimizer.log_rates["global"], optimizer.params["w"].state["lr_mask"]
    for _ in range(4):
        optimizer.step({"w": noise(8, 9)})
    assert optimizer.log_rates["global"] == log_rate > 0
    assert torch.equal(optimizer.params["w"].state["lr_mask"], codes)
    assert (codes != 128).any()


def test_pure_noise_leaves_the_pooled_rate_where_it_was():
    """K walks with kappa / (4 sqrt 8) a step and no drift: 12 runs of 80 steps end within 3 standard errors of 0."""
    ends = []
    for seed in range(12):
        optimizer = one(torch.zeros(8, 24), ReferenceConfig(self_tuning=True), lr=1e-3, min_lr=1e-9, max_lr=1e3)
        run(optimizer, noisy_gradients((8, 24), 80, snr=0.0, seed=seed))
        ends.append(optimizer.log_rates["global"])
    ends = torch.tensor(ends)
    expected = 0.1 / (4 * math.sqrt(8)) * math.sqrt(80)
    assert ends.mean().abs() < 3 * expected / math.sqrt(12)
    assert 0.5 * expected < ends.std() < 2 * expected


def test_the_element_mask_bends_the_step_and_is_recentred_on_time():
    config = ReferenceConfig(self_tuning=True, granularity="element", sync_frequency=16)
    optimizer, means = one(torch.zeros(8, 9), config), []
    for _ in range(16):
        before = optimizer.params["w"].matrix
        optimizer.step({"w": noise(8, 9)})
        p = optimizer.params["w"]
        k = p.state["lr_mask"].double() - 128
        assert (p.matrix - (before - p.lr * self_tuning.RHO**k * p.trace["d"])).abs().max() < 1e-15
        means.append(k.mean().item())
    assert means[14] > 2
    assert abs(means[15]) <= 0.5


def test_one_pool_over_two_rails_stops_at_the_wider_one():
    options = {
        "adapter": ParamOptions(lr=1e-4, min_lr=1e-5, max_lr=1e-3),
        "full": ParamOptions(lr=1e-4, min_lr=1e-6, max_lr=1e-4),
    }
    params = [(name, torch.zeros(16, 24), "full", o) for name, o in options.items()]
    for sign, bound, rates in [(1, 10.0, (1e-3, 1e-4)), (-1, 0.01, (1e-5, 1e-6))]:
        optimizer = ReferenceOptimizer(params, ReferenceConfig(self_tuning=True))
        for step in range(80):
            g = noise(16, 24) * sign**step
            optimizer.step({"adapter": g, "full": g})
        assert math.exp(optimizer.log_rates["global"]) == pytest.approx(bound)
        assert (optimizer.params["adapter"].lr, optimizer.params["full"].lr) == pytest.approx(rates)


def test_without_self_tuning_the_rate_is_the_schedule_even_outside_the_rails():
    optimizer = one(noise(8, 9), lr=1.0)
    optimizer.step({"w": noise(8, 9)}, sched=0.25)
    assert optimizer.params["w"].lr == 0.25


def test_a_schedule_at_zero_moves_nothing():
    config = ReferenceConfig(self_tuning=True, granularity="element", rank_penalty=True, rank_penalty_every=1)
    params = [
        (name, noise(6, 6), role, ParamOptions(weight_decay=0.1)) for name, role in (("a", "lora_A"), ("b", "lora_B"))
    ]
    optimizer = ReferenceOptimizer(params, config, [Pair("a", "b")])
    optimizer.step({"a": noise(6, 6, seed=1), "b": noise(6, 6, seed=2)}, sched=0.0)
    assert all(torch.equal(p.matrix, noise(6, 6)) for p in optimizer.params.values())


def test_the_multiplier_scales_the_rate_within_the_rail():
    optimizer = one(noise(8, 9), ReferenceConfig(self_tuning=True, context=True, adapt_steps=0), lr=4e-4)
    for multiplier, expected in [(0.5, 2e-4), (1.0, 4e-4), (2.0, 8e-4)]:
        optimizer.context.multiplier = multiplier
        optimizer.step({"w": noise(8, 9)})
        assert optimizer.params["w"].lr == pytest.approx(expected)
    optimizer.params["w"].options = ParamOptions(lr=9e-4)
    optimizer.context.multiplier = 2.0
    optimizer.step({"w": noise(8, 9)})
    assert optimizer.params["w"].lr == 1e-3


# codes


@pytest.mark.parametrize("error_correction", [False, True])
def test_coded_states_stay_close_to_exact_ones(error_correction):
    gradients, start = noisy_gradients((20, 48), 60), torch.zeros(20, 48)
    exact = run(one(start), gradients)
    config = ReferenceConfig(error_correction=error_correction)
    coded = run(one(start, config, quantized=True, log16=True), gradients)
    error = ((coded - exact).norm() / exact.norm()).item()
    assert 0 < error < (0.002 if error_correction else 0.02)
