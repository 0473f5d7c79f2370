"""Claims about snapshots: they tell the rates that were applied, in plain numbers, whatever wraps the optimizer."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_automagic import Automagic, AutomagicConfig, create_automagic_optimizer
from hf_automagic.optim.bucket import CHUNK_BYTES
from hf_automagic.reporting.rates import read_at_once, summarize_rates, unwrap_optimizer
from hf_automagic.reporting.snapshot import OptimizerSnapshot
from hf_automagic.transforms.self_tuning import element_factor


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


def two_roles(**options) -> Automagic:
    groups = [{"params": [param(8, 16), param(4, 16)], "role": "lora_B"}, {"params": [param(16, 16)], "role": "full"}]
    return Automagic(groups, lr=1e-3, min_8bit_size=0, **options)


def take_steps(optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


class Wrapper:
    """Wraps as accelerate and DeepSpeed do."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_unwrapping_goes_through_several_wrappers():
    optimizer = two_roles()
    assert unwrap_optimizer(Wrapper(Wrapper(optimizer))) is optimizer
    assert OptimizerSnapshot.take(Wrapper(optimizer)) == OptimizerSnapshot.take(optimizer)


def test_unwrapping_ends_where_wrappers_hold_each_other():
    one, two = SimpleNamespace(param_groups=[]), SimpleNamespace(param_groups=[])
    one.optimizer, two.optimizer = two, one
    assert unwrap_optimizer(one) is two


def test_the_rates_are_those_that_were_applied():
    optimizer = two_roles()
    take_steps(optimizer)
    snapshot = OptimizerSnapshot.take(optimizer)
    assert [group.lr.mean for group in snapshot.groups] == optimizer.get_learning_rates()
    assert snapshot.lr.mean == pytest.approx(optimizer.get_avg_learning_rate())
    assert snapshot.lr.minimum < snapshot.lr.mean < snapshot.lr.maximum
    assert snapshot.rates_by_role() == dict(zip(("B", "full"), optimizer.get_learning_rates(), strict=True))


def test_before_the_first_step_the_rates_are_those_to_come():
    snapshot = OptimizerSnapshot.take(two_roles())
    assert snapshot.applied_steps == snapshot.skipped_steps == 0
    assert snapshot.rates_by_role() == {"B": pytest.approx(2.4e-3), "full": pytest.approx(3e-4)}


def test_rates_of_single_elements_are_summarised():
    optimizer = two_roles(lr_granularity="element")
    take_steps(optimizer, 30)
    group = optimizer.param_groups[0]
    factors = torch.cat([element_factor(optimizer.state[p]["lr_mask"]).flatten() for p in group["params"]])
    rates = OptimizerSnapshot.take(optimizer).groups[0].lr
    applied = float(group["effective_lr"])
    assert factors.min() < 1 < factors.max()
    assert rates.minimum == pytest.approx(applied * float(factors.min()))
    assert rates.mean == pytest.approx(applied * float(factors.mean()))
    assert rates.maximum == pytest.approx(applied * float(factors.max()))


def test_the_saturated_share_counts_the_codes_at_the_end_of_their_range():
    optimizer = two_roles()
    take_steps(optimizer)
    codes = torch.cat(
        [optimizer.state[p]["exp_avg_codes"].flatten() for g in optimizer.param_groups for p in g["params"]]
    )
    share = sum(abs(code) == 127 for code in codes.tolist()) / codes.numel()
    assert OptimizerSnapshot.take(optimizer).saturated_fraction == pytest.approx(share)
    assert share > 0


def test_the_update_rms_is_that_of_the_change_of_the_weights(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 16 * 5)  # the largest matrix is swept in pieces
    optimizer = two_roles()
    take_steps(optimizer)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    take_steps(optimizer, 1)
    snapshot = OptimizerSnapshot.take(optimizer)
    after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert snapshot.update_rms == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)
    optimizer.param_groups[1]["params"][0].grad[0, 0] = torch.nan
    optimizer.step()
    assert OptimizerSnapshot.take(optimizer).update_rms == snapshot.update_rms
    assert snapshot.as_logs()["optim/update_rms"] == snapshot.update_rms > 0


@pytest.mark.parametrize(("log_rate", "position"), [(-math.inf, 0.0), (math.log(10) / 2, 0.875), (math.inf, 1.0)])
def test_the_rail_position_is_logarithmic(log_rate, position):
    optimizer = Automagic([param(8, 16)], lr=1e-4, min_lr=1e-7, max_lr=1e-3, lr_search=True)
    optimizer.param_groups[0]["log_rate"] = torch.tensor(log_rate)
    assert OptimizerSnapshot.take(optimizer).rail_position == pytest.approx(position)


@pytest.mark.parametrize("options", [{}, {"self_tuning": False, "lr_search": True}], ids=str)
def test_without_a_search_there_is_no_rail_position(options):
    assert OptimizerSnapshot.take(two_roles(**options)).rail_position is None


def test_a_skipped_step_is_counted_and_its_culprit_named():
    first, second = param(8, 16), param(4, 16)
    optimizer = Automagic([("model.first", first), ("model.second", second)], lr=1e-4)
    take_steps(optimizer)
    second.grad[0, 0] = math.inf
    optimizer.step()
    snapshot = OptimizerSnapshot.take(optimizer)
    assert (snapshot.applied_steps, snapshot.skipped_steps, snapshot.skipped_in_a_row) == (3, 1, 1)
    assert snapshot.offender == "model.second"
    assert [event.code.name for event in snapshot.events] == ["NONFINITE_STEP"]
    assert "model.second" in snapshot.events[0].action


def test_the_context_is_told_where_it_is_on():
    optimizer = two_roles(context=True)
    take_steps(optimizer)
    snapshot = OptimizerSnapshot.take(optimizer)
    assert snapshot.multiplier == pytest.approx(optimizer.c_optim.compute_contextual_lr_multiplier())
    assert snapshot.consistency == pytest.approx(optimizer.c_optim.compute_gradient_consistency())
    assert OptimizerSnapshot.take(two_roles()).multiplier is None


def test_pairs_tell_their_effective_rank():
    a, b = param(4, 16), param(8, 4)
    groups = [
        {"params": [a], "role": "lora_A", "pairs": [0], "scalings": [1.0], "ranks": [4]},
        {"params": [b], "role": "lora_B", "pairs": [0], "scalings": [1.0], "ranks": [4]},
    ]
    optimizer = Automagic(groups, lr=1e-4)
    take_steps(optimizer)
    spectrum = torch.linalg.svdvals((b @ a).detach())[:4]
    shares = spectrum / spectrum.sum()
    rank = OptimizerSnapshot.take(optimizer).effective_rank
    assert rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-3)


def test_log_keys_are_few_and_plain_floats():
    roles = ("lora_A", "lora_B", "embedding_A", "adapter", "magnitude", "new", "bias", "norm", "embedding", "full")
    optimizer = Automagic([{"params": [param(8, 16)], "role": role} for role in roles], lr=1e-4, context=True)
    take_steps(optimizer)
    logs = OptimizerSnapshot.take(optimizer).as_logs()
    assert len(logs) <= 20
    assert all(key.startswith("optim/") and type(value) is float for key, value in logs.items())
    assert {f"optim/lr_{kind}" for kind in ("min", "mean", "max", "A", "B", "new", "full", "adapter")} <= logs.keys()
    assert logs["optim/state_mb"] == optimizer.memory_stats().total_bytes / 2**20


@pytest.mark.parametrize(
    ("role", "is_full_weight", "key"),
    [
        ("bias", True, "full"),
        ("bias", False, "adapter"),
        ("norm", False, "adapter"),
        ("embedding", True, "full"),
        ("embedding_B", False, "B"),
        ("lora_A", False, "A"),
        ("new", False, "new"),
        ("full", False, "adapter"),
    ],
)
def test_a_group_is_called_by_the_rails_it_steps_at(role, is_full_weight, key):
    optimizer = Automagic([{"params": [param(4)], "role": role, "is_full_weight": is_full_weight}], lr=1e-3)
    (group,) = OptimizerSnapshot.take(optimizer).groups
    assert group.key == key
    assert (group.max_lr < AutomagicConfig.max_lr) is (key in ("full", "A"))


def test_a_new_heads_bias_is_not_called_full():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimizer = create_automagic_optimizer(model, lr=1e-3, new_modules=["head"])
    take_steps(optimizer, 1)
    rates = OptimizerSnapshot.take(optimizer).rates_by_role()
    expected = {"adapter": 2e-3, "new": 6.8e-3, "full": 6e-4}
    assert rates == {key: pytest.approx(rate) for key, rate in expected.items()}


def test_a_snapshot_changes_nothing():
    left, right = two_roles(context=True), two_roles(context=True)
    for optimizer in (left, right):
        take_steps(optimizer, 2)
    OptimizerSnapshot.take(left)
    for optimizer in (left, right):
        take_steps(optimizer, 2)
    for p, q in zip(left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_a_foreign_optimizer_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"got SGD; summarize_rates\(\)"):
        OptimizerSnapshot.take(torch.optim.SGD([param(2, 2)], lr=0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_a_snapshot_waits_for_the_device_once(granularity):
    params = [nn.Parameter(p.detach().cuda()) for p in (param(64, 128), param(32, 128))]
    optimizer = Automagic(params, lr=1e-4, lr_granularity=granularity, context=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    OptimizerSnapshot.take(optimizer)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            OptimizerSnapshot.take(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


def test_numbers_from_anywhere_arrive_in_their_shapes():
    rows = torch.arange(6.0).view(2, 3)
    read = read_at_once({"rows": rows, "count": torch.tensor(2**40), "plain": 3, "empty": torch.empty(0)})
    assert torch.equal(read["rows"], rows.double())
    assert (int(read["count"]), float(read["plain"]), read["empty"].numel()) == (2**40, 3.0, 0)


# rates of other optimizers


def test_plain_rates_are_weighted_by_elements():
    groups = [
        {"params": [param(3, 10)], "lr": 0.1},
        {"params": [param(1, 10)], "lr": torch.tensor(0.3)},
        {"params": []},
    ]
    rates = summarize_rates(torch.optim.SGD(groups, lr=0.7))
    assert (rates.minimum, rates.maximum) == (pytest.approx(0.1), pytest.approx(0.3))
    assert rates.mean == pytest.approx(0.15)


def test_prodigys_rate_is_d_times_lr():
    prodigyopt = pytest.importorskip("prodigyopt")
    weight = nn.Parameter(torch.ones(4))
    optimizer = prodigyopt.Prodigy([weight], lr=0.5)
    for _ in range(20):
        weight.grad = weight.detach().clone()
        optimizer.step()
    d = optimizer.param_groups[0]["d"]
    assert d > 10 * optimizer.param_groups[0]["d0"]
    assert summarize_rates(optimizer).mean == pytest.approx(0.5 * d)


def test_adafactors_relative_rate_follows_the_weights():
    transformers = pytest.importorskip("transformers")
    large, small = nn.Parameter(torch.full((4, 4), 2.0)), nn.Parameter(torch.full((4, 4), 1e-6))
    optimizer = transformers.Adafactor([large, small], lr=None, relative_step=True, scale_parameter=True)
    take_steps(optimizer, 1)
    rates = summarize_rates(optimizer)
    assert rates.maximum == pytest.approx(1e-2 * 2.0)
    assert rates.minimum == pytest.approx(1e-2 * 1e-3)


def test_torchs_adafactor_follows_the_weights():
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    assert summarize_rates(torch.optim.Adafactor([weight], lr=1e-2)).mean == pytest.approx(2e-2)


def test_overrides_of_bitsandbytes_are_seen():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    one, two = param(4, 4), param(4, 4)
    optimizer = bitsandbytes.optim.Adam8bit([one, two], lr=1e-3)
    bitsandbytes.optim.GlobalOptimManager.get_instance().override_config(two, "lr", 5e-4)
    rates = summarize_rates(optimizer)
    assert (rates.minimum, rates.maximum) == (5e-4, 1e-3)


@pytest.mark.parametrize("key", ["effective_lr", "scheduled_lr"])
def test_a_rate_that_a_group_reports_is_believed(key):
    optimizer = torch.optim.SGD([param(2, 2)], lr=1.0)
    optimizer.param_groups[0][key] = 0.25
    assert summarize_rates(optimizer).mean == 0.25
