"""Claims about fresh weights: what nobody has trained yet is known by its values, steps faster, and stays known."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init

from hf_automagic import Automagic, AutomagicConfig, create_automagic_optimizer, param_groups
from hf_automagic.optim.freshness import look_trained
from hf_automagic.optim.roles import FRESH_FALL, PRETRAINED_SCALE, SCRATCH_SCALE
from tests.ranks import Ranks

SCRATCH, TUNED = (SCRATCH_SCALE, FRESH_FALL), (PRETRAINED_SCALE, 1.0)


class Net(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, bias=bias)
        self.norm, self.body, self.head = nn.LayerNorm(400), nn.Linear(400, 64, bias=bias), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.conv(x).flatten(1))).relu())


def net(seed: int = 0, **options: bool) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(32, 8, 7, 7, generator=draw)
        yield x, (x[:, :5].mean((2, 3)) @ torch.arange(10.0).view(5, 2)).argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(model: Net) -> Net:
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)
    return model


def are_fresh(weights: Iterable[Tensor], norms: Iterable[Tensor]) -> bool:
    return look_trained(weights, norms) is False


def parts(model: nn.Module) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    return weights, norms


def law(optimizer: Automagic) -> set[tuple[float, float]]:
    """Returns the scales of the rails, but for the width, and where they fall, of groups of full weights."""
    config = optimizer.config
    return {
        (round(g["max_lr"] / config.max_lr / by_width(g), 6), g["rail_steps"] / config.rail_steps)
        for g in optimizer.param_groups
        if g["is_full_weight"]
    }


def max_lrs(optimizer: Automagic) -> list[float]:
    return sorted({g["max_lr"] for g in optimizer.param_groups})


def by_width(group: dict) -> float:
    factor = (384 / group["width"]) ** 0.75
    return min(factor, 1.0 if group["is_fresh"] else 2.0)


LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "kaiming": lambda w: init.kaiming_normal_(w),
    "xavier": lambda w: init.xavier_uniform_(w),
    "gaussian": lambda w: init.normal_(w, std=0.02),
    "truncated": lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "orthogonal": lambda w: init.orthogonal_(w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_weights_of_every_usual_law_are_fresh(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    weights = [LAWS[name](torch.empty(shape)).to(dtype) for shape in ((300, 90), (64, 1500), (9, 128), (64, 32, 3, 3))]
    assert are_fresh(weights, [torch.ones(5), torch.zeros(5), torch.full((3,), 1e-6)])


@pytest.mark.parametrize("seed", range(20))
def test_a_net_is_fresh_until_it_is_trained(seed: int):
    model = net(seed, bias=seed % 2 == 0)
    assert are_fresh(*parts(model))
    if seed < 2:
        weights, norms = parts(trained(model))
        assert not are_fresh(weights, norms)
        assert not are_fresh(weights, [])
        assert not are_fresh(parts(net(seed))[0], norms)


def spoil(w: Tensor, where: str) -> Tensor:
    """Does to a fresh matrix what training does."""
    w = w.clone()
    if where == "a few rows":
        w[:3] *= 3
    elif where == "a few columns":
        w[:, :3] *= 3
    elif where == "every row a little":
        w *= torch.linspace(0.8, 1.2, len(w))[:, None]
    else:
        w[0, 0] = 100 * w.std()
    return w


@pytest.mark.parametrize("where", ["a few rows", "a few columns", "every row a little", "one element"])
def test_structure_or_outliers_are_training(where: str):
    torch.manual_seed(0)
    w = torch.randn(128, 128) * 0.02
    assert are_fresh([w], [])
    assert not are_fresh([spoil(w, where)], [])


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_few_patterned_layers_do_not_make_a_model_trained(share: float):
    torch.manual_seed(0)
    patterned = torch.arange(1.0, 65).log().repeat(int(share * 1000), 1)  # as state space models start with
    fresh = [torch.randn(100, 64) for _ in range(round((1 - share) * 10))]
    assert are_fresh([*fresh, patterned], []) is (share < 0.1)


class Wrapped(Tensor):
    """A tensor of another library."""

    def detach(self) -> Tensor:  # type: ignore[override]
        raise NotImplementedError


SILENT = {
    "nothing": [],
    "vectors": [torch.randn(4000)],
    "too small": [torch.randn(4, 3), torch.randn(8, 8)],
    "too flat": [torch.randn(2, 4000)],
    "constant": [torch.zeros(64, 64), torch.full((64, 64), 0.3)],
    "not numbers": [torch.full((64, 64), torch.nan)],
    "integers": [torch.zeros(64, 64, dtype=torch.uint8)],
    "empty": [torch.randn(0, 64)],
    "meta": [torch.randn(64, 64), torch.empty(64, 64, device="meta")],
    "of another library": [torch.randn(64, 64).as_subclass(Wrapped)],
}


@pytest.mark.parametrize("kind", SILENT)
def test_what_does_not_tell_is_left_open(kind: str):
    assert look_trained(SILENT[kind], [torch.ones(4)]) is None


def test_emptied_storage_is_not_read():
    weight = torch.randn(64, 64)
    weight.untyped_storage().resize_(0)
    assert look_trained([weight]) is None


def test_a_fresh_model_steps_faster_and_falls_earlier():
    assert law(create_automagic_optimizer(net())) == {SCRATCH}
    assert law(create_automagic_optimizer(trained(net()))) == {TUNED}
    assert create_automagic_optimizer(net()).describe().count(", fresh ") == 3


def test_a_model_of_which_nothing_is_known_steps_as_a_pretrained_one():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    assert law(create_automagic_optimizer(model)) == {TUNED}


def test_what_the_user_sets_wins():
    groups = [{**group, "max_lr": 7e-4, "rail_steps": 50} for group in param_groups(net())]
    assert {(g["max_lr"], g["rail_steps"]) for g in Automagic(groups).param_groups} == {(7e-4, 50)}
    optimizer = create_automagic_optimizer(net(), rail_steps=0, max_lr=1e-2)
    assert {g["rail_steps"] for g in optimizer.param_groups} == {0}
    assert max_lrs(optimizer) == pytest.approx([SCRATCH_SCALE * 1e-2])


def test_only_what_trains_is_looked_at():
    model = trained(net())
    for param in model.parameters():
        param.requires_grad_(False)
    model.head = nn.Linear(64, 100)
    assert law(create_automagic_optimizer(model)) == {SCRATCH}


def test_the_decision_survives_a_resume_to_the_bit():
    ends = []
    for cut in (None, 6):
        model = net()
        optimizer = create_automagic_optimizer(model)
        steps = list(batches(12))
        for i, (x, y) in enumerate(steps):
            if i == cut:
                with torch.no_grad():
                    saved = {name: value.clone() for name, value in model.state_dict().items()}
                state, model = optimizer.state_dict(), trained(net())  # what is built anew looks trained
                optimizer = create_automagic_optimizer(model)
                assert law(optimizer) == {TUNED}
                model.load_state_dict(saved)
                optimizer.load_state_dict(state)
                assert law(optimizer) == {SCRATCH}
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(itertools.starmap(torch.equal, zip(*ends, strict=True)))


def test_a_file_from_before_keeps_its_rails():
    model = net()
    state = create_automagic_optimizer(trained(net())).state_dict()
    for group in state["param_groups"]:
        del group["is_fresh"]
    optimizer = create_automagic_optimizer(model)
    optimizer.load_state_dict(state)
    assert {g["rail_steps"] for g in optimizer.param_groups} == {AutomagicConfig.rail_steps}
    train(model, optimizer, 1)


def test_attach_in_the_middle_of_a_run_takes_nothing_back():
    model = net()
    optimizer = Automagic(model.parameters())
    optimizer.attach(model)
    assert law(optimizer) == {SCRATCH}
    trained(model)
    optimizer.attach(model)
    assert law(optimizer) == {SCRATCH}


BARE: dict[str, Callable[[nn.Module], Any]] = {
    "tensors": lambda m: m.parameters(),
    "names": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": p, "weight_decay": 0.1 * i} for i, p in enumerate(parts_by_decay(m))],
    "generators": lambda m: [{"params": (p for p in ps)} for ps in parts_by_decay(m)],
}


def parts_by_decay(model: nn.Module) -> list[list[nn.Parameter]]:
    """Sorts as trainers do that take no decay from vectors."""
    return [[p for p in model.parameters() if (p.ndim > 1) is is_matrix] for is_matrix in (False, True)]


@pytest.mark.parametrize("form", BARE)
def test_without_a_model_what_looks_trained_steps_as_pretrained_and_the_rest_between(form: str):
    known, fresh = Automagic(BARE[form](trained(net()))), Automagic(BARE[form](net()))
    narrow = (384 / 72) ** 0.75  # the convolution's inputs are those in the middle
    assert max_lrs(known) == pytest.approx([PRETRAINED_SCALE * min(narrow, 2) * AutomagicConfig.max_lr])
    assert max_lrs(fresh) == [AutomagicConfig.max_lr]
    assert not law(fresh)


def test_a_role_that_is_given_wins_over_what_the_values_say():
    model = trained(net())
    groups = [{"params": model.parameters(), "role": "adapter"}]
    assert [g["max_lr"] for g in Automagic(groups).param_groups] == [AutomagicConfig.max_lr]


def test_frozen_weights_in_a_bare_list_tell_nothing():
    frozen, adapter = trained(net()).requires_grad_(False), nn.Linear(64, 16)
    groups = Automagic([*frozen.parameters(), *adapter.parameters()]).param_groups
    assert [g["max_lr"] for g in groups] == [AutomagicConfig.max_lr]


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_trainers_string_knows_a_fresh_model(tmp_path, is_trained: bool):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    if is_trained:
        model.model.norm.weight.data[0] = 1.5
    args = transformers.TrainingArguments(str(tmp_path), optim="automagic_8bit", report_to=[], use_cpu=True)
    optimizer = transformers.Trainer(model, args).create_optimizer()
    assert {g["is_fresh"] for g in optimizer.param_groups} == {not is_trained}
    assert {g["rail_steps"] for g in optimizer.param_groups} == {100 if is_trained else 50}


def looks_at_shards(spoiled_row: int | None) -> bool:
    """Builds a sharded net, of which one rank's rows may look trained, and its groups."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    if spoiled_row is not None:
        with torch.no_grad():
            model.body.weight[spoiled_row] *= 10
            model.norm.weight[spoiled_row] = 2
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return all(group["is_fresh"] for group in param_groups(model))


def test_ranks_of_a_sharded_model_come_to_one_answer():
    ranks = Ranks(2)
    try:
        assert ranks.run(looks_at_shards, None) == [True, True]
        assert ranks.run(looks_at_shards, 1) == [False, False]
        assert ranks.run(looks_at_shards, 60) == [False, False]
    finally:
        ranks.stop()
