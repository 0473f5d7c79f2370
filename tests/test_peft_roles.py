"""Claims about roles: every trainable parameter gets exactly one, whatever tuner made it, and A finds its B."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from hf_automagic.optim.names import display_name
from hf_automagic.peft import find_parameters, group_by_name, param_groups
from tests.peft_cases import IGNORE_OLD_NAME, TUNERS, adapt, peft, tiny_llama, tuner_named

pytestmark = IGNORE_OLD_NAME


def trainable(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_every_trainable_parameter_has_one_role(tuner):
    model = adapt(tuner)
    found = find_parameters(model)
    assert [id(f.param) for f in found] == list(trainable(model))
    assert Counter(f.role.value for f in found) == tuner.roles
    for attribute, values in tuner.facts.items():
        assert {getattr(f, attribute) for f in found if f.role.value.startswith("lora")} == values


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_pairs_join_the_factors_of_one_product(tuner):
    found = find_parameters(adapt(tuner))
    pairs: dict[int, dict[str, Any]] = {}
    for f in found:
        if f.pair >= 0:
            assert pairs.setdefault(f.pair, {}).setdefault(f.role.is_lora_B, f) is f
    assert sorted(pairs) == list(range(tuner.pairs))
    for pair in pairs.values():
        a, b = pair[False], pair[True]
        assert a.module == b.module
        assert a.param.shape[0] == b.param.shape[1] == a.rank == b.rank
        assert a.scaling == b.scaling > 0


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_groups_hold_each_parameter_once_with_aligned_lists(tuner):
    model = adapt(tuner)
    groups = param_groups(model, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trainable(model))
    for group in groups:
        assert group["params"]
        assert {len(group[key]) for key in ("names", "ranks", "scalings", "pairs")} == {len(group["params"])}
        if group["role"] in ("magnitude", "bias", "norm"):
            assert group["weight_decay"] == 0.0
    assert [g["names"] for g in groups] == [g["names"] for g in param_groups(adapt(tuner), weight_decay=0.1)]


@pytest.mark.parametrize("name", ["ia3", "boft", "road", "psoft"])
def test_factors_that_start_at_one_do_not_decay(name):
    found = find_parameters(adapt(tuner_named(name)))
    assert {f.decays for f in found if torch.equal(f.param, torch.ones_like(f.param))} == {False}
    assert {f.decays for f in found if not torch.equal(f.param, torch.ones_like(f.param))} <= {True}


def test_pretrained_copies_keep_the_rate_of_full_weights():
    found = find_parameters(adapt(tuner_named("saved")))
    assert {f.role.value: f.is_full_weight for f in found if f.role.value in ("embedding", "new", "norm")} == {
        "embedding": True,
        "new": False,
        "norm": True,
    }


def test_a_bias_steps_at_its_modules_rate():
    assert [f.is_full_weight for f in find_parameters(adapt(tuner_named("lora_bias"))) if f.role == "bias"] == [
        False,
        False,
    ]
    assert [f.is_full_weight for f in find_parameters(adapt(tuner_named("base_bias"))) if f.role == "bias"] == [True]


def test_two_adapters_are_kept_apart_and_only_the_active_trains():
    model = adapt(tuner_named("lora"))
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    assert {f.adapter for f in find_parameters(model)} == {"default"}
    model.set_adapter("second")
    assert {(f.adapter, f.rank, f.scaling) for f in find_parameters(model)} == {("second", 2, 1.0)}
    model.base_model.set_adapter(["default", "second"])
    found = find_parameters(model)
    assert Counter(f.adapter for f in found) == {"default": 4, "second": 2}
    assert sorted(f.pair for f in found) == [0, 0, 1, 1, 2, 2]
    assert [(g["role"], g["adapter"]) for g in param_groups(model)] == [
        ("lora_A", "default"),
        ("lora_A", "second"),
        ("lora_B", "default"),
        ("lora_B", "second"),
    ]


def test_a_factor_without_its_partner_has_no_pair():
    model = adapt(tuner_named("lora"))
    for name, param in model.named_parameters():
        if "q_proj.lora_A" in name:
            param.requires_grad_(False)
    assert {f.name.split(".")[-4]: f.pair for f in find_parameters(model)} == {"q_proj": -1, "v_proj": 0}


def test_a_factor_shared_by_two_products_has_no_pair_and_one_place():
    model = adapt(tuner_named("lora"))
    attention = model.base_model.model.model.layers[0].self_attn
    attention.v_proj.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
    found = find_parameters(model)
    assert len(found) == 3
    assert {f.pair for f in found} == {-1}


def test_tied_weights_are_found_once():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    found = find_parameters(model)
    assert len({id(f.param) for f in found}) == len(found)
    assert [f.role.value for f in found if f.param is model.lm_head.weight] == ["embedding"]


def test_a_plain_model_sorts_into_weights_embeddings_norms_and_biases():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 3))
    assert [f.role.value for f in find_parameters(model)] == [
        "embedding",
        "full",
        "bias",
        "norm",
        "norm",
        "full",
        "bias",
    ]
    assert all(f.is_full_weight for f in find_parameters(model))
    groups = param_groups(model, weight_decay=0.1)
    assert [(g["role"], g["weight_decay"]) for g in groups] == [
        ("bias", 0.0),
        ("norm", 0.0),
        ("embedding", 0.1),
        ("full", 0.1),
    ]


def test_new_modules_step_at_the_adapters_rate():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))})
    found = {f.name: (f.role.value, f.is_full_weight, f.decays) for f in find_parameters(model, new_modules=["head"])}
    assert found["body.weight"] == ("full", True, True)
    assert found["body.bias"] == ("bias", True, False)
    assert found["head.0.weight"] == ("norm", False, False)
    assert found["head.1.weight"] == ("new", False, True)
    assert found["head.1.bias"] == ("bias", False, False)


def test_an_unknown_new_module_raises_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"no module 'classifer'; did you mean 'classifier'"):
        find_parameters(nn.ModuleDict({"classifier": nn.Linear(2, 2)}), new_modules=["classifer"])


class WrittenLoRA(nn.Module):
    """The hand-written form: two bare Linear layers and a scaling."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 8, bias=bias)
        self.scaling = 0.1


class WrittenParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(2, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, 2))


def test_hand_written_siblings_are_pairs():
    model = nn.ModuleList([WrittenLoRA(), WrittenLoRA(bias=True), WrittenParameters(), nn.Linear(8, 8, bias=False)])
    found = find_parameters(model)
    assert [f.role.value for f in found] == [
        "lora_A",
        "lora_B",
        "lora_A",
        "lora_B",
        "bias",
        "lora_A",
        "lora_B",
        "full",
    ]
    assert [f.pair for f in found] == [0, 0, 1, 1, -1, 2, 2, -1]
    assert {f.scaling for f in found[:4]} == {0.1}
    assert found[4].is_full_weight is False


@pytest.mark.parametrize("name", ["lora", "dora", "lora_bias", "rank_pattern", "embedding", "adalora", "head"])
def test_names_alone_tell_roles_and_pairs(name):
    model = adapt(tuner_named(name))
    by_name = group_by_name(model.named_parameters(), weight_decay=0.1)
    by_layer = param_groups(model, weight_decay=0.1)
    for known in ("role", "adapter", "names", "ranks", "pairs", "weight_decay", "is_full_weight"):
        assert [g[known] for g in by_name] == [g[known] for g in by_layer]


def test_names_tell_nothing_of_plain_weights():
    groups = group_by_name(nn.Linear(2, 2).named_parameters(), weight_decay=0.1)
    assert [(g["role"], g["is_full_weight"], g["weight_decay"]) for g in groups] == [
        ("adapter", False, 0.1),
        ("bias", False, 0.0),
    ]


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: m], ids=["compiled", "plain"])
def test_a_compiled_model_keeps_its_names_and_pairs(wrap):
    found = find_parameters(wrap(WrittenLoRA()))
    assert [(f.name, f.pair) for f in found] == [("lora_A.weight", 0), ("lora_B.weight", 0)]


def test_wrappers_leave_no_trace_in_names():
    assert display_name("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.w") == "layers.0.w"
    assert display_name("module._orig_mod.module.w") == "module.w"


def test_parameters_of_different_meshes_get_their_own_groups(single_process_group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor

    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    for layer, layout in ((model[0], [0]), (model[1], [[0]])):
        mesh = DeviceMesh("cpu", layout)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    assert [g["names"] for g in param_groups(model)] == [["0.weight"], ["1.weight"], ["2.weight"]]


@pytest.fixture
def single_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter; add an adapter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))
