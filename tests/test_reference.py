"""The reference's whole step, pinned to truths that do not come from it: torch, came-pytorch, identities, invariances.

Stages, rate and codes are checked beside them, in reference/test_*.py.
"""

import math

import came_pytorch
import pytest
import torch
from torch import Tensor

from tests.reference import ParamOptions, ReferenceConfig, ReferenceOptimizer, came, cautious, decay, spatial
from tests.reference.runs import noise, noisy_gradients, one, run

SHAPES = [(), (17,), (1, 5), (5, 1), (7, 33), (6, 4, 3, 3)]
ADAM = ReferenceConfig(momentum_order="before", betas=(0.9, 0.999, 0.9999))


def run_torch(optimizer_class, value: Tensor, gradients: list[Tensor], **options) -> Tensor:
    parameter = torch.nn.Parameter(value.clone())
    optimizer = optimizer_class([parameter], **options)
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
    return parameter.detach()


# against other implementations


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_before_is_adamw(shape):
    gradients, start = noisy_gradients(shape, 100), noise(*shape, seed=1)
    ours = run(one(start, ADAM, lr=1e-2, weight_decay=0.1), gradients)
    theirs = run_torch(torch.optim.AdamW, start, gradients, lr=1e-2, weight_decay=0.1, foreach=False)
    assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(17,), (7, 33), (8, 64), (64, 8)], ids=str)
def test_paper_mode_is_came_pytorch(shape):
    gradients, start = noisy_gradients(shape, 20), noise(*shape, seed=1)
    ours = run(one(start, ReferenceConfig(came_mode="paper"), lr=1e-2, weight_decay=0.1), gradients)
    theirs = run_torch(came_pytorch.CAME, start, gradients, lr=1e-2, weight_decay=0.1)
    assert (ours - theirs).abs().max() < 1e-6


# the direction


def test_residual_sums_follow_from_three_sums():
    """Identity A: U = b1^2 (s^2 u^2 - 2 s u m + m^2) with the unclipped u, its clip factor s and the previous m."""
    u, m, beta1 = 3 * noise(7, 33), 0.4 * noise(7, 33, seed=1), 0.9
    clipped = came.clip_by_rms(u, 1.0)
    direct = (clipped - came.ema(m, clipped, beta1)).square()
    s = 1 / max(1.0, came.rms(u).item())
    for axis in (0, 1):
        u2, um, m2 = u.square().sum(axis), (u * m).sum(axis), m.square().sum(axis)
        assert (beta1**2 * (s**2 * u2 - 2 * s * um + m2) - direct.sum(axis)).abs().max() < 1e-10


@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9999), (0.8, 0.99, 0.999)], ids=str)
@pytest.mark.parametrize("snr", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("turns_at", [1, 15, 40], ids="turns at {}".format)
def test_direction_has_at_most_about_unit_rms(snr, betas, turns_at):
    """The clip knows m^2 by its sums over rows and columns; in the first step they are those of the residual, too."""
    optimizer = one(torch.zeros(16, 24), ReferenceConfig(betas=betas))
    sizes = []
    for t, g in enumerate(noisy_gradients((16, 24), 40, snr)):
        optimizer.step({"w": g if t < turns_at else -g})
        sizes.append(came.rms(optimizer.params["w"].trace["d"]).item())
    assert 0.9 <= sizes[0] <= 1.6
    assert max(sizes[1:]) <= 1.2


@pytest.mark.parametrize("steps", [10, 300, 3000])
def test_a_gradient_that_was_zero_for_long_returns_with_a_step_of_unit_rms(steps):
    optimizer = one(torch.zeros(16, 24))
    for _ in range(steps):
        optimizer.step({"w": torch.zeros(16, 24)})
    optimizer.step({"w": noise(16, 24)})
    assert came.rms(optimizer.params["w"].trace["d"]) <= 1.3


def test_the_clip_is_exact_where_the_squared_momentum_is_a_product():
    momentum = torch.outer(noise(7).abs() + 0.1, noise(33).abs() + 0.1)
    row, col = noise(7, seed=1).square() + 0.1, noise(33, seed=2).square() + 0.1
    d, _, _ = came.confidence(momentum, 0.9 * momentum, momentum, 1e-3 * row, 1e-3 * col, 0.999, 1e-16, t=10**5)
    assert came.rms(d).item() == pytest.approx(1.0, abs=1e-12)


def test_factors_equal_the_product_where_it_is_representable():
    g, row, col = noise(7, 33), noise(7).square(), noise(33).square()
    u, new_row, new_col = came.factored_second_moment(g, row, col, 0.99, t=5)
    v_hat = new_row[:, None] * new_col[None, :] / new_row.mean() / (1 - 0.99**5)
    assert (u - g / v_hat.sqrt()).abs().max() < 1e-12


def test_confidence_equals_the_product_form_written_out():
    """S = sum_i (1 - b3) b3^(t - i) U_i as row and column means, d = m_hat / sqrt(R C / mean(R) / (1 - b3^t))."""
    optimizer, beta1, beta3, n = one(torch.zeros(7, 33)), 0.9, 0.9999, 12
    m, row, col = torch.zeros(7, 33), torch.zeros(7), torch.zeros(33)
    for g in noisy_gradients((7, 33), n, snr=0.0):
        optimizer.step({"w": g})
        u = optimizer.params["w"].trace["u"]
        m = beta1 * m + (1 - beta1) * u
        row = beta3 * row + (1 - beta3) * (u - m).square().mean(dim=1)
        col = beta3 * col + (1 - beta3) * (u - m).square().mean(dim=0)
    s_hat = torch.outer(row, col) / row.mean() / (1 - beta3**n)
    d = m / (1 - beta1**n) / s_hat.sqrt()
    assert came.rms(d) < 0.7  # the last clip is idle, so sizes count
    assert (optimizer.params["w"].trace["d"] - d).abs().max() < 1e-10


def test_a_gradient_that_never_changes_meets_the_floor_of_the_instability():
    u = noise(7, 33)
    zeros = torch.zeros(7, dtype=torch.float64), torch.zeros(33, dtype=torch.float64)
    _, row, col = came.confidence(u, u, u, *zeros, 0.99, 1e-16, t=1)
    floor = (1 - 0.99) * (2.0**-20 * u.square().mean() + 1e-16)
    assert (row / floor - 1).abs().max() < 1e-12
    assert (col / floor - 1).abs().max() < 1e-12


@pytest.mark.parametrize("power", [20, -20])
@pytest.mark.parametrize("shape", [(17,), (7, 33), (6, 4, 3, 3)], ids=str)
def test_gradient_scale_changes_no_bit(shape, power):
    config = ReferenceConfig(
        self_tuning=True, granularity="element", cautious=True, context=True, edge_suppression=True,
        frequency_penalty=0.05, background_regularization=True, spatial_awareness=True, sync_frequency=5,
    )  # fmt: skip
    gradients, start = noisy_gradients(shape, 12), noise(*shape, seed=1)
    plain = run(one(start, config), gradients)
    scaled = run(one(start, config), [g * 2.0**power for g in gradients])
    assert torch.equal(plain, scaled)


def test_zero_gradients_move_nothing_and_a_late_start_is_calm():
    """lora_A: its gradient is exactly zero while B = 0; the first real one must not explode."""
    optimizer = one(torch.ones(4, 8))
    optimizer.step({"w": torch.zeros(4, 8)})
    assert torch.equal(optimizer.params["w"].value, torch.ones(4, 8, dtype=torch.float64))
    optimizer.step({"w": noise(4, 8)})
    assert came.rms(optimizer.params["w"].trace["d"]) <= 1.3


def test_momentum_scales_are_unbiased_for_a_constant_gradient():
    config = ReferenceConfig(momentum_scales=(1, 5, 10, 25), confidence=False)
    optimizer = one(torch.zeros(3, 4), config)
    g = noise(3, 4)
    for _ in range(7):
        optimizer.step({"w": g})
    trace = optimizer.params["w"].trace
    assert (trace["d"] - trace["u"]).abs().max() < 1e-12
    assert {"exp_avg", "exp_avg_5", "exp_avg_10", "exp_avg_25"} <= set(optimizer.params["w"].state)


def test_momentum_scales_average_over_k_times_the_horizon():
    """After an impulse and n - 1 zeros: m_k = (1 - b_k) b_k^(n - 1), and the weights 1 and 1/5 add to 6/5."""
    config = ReferenceConfig(momentum_scales=(1, 5), confidence=False)
    optimizer, n, horizon = one(torch.zeros(1), config), 4, 0.9 ** (1 / 5)
    run(optimizer, [torch.ones(1), *[torch.zeros(1)] * (n - 1)])
    short, long = ((1 - b) * b ** (n - 1) / (1 - b**n) for b in (0.9, horizon))
    assert optimizer.params["w"].trace["d"].item() == pytest.approx((short + long / 5) / 1.2, rel=1e-12)


def test_a_non_finite_gradient_changes_nothing_but_the_counters():
    params = [(name, noise(4, 6), "full", ParamOptions()) for name in ("first", "second")]
    optimizer = ReferenceOptimizer(params, ReferenceConfig(self_tuning=True, context=True))
    optimizer.step({"first": noise(4, 6), "second": noise(4, 6)}, loss=1.0)
    before = {name: (p.value, p.t, dict(p.state)) for name, p in optimizer.params.items()}
    multiplier, rates = optimizer.context.multiplier, dict(optimizer.log_rates)
    bad = torch.full((4, 6), math.inf)
    assert not optimizer.step({"first": noise(4, 6), "second": bad}, loss=1.0)
    for name, p in optimizer.params.items():
        value, t, state = before[name]
        assert torch.equal(p.value, value)
        assert p.t == t
        assert all(torch.equal(p.state[key], state[key]) for key in state)
    assert (optimizer.context.multiplier, optimizer.log_rates) == (multiplier, rates)
    assert (optimizer.skipped, optimizer.consecutive, optimizer.first_offender) == (1, 1, "second")
    assert optimizer.step({"first": noise(4, 6)})
    assert (optimizer.skipped, optimizer.consecutive) == (1, 0)


def test_max_grad_norm_scales_all_gradients_together():
    params = [(name, torch.zeros(4, 6), "full", ParamOptions()) for name in ("a", "b")]
    clipped = ReferenceOptimizer(params, ReferenceConfig(max_grad_norm=1.0))
    plain = ReferenceOptimizer(params)
    a, b = noise(4, 6), 3 * noise(4, 6, seed=1)
    norm = math.sqrt(a.square().sum().item() + b.square().sum().item())
    clipped.step({"a": a, "b": b})
    plain.step({"a": a / norm, "b": b / norm})
    for name in ("a", "b"):
        row = "exp_avg_sq_row"
        assert (clipped.params[name].state[row] - plain.params[name].state[row]).abs().max() < 1e-15


# each switch, where it acts in the chain


KERNEL = (6, 4, 3, 3)


def weigh(d: Tensor, weights: Tensor) -> Tensor:
    return d * weights[:, None, None, None]


def averaged_row_variance(gradients: list[Tensor]) -> Tensor:
    """Two steps of the b2 average, up to a factor."""
    first, second = (spatial.row_variance(came.as_matrix(g)) for g in gradients)
    return 0.999 * first + second


SWITCHES = {  # what the switch makes of the direction d, the two gradients seen, the momentum m
    "cautious": (
        ReferenceConfig(cautious=True),
        lambda d, seen, m: cautious.mask_cautiously(d, seen[-1]),
    ),
    "edges": (
        ReferenceConfig(edge_suppression=True),
        lambda d, seen, m: spatial.suppress_edges(d, (2, 3), 0.1, 0.6),
    ),
    "frequency": (
        ReferenceConfig(frequency_penalty=0.5),
        lambda d, seen, m: spatial.penalise_frequencies(d, (2, 3), 0.5),
    ),
    "background": (
        ReferenceConfig(background_regularization=True),
        lambda d, seen, m: weigh(d, spatial.background_weights(m)),
    ),
    "awareness": (
        ReferenceConfig(spatial_awareness=True, detail_preservation=0.5),
        lambda d, seen, m: weigh(d, spatial.awareness_weights(averaged_row_variance(seen), 0.5)),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_direction_by_its_formula(name):
    config, change = SWITCHES[name]
    switched, plain, gradients = one(torch.zeros(KERNEL), config), one(torch.zeros(KERNEL)), noisy_gradients(KERNEL, 2)
    run(switched, gradients)
    run(plain, gradients)
    d = plain.params["w"].trace["d"].reshape(KERNEL)
    expected = change(d, gradients, plain.params["w"].state["exp_avg"])
    assert (switched.params["w"].trace["d"].reshape(KERNEL) - expected).abs().max() < 1e-12
    assert (expected - d).abs().max() > 1e-3


def test_spatial_terms_are_inert_on_linear_weights():
    config = ReferenceConfig(
        edge_suppression=True, frequency_penalty=0.5, background_regularization=True, spatial_awareness=True
    )
    gradients, start = noisy_gradients((7, 33), 5), noise(7, 33, seed=1)
    assert torch.equal(run(one(start, config), gradients), run(one(start), gradients))


@pytest.mark.parametrize("role", ["bias", "norm", "magnitude", "lora_B"])
def test_only_weights_decay(role):
    gradients, start = noisy_gradients((17,), 3), noise(17)
    decayed = run(one(start, role=role, weight_decay=0.5, lr=0.1), gradients)
    plain = run(one(start, role=role, lr=0.1), gradients)
    assert torch.equal(decayed, plain) == (role != "lora_B")


@pytest.mark.parametrize("mode", ["decoupled", "cautious", "selective"])
def test_decay_uses_the_rate_that_is_applied(mode):
    config = ReferenceConfig(weight_decay_mode=mode, self_tuning=True)
    start, g = noise(7, 33), noise(7, 33, seed=1)
    optimizer = one(start, config, lr=1.0, max_lr=1e-3, weight_decay=0.5)
    optimizer.step({"w": g}, sched=0.5)
    d = optimizer.params["w"].trace["d"]
    expected = {
        "decoupled": decay.decay(start, 5e-4, 0.5) - 5e-4 * d,
        "cautious": decay.decay_cautiously(start, d, 5e-4, 0.5) - 5e-4 * d,
        "selective": decay.write_selectively(start, 5e-4 * d, g, torch.zeros_like(start), 0.5),
    }
    assert (optimizer.params["w"].value - expected[mode]).abs().max() < 1e-15
