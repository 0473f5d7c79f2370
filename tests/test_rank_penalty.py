"""The rank penalty and the rank of a pair (stage 11): the spectrum of B A shrinks, and nothing else moves."""

import math

import pytest
import torch
from torch import Tensor

from hf_automagic.optim.sweep import carry_out
from hf_automagic.transforms.lora import effective_rank, product_spectrum, shrink_spectrum, stable_rank
from tests.reference import lora as slow
from tests.stage_cases import (
    ALLORA,
    CONV,
    LORA,
    PENALTY,
    WIDE,
    check_against_reference,
    distance,
    engine,
    factors,
    gradients,
    make_pairs,
    noise,
    run_engine,
    start,
    take_step,
)

# the rank penalty


@pytest.mark.parametrize("shapes", [LORA, CONV, WIDE], ids=["linear", "conv", "wide"])
@pytest.mark.parametrize("emphasis", [1.0, 1.2, 2.0, 3.0])
def test_optimizer_with_rank_penalty_equals_the_reference(shapes, emphasis):
    own = {"rank_penalty_strength": 5.0, "rank_penalty_every": 3, "low_rank_emphasis": emphasis}
    check_against_reference(shapes, {"lora_rank_penalty": True, **own}, {"rank_penalty": True, **own})


@pytest.mark.parametrize("emphasis", [1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize(("out", "r", "into"), [(20, 4, 30), (6, 8, 5), (5, 8, 40), (33, 1, 7)])
def test_spectrum_shrinks_and_its_vectors_stay(out, r, into, emphasis):
    """B A = U Sigma V^T becomes U D Sigma V^T."""
    a, b = factors(2, out, r, into)
    amount = torch.tensor([0.05, 0.3], dtype=torch.float64)
    to_a, to_b = shrink_spectrum(a, b, amount, emphasis)
    for i in range(2):
        u, sigma, v = slow.spectrum(a[i], b[i])
        shares = slow.shrink_factors(sigma, amount[i].item(), 1.0, emphasis, 1)
        expected = u @ torch.diag(shares * sigma) @ v.T
        product = (b[i] + to_b[i]) @ (a[i] + to_a[i])
        assert (product - expected).norm() < 1e-10 * expected.norm()
        assert ((shares >= 0.5) & (shares < 1)).all()


def test_no_amount_moves_nothing():
    a, b = factors()
    for change in shrink_spectrum(a, b, torch.zeros((), dtype=torch.float64), 1.2):
        assert not change.any()


def test_tiny_amounts_do_not_cancel_in_float32():
    """1 - sqrt(1 - x) at x = 1e-7 is less than float32's spacing at one."""
    a, b = factors()
    exact, _ = shrink_spectrum(a, b, torch.tensor(1e-7, dtype=torch.float64), 1.0)
    close, _ = shrink_spectrum(a.float(), b.float(), torch.tensor(1e-7), 1.0)
    assert (close - exact).norm() < 1e-4 * exact.norm()


def test_a_broken_pair_breaks_neither_the_others_nor_the_step():
    a, b = factors()
    b[1, 3, 2] = math.inf
    to_a, to_b = shrink_spectrum(a, b, torch.tensor(0.1, dtype=torch.float64), 1.2)
    alone = shrink_spectrum(a[::2], b[::2], torch.tensor(0.1, dtype=torch.float64), 1.2)
    assert torch.allclose(to_a[::2], alone[0])
    assert torch.allclose(to_b[::2], alone[1])
    assert product_spectrum(a, b)[1].max() == 0


def test_strength_and_emphasis_turn_as_documented():
    """Strength lowers all singular values; emphasis moves the loss from the large to the small ones."""
    a, b = factors(1)
    sigma = product_spectrum(a, b)[0]

    def left(amount: float, emphasis: float) -> Tensor:
        to_a, to_b = shrink_spectrum(a, b, torch.tensor(amount, dtype=torch.float64), emphasis)
        return product_spectrum(a + to_a, b + to_b)[0] / sigma

    assert (left(0.1, 1.2) > left(0.2, 1.2)).all()
    assert (left(0.1, 1.0) - 0.9).abs().max() < 1e-12
    for small, large in ((1.0, 1.2), (1.2, 2.0), (2.0, 3.0)):
        assert left(0.01, large)[0] > left(0.01, small)[0]
        assert left(0.01, large)[-1] < left(0.01, small)[-1]
    lost = (1 - left(0.01, 2.0)) * sigma
    assert (lost - lost[0]).abs().max() < 1e-10  # the nuclear norm takes the same from each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_is_never_moved_by_the_penalty(dtype):
    """While B = 0, A's gradient is zero; what a step writes into B does not reach A before A has seen a gradient."""
    for b_grad in (torch.zeros(20, 4), noise(20, 4)):
        weights = {"a": noise(4, 30).to(dtype), "b": torch.zeros(20, 4, dtype=dtype)}
        weights["a"][0, :5] = -0.0
        optimizer, params = engine(weights, **{**PENALTY, "rank_penalty_every": 1})
        take_step(optimizer, params, {"a": torch.zeros(4, 30), "b": b_grad})
        bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(params["a"].detach().view(bits), weights["a"].view(bits))
        assert params["b"].any() == b_grad.any()
        take_step(optimizer, params, {"a": noise(4, 30), "b": b_grad})
        assert not torch.equal(params["a"], weights["a"])


@pytest.mark.parametrize("reason", ["non-finite", "rate zero", "not due"])
def test_a_step_that_must_not_shrink_changes_no_bit(reason):
    weights = {name: weight.float() for name, weight in start(LORA).items()}
    weights["a"][0] = -0.0
    every = 2 if reason == "not due" else 1
    penalised, params = engine(weights, **{**PENALTY, "rank_penalty_every": every})
    plain, others = engine(weights)
    for optimizer, own in ((penalised, params), (plain, others)):
        if reason == "rate zero":
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        grads = next(gradients(LORA, 1))
        if reason == "non-finite":
            grads["w"][0, 0] = math.nan
        take_step(optimizer, own, grads)
    for name in LORA:
        assert torch.equal(params[name].detach().view(torch.int32), others[name].detach().view(torch.int32))


def test_the_penalty_finds_the_rank_of_the_truth():
    """Noisy targets of rank 2, factors of rank 8: the effective rank of B A falls towards 2 with the strength."""
    truth, ranks = noise(24, 2, seed=1) @ noise(2, 32, seed=2), []
    for strength in (0.0, 0.1, 0.3):
        weights = {"a": noise(8, 32, seed=3) / math.sqrt(32), "b": torch.zeros(24, 8, dtype=torch.float64)}
        optimizer, params = engine(
            weights, lora_rank_penalty=strength > 0, rank_penalty_strength=strength, rank_penalty_every=5, lr=2e-2
        )
        for step in range(200):
            inputs = noise(32, 16, seed=step)
            noisy = truth @ inputs + 8 * noise(24, 16, seed=1000 + step)
            (params["b"] @ params["a"] @ inputs - noisy).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = optimizer.pair_ranks()
        assert found is not None
        ranks.append(found.effective_rank.item())
        assert (params["b"] @ params["a"] - truth).norm() < 0.2 * truth.norm()
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 2.3
    assert ranks[-1] < 2.1


def test_bf16_factors_shrink_on_average():
    """A share of 1e-3 lies below bf16's resolution of 4e-3; rounded stochastically it still arrives."""
    weights = {"a": noise(8, 400).bfloat16(), "b": noise(300, 8).bfloat16()}
    options = {"rank_penalty_strength": 0.2, "low_rank_emphasis": 1.0, "rank_penalty_every": 1}
    optimizer, params = engine(weights, lora_rank_penalty=True, **options)
    shrunk = optimizer._current_plan().pairs
    optimizer._live_plan()
    for name in "ab":
        params[name].grad = torch.ones_like(params[name])
    before = {name: params[name].detach().clone() for name in "ab"}
    with torch.no_grad():
        shrunk.shrink_spectra([torch.tensor(1e-2)] * 2, torch.tensor(True), steps=1, done=set())
    for name in "ab":
        ratio = (params[name].float() * before[name].float()).sum() / before[name].float().square().sum()
        assert (1 - ratio).item() == pytest.approx(0.001, rel=0.3)


def test_the_penalty_rounds_with_other_numbers_than_the_step():
    optimizer, params = engine({"w": torch.ones(64, 64, dtype=torch.bfloat16)})
    bucket = optimizer._live_plan().buckets[0][1]
    halfway, rounded = torch.full((1, 64, 64), 1 + 2.0**-8), []
    with torch.no_grad():
        for draw in (0, 1):
            step = bucket.stacks["step"]
            carry_out(bucket._rounded(bucket.params, slice(0, 64), halfway, bucket.keys, step, draw=draw))
            rounded.append(params["w"].float())
        carry_out(bucket.rewritten([0], halfway))
    assert torch.equal(params["w"].float(), rounded[1])
    assert 0.4 < (rounded[0] != rounded[1]).float().mean() < 0.6


def test_resuming_keeps_the_beat():
    drawn = list(gradients(LORA, 8))
    optimizer, params = engine({name: w.float() for name, w in start(LORA).items()}, **PENALTY, **ALLORA)
    for grads in drawn[:5]:
        take_step(optimizer, params, grads)
    resumed, copies = engine({name: p.detach() for name, p in params.items()}, **PENALTY, **ALLORA)
    resumed.load_state_dict(optimizer.state_dict())
    for grads in drawn[5:]:
        take_step(optimizer, params, grads)
        take_step(resumed, copies, grads)
    assert all(torch.equal(params[name], copies[name]) for name in LORA)
    assert (
        distance({n: p.detach().double() for n, p in params.items()}, run_engine(LORA, steps=8, **ALLORA), LORA) > 1e-3
    )


@pytest.mark.gpu
def test_the_penalty_on_a_gpu_ends_where_the_cpu_ends():
    expected = run_engine(LORA, **ALLORA, **PENALTY)
    optimizer, params = engine({name: weight.cuda() for name, weight in start(LORA).items()}, **ALLORA, **PENALTY)
    for grads in gradients(LORA, 12):
        take_step(optimizer, params, {name: grad.cuda() for name, grad in grads.items()})
    for name in LORA:
        assert (params[name].cpu() - expected[name]).abs().max() < 1e-6


# diagnostics


def test_ranks_of_known_spectra():
    sigma = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert effective_rank(sigma)[:2].tolist() == pytest.approx([4.0, 1.0])
    assert effective_rank(sigma)[2].item() == pytest.approx(slow.effective_rank(sigma[2].double()))
    assert stable_rank(sigma)[2].item() == pytest.approx(slow.stable_rank(sigma[2].double()))
    assert effective_rank(sigma)[3] == stable_rank(sigma)[3] == 0


def test_pair_ranks_are_those_of_the_products():
    optimizer, params, _ = make_pairs([(20, 4, 30), (12, 4, 30), (20, 4, 30)])
    found = optimizer.pair_ranks()
    assert found is not None
    assert not optimizer.state  # looking creates nothing
    names = [f"b{i}" for i in (2, 1, 0)] + [f"a{i}" for i in range(3)]  # the order of the groups
    for position, effective, stable in zip(found.positions, found.effective_rank, found.stable_rank, strict=True):
        number = names[position][1:]
        sigma = torch.linalg.svdvals(params[f"b{number}"] @ params[f"a{number}"])[:4].detach()
        assert effective.item() == pytest.approx(slow.effective_rank(sigma), rel=1e-5)
        assert stable.item() == pytest.approx(slow.stable_rank(sigma), rel=1e-5)
    assert engine(start({"w": (7, 33)}))[0].pair_ranks() is None
