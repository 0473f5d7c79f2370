"""The context finds planted spikes, ignores noise, and lets each of its knobs act."""

import math
import random
import statistics

import pytest

from .context import ReferenceContext, read_losses


def feed(losses: list[float], cosine: float = 0.0, **options) -> tuple[ReferenceContext, list[bool]]:
    context, edges = ReferenceContext(**options), []
    for loss in losses:
        context.advance(cosine, loss)
        edges.append(context.is_edge_case)
    return context, edges


def gaussian_losses(n: int, seed: int = 0, mean: float = 2.0, std: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, std) for _ in range(n)]


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**-20])
def test_a_planted_spike_is_an_edge_case_and_its_neighbours_are_not(scale):
    losses = gaussian_losses(80)
    losses[60] += 3.0  # 30 sigma
    _, edges = feed([loss * scale for loss in losses])
    assert [i for i, edge in enumerate(edges) if edge] == [60]


def test_gaussian_noise_is_never_an_edge_case():
    for seed in range(10):
        context, edges = feed(gaussian_losses(250, seed))
        assert not any(edges)
        assert 0.8 < context.multiplier < 1.2


def test_a_diverging_loss_ends_at_half_the_rate_and_a_falling_one_above_it():
    rising, edges = feed([*gaussian_losses(40), *(2 * 1.3**i for i in range(40))])
    assert any(edges)
    assert rising.multiplier == pytest.approx(0.5, abs=0.01)
    falling, edges = feed([loss - 0.01 * i for i, loss in enumerate(gaussian_losses(80, mean=9.0))])
    assert not any(edges)
    assert falling.multiplier > 1.05


def test_the_threshold_the_window_and_the_rate_each_act():
    losses = gaussian_losses(80)
    losses[60] += 0.65  # 6.5 sigma: between the two thresholds
    assert not any(feed(losses, edge_threshold=0.95)[1])
    assert any(feed(losses, edge_threshold=0.9)[1])
    assert not any(feed([*losses[:60], 9.0], context_window=20)[1])  # 19 older losses are too few to judge
    slow, fast = (feed([1.0], cosine=1.0, context_window=1, adaptation_rate=rate)[0] for rate in (0.1, 1.0))
    assert fast.multiplier == pytest.approx(math.exp(0.5))
    assert slow.multiplier == pytest.approx(1 + 0.1 * (math.exp(0.5) - 1))


def test_a_loss_on_its_own_line_is_no_spike():
    """Twenty-one losses 0, 1, ... 20: halves 4.5 and 15.5, slope 1, next 21, spread 1e-3 of the middle value 10."""
    line = [float(i) for i in range(21)]
    assert read_losses([*line, 21.0]) == pytest.approx((0.0, -1.0))
    assert read_losses([*line, 21.03])[0] == pytest.approx(1 - math.exp(-3 / 2.5))
    assert read_losses([*line[:19], 21.0]) == (0.0, 0.0)


def test_the_trend_is_measured_in_standard_errors():
    """Under Gaussian noise the difference of two medians over its standard error has unit variance."""
    trends = [8 * math.atanh(read_losses(gaussian_losses(101, seed))[1]) for seed in range(400)]
    assert statistics.mean(trends) == pytest.approx(0.0, abs=0.15)
    assert statistics.stdev(trends) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("slope", [-0.006, 0.006])
def test_a_rising_loss_brakes_harder_than_a_falling_one_speeds_up(slope):
    losses = [loss + slope * i for i, loss in enumerate(gaussian_losses(60, std=0.2))]
    context, edges = feed(losses, adaptation_rate=1.0)
    assert not edges[-1]
    assert 0.05 < abs(context.trend) < 0.9
    assert context.multiplier == pytest.approx(math.exp((0.25 if slope < 0 else 0.7) * context.trend))


def test_opposing_steps_and_skipped_steps_are_edge_cases_without_any_loss():
    context = ReferenceContext(context_window=10)
    for _ in range(40):
        context.advance(-0.9, None)
    assert context.is_edge_case
    assert context.multiplier == pytest.approx(0.5, abs=0.05)
    context = ReferenceContext()
    context.note_skipped_step()
    assert context.multiplier == 1.0
    context.advance(0.0, None)
    assert context.is_edge_case
    context.advance(0.0, None)
    assert not context.is_edge_case


def test_non_finite_losses_are_left_out():
    losses = gaussian_losses(60)
    clean, _ = feed(losses)
    for junk in (math.nan, math.inf, None):
        dirty, _ = feed(losses)
        dirty.advance(0.0, junk)
        assert dirty.losses == clean.losses
