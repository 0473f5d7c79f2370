"""Weight decay (stage 9) in its three modes, with the rate that is really applied."""

import pytest
import torch

from hf_automagic.config import AutomagicConfig
from hf_automagic.optim import bucket
from hf_automagic.transforms.decay import CautiousWeightDecay, DecoupledWeightDecay, SelectiveWeightDecay
from tests.reference import decay as slow
from tests.stage_cases import (
    check_against_reference,
    context,
    engine,
    gradients,
    noise,
    run_engine,
    run_in_pieces,
    run_one,
    start,
    take_step,
)

ALL = {"a": (4, 30), "b": (20, 4), "w": (7, 33), "v": (17,)}
LR = 1e-2


@pytest.mark.parametrize(("mode", "weight_decay"), [("decoupled", 0.5), ("cautious", 0.5), ("selective", 1.0)])
def test_optimizer_equals_the_reference(mode, weight_decay):
    check_against_reference(ALL, {"weight_decay_mode": mode}, weight_decay=weight_decay)


def test_decoupled_and_cautious_are_their_formulas():
    d, w = noise(2, 7, 33), noise(2, 7, 33, seed=1)
    seen = context(noise(2, 7, 33, seed=2), w, lr=LR)
    plain, _ = run_one(DecoupledWeightDecay(0.1), LR * d, {}, seen)
    assert (w - plain - (slow.decay(w, LR, 0.1) - LR * d)).abs().max() < 1e-14
    cautious, _ = run_one(CautiousWeightDecay(0.1), LR * d, {}, seen)
    assert (w - cautious - (slow.decay_cautiously(w, d, LR, 0.1) - LR * d)).abs().max() < 1e-14


def test_cautious_decay_touches_only_what_the_step_does_not_push_outwards():
    d, w = noise(1, 40, 50), noise(1, 40, 50, seed=1)
    decayed = run_one(CautiousWeightDecay(0.1), LR * d, {}, context(d, w, lr=LR))[0] != LR * d
    assert torch.equal(decayed, d.sign() == w.sign())
    assert 0.45 < decayed.double().mean() < 0.55


@pytest.mark.parametrize("origin", [None, noise(7, 33, seed=5)], ids=["zero", "kept"])
@pytest.mark.parametrize("step_size", [0.1, 1.0, 5.0])
def test_selective_decay_is_its_formula(origin, step_size):
    transform = SelectiveWeightDecay(0.8, keeps_origin=origin is not None)
    state = {} if origin is None else {"initial_param": origin[None]}
    pulled = []
    for seed in range(6):
        change, w, g = step_size * noise(7, 33, seed=seed), noise(7, 33, seed=seed + 20), noise(7, 33, seed=seed + 40)
        moved, _ = run_one(transform, change[None], state, context(g[None], w[None], step=3))
        expected = slow.write_selectively(w, change, g, torch.zeros(7, 33) if origin is None else origin, 0.8)
        assert (w - moved[0] - expected).abs().max() < 1e-12
        pulled.append(not torch.equal(moved[0], change))
    assert any(pulled)
    assert not all(pulled)


def test_selective_decay_of_strength_one_keeps_the_old_distance():
    """Where it acts, the step's way outwards is taken back as a whole."""
    w, change = noise(1, 7, 33), -0.05 * noise(1, 7, 33)
    moved, _ = run_one(SelectiveWeightDecay(1.0, keeps_origin=False), change, {}, context(w, w))
    assert (w - moved).norm() == pytest.approx(w.norm())
    assert (w - change).norm() > 1.04 * w.norm()


def test_selective_decay_sees_small_steps_in_float32():
    """The difference of two nearly equal distances must not cancel: a step of 1e-7 of the weight is measured to 1%."""
    w = noise(1, 64, 64).float()
    change = -1e-7 * w
    moved, _ = run_one(SelectiveWeightDecay(1.0, keeps_origin=False), change, {}, context(w, w))
    assert ((moved - change).norm() / change.norm()).item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("height", [2, 5])
def test_slices_of_rows_equal_the_whole(height):
    w, change = noise(2, 7, 33), -0.1 * noise(2, 7, 33)
    transform, state = SelectiveWeightDecay(1.0, keeps_origin=True), {"initial_param": 0.5 * w}
    whole, _ = run_one(transform, change, state, context(w, w, step=4))
    assert (run_in_pieces(transform, change, state, context(w, w, step=4), height) - whole).abs().max() < 1e-12
    assert (whole - change).abs().max() > 1e-3


def test_a_chain_swept_in_pieces_equals_the_whole(monkeypatch):
    options = {"weight_decay_mode": "selective", "weight_decay": 1.0}
    whole = run_engine(ALL, **options)
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 4 * 33 * 2)
    pieces = run_engine(ALL, **options)
    for name in ALL:
        assert (pieces[name] - whole[name]).abs().max() < 1e-6


def test_selective_decay_keeps_the_first_weights_of_full_weights_alone():
    weights = {name: weight.float() for name, weight in start(ALL).items()}
    optimizer, params = engine(weights, weight_decay_mode="selective", weight_decay=1.0)
    for grads in gradients(ALL, 3):
        take_step(optimizer, params, grads)
    assert torch.equal(optimizer.state[params["w"]]["initial_param"], weights["w"])
    assert "initial_param" not in optimizer.state[params["a"]]
    fresh, _ = engine(weights, weight_decay_mode="selective", weight_decay=1.0)
    for stats in (optimizer.memory_stats(), fresh.memory_stats()):
        assert stats.bytes_by_state["initial_param"] == 4 * (7 * 33 + 17)


@pytest.mark.parametrize("mode", ["decoupled", "cautious", "selective"])
def test_at_rate_zero_nothing_moves(mode):
    optimizer, params = engine(start(ALL), weight_decay_mode=mode, weight_decay=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for grads in gradients(ALL, 2):
        take_step(optimizer, params, grads)
    assert all(torch.equal(params[name], weight) for name, weight in start(ALL).items())


@pytest.mark.parametrize("mode", ["decoupled", "cautious", "selective"])
def test_more_decay_ends_nearer_to_the_origin(mode):
    """First the steps lead inwards; then outwards, and in every fifth the gradient wants the weights back."""

    def final(weight_decay: float) -> float:
        weights = {"a": 3 * torch.ones(8, 16, dtype=torch.float64)}
        optimizer, params = engine(weights, weight_decay_mode=mode, weight_decay=weight_decay)
        for step in range(30):
            push = 1.0 if step < 10 else 0.5 if step % 5 == 4 else -1.0
            take_step(optimizer, params, {"a": push * torch.ones(8, 16, dtype=torch.float64)})
        return params["a"].norm().item()

    assert final(1.0) < final(0.3) < final(0.0)


@pytest.mark.parametrize("role", ["magnitude", "bias", "norm"])
@pytest.mark.parametrize("mode", ["decoupled", "cautious", "selective"])
def test_scales_and_shifts_do_not_decay(mode, role):
    from hf_automagic.optim.automagic import Automagic

    ends = []
    for weight_decay in (0.0, 1.0):
        param = torch.nn.Parameter(torch.linspace(1, 2, 9))
        optimizer = Automagic([{"params": [param], "role": role}], weight_decay=weight_decay, weight_decay_mode=mode)
        for seed in range(4):
            take_step(optimizer, {"p": param}, {"p": noise(9, seed=seed)})
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'selective'"):
        AutomagicConfig(weight_decay_mode="selectiv")
