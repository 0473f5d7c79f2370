"""The cautious mask (stage 6): only elements that agree with the gradient step, made up for by a bounded factor."""

import math

import pytest
import torch

from hf_automagic.config import AutomagicConfig
from hf_automagic.optim import bucket
from hf_automagic.optim.recipes import build_chain
from hf_automagic.transforms.cautious import Cautious
from hf_automagic.transforms.momentum import Momentum
from tests.reference import cautious as slow
from tests.stage_cases import (
    check_against_reference,
    context,
    gradients,
    noise,
    run_engine,
    run_in_pieces,
    run_one,
    start,
)

LINEAR = {"w": (7, 33), "v": (17,), "s": (1, 5)}


@pytest.mark.parametrize("shape", [(3, 8, 64), (2, 7, 33), (1, 1, 5), (2, 17, 1)], ids=str)
def test_mask_is_the_formula(shape):
    d, g = noise(*shape), noise(*shape, seed=1)
    d[:, 0], g[:, :, 0] = 0.0, 0.0
    masked, _ = run_one(Cautious(), d, {}, context(g))
    for i in range(len(d)):
        assert (masked[i] - slow.mask_cautiously(d[i], g[i])).abs().max() < 1e-12


def test_optimizer_equals_the_reference():
    check_against_reference(LINEAR, {"cautious": True})


def test_noise_keeps_64_percent_at_beta1_09():
    """The momentum of noise agrees with its newest gradient in 1/2 + asin(sqrt(1 - beta1^2)) / pi of all elements."""
    momentum, state = Momentum(0.9), {"exp_avg": torch.zeros(1, 200, 300, dtype=torch.float64)}
    for step in range(1, 61):
        g = noise(1, 200, 300, seed=step)
        d, changed = momentum.apply(g, state, None, context(g, step=step))
        state["exp_avg"] = changed["exp_avg"]
    share = (run_one(Cautious(), d, {}, context(g))[0] != 0).double().mean().item()
    assert share == pytest.approx(0.64, abs=0.01)
    assert share == pytest.approx(0.5 + math.asin(math.sqrt(1 - 0.9**2)) / math.pi, abs=0.005)


def test_what_is_left_is_at_most_doubled():
    g = torch.ones(1, 10, 10, dtype=torch.float64)
    d = -g.clone()
    d[0, 0, 0] = 1.0
    masked, _ = run_one(Cautious(), d, {}, context(g))
    assert masked[0, 0, 0] == 2.0
    assert masked.count_nonzero() == 1
    assert run_one(Cautious(floor=0.1), d, {}, context(g))[0][0, 0, 0] == pytest.approx(10.0)


def test_agreement_survives_underflow():
    """The product of both is zero in float32; the signs are not."""
    d, g = torch.full((1, 2, 2), 1e-30), torch.full((1, 2, 2), 1e-30)
    assert torch.equal(run_one(Cautious(), d, {}, context(g))[0], d)


def test_zeros_have_no_say():
    d, g = noise(1, 6, 8), noise(1, 6, 8, seed=1)
    g[:, 3:] = 0.0
    masked, _ = run_one(Cautious(), d, {}, context(g))
    alone, _ = run_one(Cautious(), d[:, :3], {}, context(g[:, :3]))
    assert torch.equal(masked[:, :3], alone)
    assert not masked[:, 3:].any()


def test_no_step_opposes_its_gradient():
    shapes = {"w": (16, 24)}
    first, last = start(shapes)["w"], list(gradients(shapes, 6))[-1]["w"]
    before = run_engine(shapes, steps=5, cautious=True)["w"]
    moved = run_engine(shapes, steps=6, cautious=True)["w"] - before
    assert not (moved * last > 0).any()
    assert (before != first).any()
    plain = run_engine(shapes, steps=6)["w"] - run_engine(shapes, steps=5)["w"]
    assert (plain * last > 0).any()


@pytest.mark.parametrize("height", [1, 3, 10])
def test_slices_of_rows_equal_the_whole(height):
    d, g = noise(2, 7, 33), noise(2, 7, 33, seed=1)
    whole, _ = run_one(Cautious(), d, {}, context(g))
    assert (run_in_pieces(Cautious(), d, {}, context(g), height) - whole).abs().max() < 1e-12


def test_a_chain_swept_in_pieces_equals_the_whole(monkeypatch):
    whole = run_engine(LINEAR, cautious=True)
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 4 * 33 * 2)  # two rows of w
    pieces = run_engine(LINEAR, cautious=True)
    for name in LINEAR:
        assert (pieces[name] - whole[name]).abs().max() < 1e-6


def test_it_is_off_unless_asked_for():
    for is_matrix in (True, False):
        assert Cautious() not in build_chain(AutomagicConfig(), is_matrix)
        assert Cautious() in build_chain(AutomagicConfig(cautious=True), is_matrix)
