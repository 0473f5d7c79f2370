"""The context: its maths against plain Python, its promises on synthetic runs, its life inside the optimizer."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from hf_automagic import Automagic, AutomagicConfig
from hf_automagic.optim.context import StepSignals, advance_context, fit_context
from hf_automagic.optim.events import EventCode
from tests.reference.context import ReferenceContext

KNOBS = {"context_window": 100, "edge_case_threshold": 0.95, "adaptation_rate": 0.1}


# runs of the bare controller


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def autoregressive(n: int) -> Tensor:
    values = noise(n)
    for i in range(1, n):
        values[i] += 0.9 * values[i - 1]
    return values


def heavy_tailed(n: int) -> Tensor:
    """Student's t with three degrees of freedom."""
    return noise(n) / torch.stack([noise(n, seed) for seed in (1, 2, 3)]).square().mean(0).sqrt()


def falling(n: int) -> Tensor:
    return 2 * torch.exp(-torch.arange(n) / 50) + 0.5 + 0.02 * noise(n)


def run(losses: Tensor, cosines: Tensor | None = None, **knobs: float) -> list[dict[str, Tensor]]:
    """Advances a bare context; NaN stands for a step without a loss."""
    options = KNOBS | knobs
    group = {"context_window": options.pop("context_window")}
    fit_context(group, torch.device("cpu"))
    state, states = group["context_state"], []
    cosines = torch.zeros(len(losses)) if cosines is None else cosines
    for loss, cosine in zip(losses, cosines, strict=True):
        signals = StepSignals(cosine, loss, torch.tensor(1e-4), torch.tensor(True))
        state = advance_context(state, signals, **options)
        states.append(state)
    return states


def edge_steps(states: list[dict[str, Tensor]]) -> list[int]:
    return [i for i, state in enumerate(states) if state["is_edge_case"]]


def bits(states: list[dict[str, Tensor]]) -> list[tuple[float, ...]]:
    names = ("multiplier", "instability", "trend", "loss_spike", "consistency")
    return [tuple(state[name].item() for name in names) for state in states]


# the maths


SPIKE = 2 - 0.004 * torch.arange(160) + 0.02 * noise(160)
SPIKE[120] += 30 * 0.02
SOMETIMES = torch.where(uniform(120, 4) < 0.3, torch.nan, falling(120))
RUNS = {
    "noise": (3 + noise(130), torch.zeros(130)),
    "noise_around_zero": (noise(130), 0.1 * noise(130, 1)),
    "falling_with_a_spike": (SPIKE, 0.3 * uniform(160, 1)),
    "rising": (torch.exp(0.03 * torch.arange(130.0)), torch.zeros(130)),
    "reversing": (falling(130), -0.8 * uniform(130, 1)),
    "losses_sometimes": (SOMETIMES, 0.1 * noise(120, 1)),
    "constant": (torch.full((60,), 2.5), torch.zeros(60)),
}


@pytest.mark.parametrize("window", [21, 50, 100])
@pytest.mark.parametrize("name", RUNS)
def test_context_matches_plain_python(name, window):
    losses, cosines = RUNS[name]
    reference = ReferenceContext(window, KNOBS["edge_case_threshold"], KNOBS["adaptation_rate"])
    for state, loss, cosine in zip(run(losses, cosines, context_window=window), losses, cosines, strict=True):
        reference.advance(cosine.item(), None if loss.isnan() else loss.item())
        assert state["consistency"].item() == pytest.approx(reference.consistency, abs=1e-5)
        assert state["trend"].item() == pytest.approx(reference.trend, abs=1e-5)
        assert state["instability"].item() == pytest.approx(reference.instability, abs=1e-5)
        assert state["multiplier"].item() == pytest.approx(reference.multiplier, abs=1e-5)
        assert bool(state["is_edge_case"]) == reference.is_edge_case


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("power", [-40, 13])
def test_scaling_losses_by_a_power_of_two_changes_no_bit(name, power):
    losses, cosines = RUNS[name]
    assert bits(run(losses * 2.0**power, cosines)) == bits(run(losses, cosines))


@pytest.mark.parametrize("scale", [0.3, 1234.5])
def test_the_scale_of_losses_does_not_matter(scale):
    one, other = run(SPIKE), run(SPIKE * scale)
    assert edge_steps(one) == edge_steps(other) == [120]
    assert one[-1]["multiplier"].item() == pytest.approx(other[-1]["multiplier"].item(), abs=1e-3)


def test_the_sign_of_losses_does_not_matter():
    above, below = run(SPIKE), run(SPIKE - 3)
    assert (SPIKE > 0).all()
    assert (SPIKE - 3 < 0).all()
    assert edge_steps(below) == edge_steps(above) == [120]
    assert below[-1]["multiplier"].item() == pytest.approx(above[-1]["multiplier"].item(), abs=1e-3)


def test_twenty_older_losses_are_needed():
    losses = 3 + 0.1 * noise(21)
    losses[20] += 10
    assert edge_steps(run(losses)) == [20]
    assert edge_steps(run(losses[1:])) == []


def test_extreme_losses_never_poison_the_multiplier():
    losses = 3 + 0.1 * noise(90)
    for i, extreme in enumerate([3e38, -3e38, math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, 1e-45]):
        losses[30 + 6 * i] = extreme
    for state in run(losses):
        assert state["multiplier"].isfinite()
        assert 0.5 <= state["multiplier"] <= 2


# promises


NOISES = {
    "gaussian": noise,
    "uniform": uniform,
    "autoregressive": autoregressive,
    "heavy_tailed": heavy_tailed,
}


@pytest.mark.parametrize("name", NOISES)
def test_white_noise_is_rarely_an_edge_case(name):
    assert len(edge_steps(run(3 + 0.3 * NOISES[name](1500)))) < 15


@pytest.mark.parametrize("losses", [torch.exp(0.02 * torch.arange(300.0)), 1 + 0.01 * torch.arange(300.0)])
def test_a_diverging_loss_ends_at_half_the_rate(losses):
    noisy = losses * (1 + 0.01 * noise(300))
    assert run(noisy)[-1]["multiplier"].item() == pytest.approx(0.5, abs=0.01)


def test_a_falling_loss_and_agreeing_steps_raise_the_multiplier():
    calm, agreeing = run(falling(120)), run(falling(120), torch.full((120,), 0.5))
    assert 1.1 < calm[-1]["multiplier"] < agreeing[-1]["multiplier"] <= 2


def test_a_plateau_is_no_edge_case_and_ends_at_the_plain_rate():
    losses = torch.cat([falling(150), 0.6 + 0.02 * noise(350, 5)])
    states = run(losses)
    assert edge_steps(states) == []
    assert states[149]["multiplier"] > 1.15
    assert states[-1]["multiplier"].item() == pytest.approx(1, abs=0.1)


def test_smaller_edge_case_threshold_is_more_sensitive():
    losses = 3 + 0.3 * heavy_tailed(600)
    counts = [len(edge_steps(run(losses, edge_case_threshold=threshold))) for threshold in (0.5, 0.9, 0.999)]
    assert counts[0] > counts[1] > counts[2]


def test_larger_adaptation_rate_reacts_faster():
    slow, medium, fast = (run(SPIKE, adaptation_rate=rate)[120]["multiplier"] for rate in (0.01, 0.1, 0.5))
    before = [run(SPIKE[:120], adaptation_rate=rate)[-1]["multiplier"] for rate in (0.01, 0.1, 0.5)]
    drops = [b - after for b, after in zip(before, (slow, medium, fast), strict=True)]
    assert drops[0] < drops[1] < drops[2]
    assert bits(run(SPIKE, adaptation_rate=0.0))[-1][0] == 1.0


def test_larger_context_window_is_steadier_in_its_consistency_and_notices_a_turn_later():
    quiet, cosines = 3 + 0.1 * noise(400), 0.5 * noise(400, 1)
    consistency = [[s["consistency"] for s in run(quiet, cosines, context_window=w)][150:] for w in (25, 150)]
    assert torch.stack(consistency[1]).std() < 0.7 * torch.stack(consistency[0]).std()
    turning = torch.cat([3 + 0.1 * noise(200), 3 + 0.02 * torch.arange(150.0) + 0.1 * noise(150, 1)])
    slowed = [[s["multiplier"] < 0.8 for s in run(turning, context_window=w)].index(True, 200) for w in (50, 150)]
    assert slowed[0] < slowed[1]


# inside the optimizer


def build(seed: int = 0, **options) -> Automagic:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(6, 10), (6, 10), (7,)]]
    names = ["first.weight", "second.weight", "second.bias"]
    config = {"lr": 1e-4, "context": True, "context_window": 30, "min_8bit_size": 0}
    return Automagic([{"params": params, "names": names}], **(config | options))


def step(optimizer: Automagic, t: int, loss: float | None = None, poisoned: bool = False) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator) + 0.3
    if poisoned:
        optimizer.param_groups[0]["params"][1].grad[0, 0] = torch.nan
    optimizer.step(loss=None if loss is None else torch.tensor(loss))


def train(optimizer: Automagic, losses: Tensor, start: int = 0) -> None:
    for t, loss in enumerate(losses.tolist(), start=start):
        step(optimizer, t, loss)


def flatten(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for child in children for tensor in flatten(child)]


def same_bits(one: Automagic, other: Automagic) -> bool:
    ours, theirs = (
        flatten(o.state_dict()) + [p.detach() for g in o.param_groups for p in g["params"]] for o in (one, other)
    )
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) and a.dtype == b.dtype
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_planted_spike_is_reported_at_its_step_once():
    optimizer = build(lr_speed=0.0)
    losses = falling(70)
    losses[45] += 30 * 0.02
    train(optimizer, losses)
    assert [(event.step, event.code) for event in optimizer.events()] == [(46, EventCode.EDGE_CASE)]
    assert optimizer.events()[0].value >= optimizer.events()[0].threshold == 0.95


def test_a_plateau_is_reported_only_where_it_breaks():
    optimizer = build()
    losses = torch.cat([falling(40), 1.4 + 0.02 * noise(60, 5)])
    losses[80:86] += 1.0  # a run of edge steps
    train(optimizer, losses)
    assert [(event.step, event.code) for event in optimizer.events()] == [(81, EventCode.EDGE_CASE)]


def test_detect_edge_case_speaks_of_the_last_step():
    optimizer = build()
    losses = 3 + 0.1 * noise(40)
    train(optimizer, losses)
    assert not optimizer.c_optim.detect_edge_case()
    assert optimizer.c_optim.compute_loss_stability() > 0.3
    step(optimizer, 40, 9.0)
    assert optimizer.c_optim.detect_edge_case() is True
    assert optimizer.c_optim.compute_loss_stability() < 0.05
    step(optimizer, 41, 3.0)
    assert optimizer.c_optim.detect_edge_case() is False


@pytest.mark.parametrize("self_tuning", [True, False])
def test_effective_lr_is_base_lr_times_multiplier_to_the_bit(self_tuning):
    optimizer = build(self_tuning=self_tuning, max_lr=2e-4, warmup_steps=5)
    for t, loss in enumerate(falling(60).tolist()):
        step(optimizer, t, loss + (t == 50))
        multiplier = torch.tensor(optimizer.c_optim.compute_contextual_lr_multiplier())
        for group in optimizer.param_groups:
            assert torch.equal(group["effective_lr"], group["base_lr"] * multiplier)
    assert multiplier != 1
    assert optimizer.get_learning_rates() == [float(optimizer.param_groups[0]["effective_lr"])]


def test_the_update_uses_the_multiplied_rate():
    ours, plain = build(self_tuning=False), build(self_tuning=False, context=False)
    for t, loss in enumerate(falling(45).tolist()):
        step(ours, t, loss)
        plain.param_groups[0]["lr"] = ours.param_groups[0]["effective_lr"].item()
        step(plain, t)
    assert ours.c_optim.compute_contextual_lr_multiplier() > 1.05
    for a, b in zip(ours.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_the_multiplied_rate_stays_below_its_rail():
    optimizer = build(lr=1e-3)
    train(optimizer, falling(60))
    assert optimizer.c_optim.compute_contextual_lr_multiplier() > 1.1
    assert optimizer.get_learning_rates()[0] <= 1e-3 * (1 + 1e-6)


def test_the_multiplier_of_a_step_comes_from_the_steps_before():
    optimizer = build()
    train(optimizer, falling(40))
    before = optimizer.param_groups[0]["context_state"]["multiplier"].item()
    step(optimizer, 40, 50.0)
    assert optimizer.c_optim.compute_contextual_lr_multiplier() == before
    step(optimizer, 41, 1.0)
    assert optimizer.c_optim.compute_contextual_lr_multiplier() < before


def test_consistency_is_measured_without_self_tuning():
    optimizer = build(self_tuning=False)
    for t in range(30):
        step(optimizer, t)
    assert optimizer.c_optim.compute_gradient_consistency() > 0.05
    assert optimizer.c_optim.compute_contextual_lr_multiplier() > 1
    assert optimizer.param_groups[0]["log_rate"] == 0


def test_gradients_that_reverse_are_an_edge_case_without_any_loss():
    optimizer = build(self_tuning=False)
    for t in range(60):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, (-1.0) ** t)
        optimizer.step()
    assert optimizer.c_optim.compute_gradient_consistency() < -0.5
    assert [event.code for event in optimizer.events()] == [EventCode.EDGE_CASE]
    assert optimizer.c_optim.compute_contextual_lr_multiplier() == pytest.approx(0.5, abs=0.05)


def test_a_skipped_step_changes_nothing_and_alarms_the_next():
    optimizer = build()
    train(optimizer, falling(30))
    multiplier = optimizer.param_groups[0]["context_state"]["multiplier"].item()
    history, before = optimizer.c_optim.history(), copy.deepcopy(optimizer.param_groups[0]["context_state"])
    step(optimizer, 30, 99.0, poisoned=True)
    after = optimizer.param_groups[0]["context_state"]
    changed = [name for name in before if not torch.equal(before[name].nan_to_num(-7), after[name].nan_to_num(-7))]
    assert changed == ["non_finite"]
    assert optimizer.c_optim.history() == history
    step(optimizer, 31, float(falling(32)[31]))
    assert optimizer.c_optim.detect_edge_case()
    assert optimizer.param_groups[0]["context_state"]["multiplier"] < multiplier
    step(optimizer, 32, float(falling(33)[32]))
    assert not optimizer.c_optim.detect_edge_case()


@pytest.mark.parametrize(("threshold", "steps"), [(1.0, 1), (0.85, 2), (0.5, 7)])
def test_the_alarm_of_a_skipped_step_fades_by_a_tenth_a_step(threshold, steps):
    optimizer = build(edge_case_threshold=threshold, self_tuning=False)
    step(optimizer, 0, poisoned=True)
    edges = []
    for t in range(1, 12):
        step(optimizer, t)
        edges.append(optimizer.c_optim.detect_edge_case())
    assert edges == [True] * steps + [False] * (11 - steps)


def test_history_is_bounded_and_tells_what_was_applied():
    optimizer = build()
    losses = falling(50)
    rates = []
    for t, loss in enumerate(losses.tolist()):
        step(optimizer, t, loss)
        rates.append(optimizer.get_avg_learning_rate())
        assert optimizer.c_optim.history().multipliers[-1] == optimizer.c_optim.compute_contextual_lr_multiplier()
    history = optimizer.c_optim.history()
    assert history.losses == tuple(losses[-30:].tolist())
    assert history.learning_rates == pytest.approx(rates[-30:], rel=1e-6)
    assert history.consistency[-1] == optimizer.c_optim.compute_gradient_consistency()
    assert {len(column) for column in vars(history).values()} == {30}


def test_history_keeps_a_place_for_steps_without_a_loss():
    optimizer = build()
    for t, loss in enumerate([3.0, None, 2.0]):
        step(optimizer, t, loss)
    first, second, third = optimizer.c_optim.history().losses
    assert (first, third) == (3.0, 2.0)
    assert math.isnan(second)


def test_getters_are_pure():
    asked, silent = build(), build()
    for t, loss in enumerate(falling(40).tolist()):
        step(asked, t, loss + 5 * (t == 35))
        step(silent, t, loss + 5 * (t == 35))
        answers = [
            (
                asked.c_optim.detect_edge_case(),
                asked.c_optim.compute_contextual_lr_multiplier(),
                asked.c_optim.compute_gradient_consistency(),
                asked.c_optim.compute_loss_stability(),
                asked.events(),
            )
            for _ in range(2)
        ]
        assert answers[0] == answers[1]
    assert same_bits(asked, silent)


@pytest.mark.parametrize("context", [True, False])
def test_getters_answer_before_the_first_step_and_without_context(context):
    optimizer = build(context=context)
    if not context:
        step(optimizer, 0, 3.0)
    assert optimizer.c_optim.detect_edge_case() is False
    assert optimizer.c_optim.compute_contextual_lr_multiplier() == 1.0
    assert optimizer.c_optim.compute_gradient_consistency() == 0.0
    assert optimizer.c_optim.compute_loss_stability() == 1.0
    assert optimizer.c_optim.history().losses == ()
    assert optimizer.events() == []


@pytest.mark.parametrize("after", [3, 24, 45], ids=["ring_nearly_empty", "ring_filling", "ring_full"])
def test_a_saved_context_continues_bit_for_bit(after):
    losses = falling(60)
    losses[after + 10] += 3
    whole = build()
    train(whole, losses)

    first = build()
    train(first, losses[:after])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = build(seed=9)
    for a, b in zip(resumed.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        a.data.copy_(b.data)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.c_optim.history() == first.c_optim.history()
    train(resumed, losses[after:], start=after)
    assert same_bits(resumed, whole)
    assert resumed.events() == whole.events()


def test_a_copied_optimizer_continues_on_its_own():
    original = build()
    train(original, falling(25))
    twin = copy.deepcopy(original)
    train(twin, falling(35)[25:], start=25)
    assert len(original.c_optim.history().losses) == 25
    train(original, falling(35)[25:], start=25)
    assert same_bits(original, twin)


def test_two_optimizers_share_nothing():
    one, other = build(seed=1), build(seed=2, context_window=50)
    for t, loss in enumerate(falling(45).tolist()):
        step(one, t, loss)
        step(other, t + 500, 100 * loss, poisoned=t == 20)
    alone, apart = build(seed=1), build(seed=2, context_window=50)
    train(alone, falling(45))
    for t, loss in enumerate(falling(45).tolist()):
        step(apart, t + 500, 100 * loss, poisoned=t == 20)
    assert same_bits(one, alone)
    assert same_bits(other, apart)
    assert one.events() == []


def test_every_key_exists_after_the_first_step():
    optimizer = build()
    step(optimizer, 0)
    first = {name for name in optimizer.param_groups[0]["context_state"]}
    shapes = {name: t.shape for name, t in optimizer.param_groups[0]["context_state"].items()}
    train(optimizer, falling(40), start=1)
    assert set(optimizer.param_groups[0]["context_state"]) == first
    assert {name: t.shape for name, t in optimizer.param_groups[0]["context_state"].items()} == shapes


def test_the_planned_bytes_are_the_held_bytes():
    optimizer = build()
    planned = optimizer.memory_stats().bytes_by_state["shared"]
    step(optimizer, 0, 1.0)
    assert optimizer.memory_stats().bytes_by_state["shared"] == planned


def test_a_changed_window_keeps_the_newest_losses():
    optimizer = build()
    losses = falling(30)
    train(optimizer, losses)
    for window, kept in ((50, 30), (21, 21)):
        optimizer.param_groups[0]["context_window"] = window
        step(optimizer, 99, 1.0)
        ring = optimizer.param_groups[0]["context_state"]["losses"]
        assert ring.numel() == window
        assert (~ring.isnan()).sum() == min(window, kept + 1)
        assert ring[-1] == 1.0


def test_a_group_may_stay_out_of_the_context():
    params = [torch.nn.Parameter(torch.randn(6, 10)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "context": False}]
    optimizer = Automagic(groups, lr=1e-4, context=True, self_tuning=False)
    train(optimizer, falling(40))
    multiplied, plain = optimizer.get_learning_rates()
    assert plain == pytest.approx(1e-4)
    assert multiplied > 1.05e-4


def forbid(name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"step() read the device back through Tensor.{name}")

    return refuse


def test_step_never_reads_the_device_back(monkeypatch):
    optimizer = build(max_grad_norm=1.0, lr_granularity="element")
    step(optimizer, 0, 3.0)
    losses = torch.full((30,), 3.0)
    losses[25] = 9.0
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, forbid(name))
    for loss in losses:
        optimizer.step(loss=loss)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step(loss=losses[0])
    monkeypatch.undo()
    assert [event.code for event in optimizer.events()] == [EventCode.EDGE_CASE, EventCode.NONFINITE_STEP]


@pytest.mark.gpu
def test_step_never_waits_for_the_gpu():
    params = [torch.nn.Parameter(torch.randn(6, 10, device="cuda")) for _ in range(2)]
    optimizer = Automagic(params, lr=1e-4, context=True, context_window=30)
    losses = torch.full((40,), 3.0, device="cuda")
    losses[30] = 9.0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step(loss=losses[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [(event.step, event.code) for event in optimizer.events()] == [(32, EventCode.EDGE_CASE)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context_window": 20}, "context_window must be between 21"),
        ({"edge_case_threshold": 1.5}, "edge_case_threshold must be between 0 and 1"),
        ({"adaptation_rate": -0.1}, "adaptation_rate must be between 0 and 1"),
        ({"context": True, "came_mode": "paper"}, "context needs came_mode 'stable'"),
        ({"context": True, "momentum_order": "before"}, "context needs .* momentum_order 'after'"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutomagicConfig(**options)
