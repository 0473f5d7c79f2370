"""ALLoRA's gains (stage 5), and how the two factors of a LoRA find each other."""

import itertools
import logging

import pytest
import torch

from hf_automagic.optim import bucket
from hf_automagic.optim.automagic import Automagic
from hf_automagic.transforms.lora import (
    ScaleByRowGain,
    allora_gains,
)
from tests.stage_cases import (
    ALLORA,
    CONV,
    LORA,
    PENALTY,
    PLAIN,
    WIDE,
    check_against_reference,
    context,
    engine,
    factors,
    gradients,
    make_pairs,
    noise,
    run_engine,
    run_one,
    start,
    take_step,
)

# ALLoRA


@pytest.mark.parametrize("shapes", [LORA, CONV, WIDE], ids=["linear", "conv", "wide"])
@pytest.mark.parametrize("scaling", [1.0, -0.5, 16.0])
def test_optimizer_with_allora_equals_the_reference(shapes, scaling):
    reference = {"allora": True, "allora_eta": 2.0}
    check_against_reference(shapes, {**ALLORA, "scaling": scaling}, reference)


def test_row_norms_need_no_product():
    a, b = factors()
    scaling = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    gains, whole = allora_gains(a, b, scaling, 1.7)
    for i in range(3):
        norms = (scaling[i] * b[i] @ a[i]).norm(dim=1)
        assert (gains[i] - 1 / (1 + 1.7**2 * norms).sqrt()).abs().max() < 1e-12
        weight = b[i].square().sum(1)
        assert whole[i].item() == pytest.approx(((gains[i] * weight).sum() / weight.sum()).item())


def test_gain_on_b_is_the_gain_on_the_product():
    """Scaling the rows of the product's own gradient G gives B the gradient (S G) A^T = S (G A^T)."""
    a, b = (t[0] for t in factors())
    b.requires_grad_()
    gains, _ = allora_gains(a[None], b.detach()[None], torch.ones(1).double(), 2.0)
    product, target = b @ a, noise(20, 30, seed=9)
    product.register_hook(lambda grad: grad * gains[0][:, None])
    (product * target).sum().backward()
    plain = target @ a.T
    scaled, _ = run_one(ScaleByRowGain(), plain[None], {}, context(plain[None], row_gain=gains))
    assert (scaled[0] - b.grad).abs().max() < 1e-12


def test_gains_only_damp_and_more_so_with_eta():
    a, b = factors()
    gains = [allora_gains(a, b, torch.ones(3).double(), eta)[0] for eta in (0.0, 0.5, 2.0, 10.0)]
    assert torch.equal(gains[0], torch.ones(3, 20).double())
    assert all((small > large).all() for small, large in itertools.pairwise(gains))
    grown = allora_gains(a, 2 * b, torch.ones(3).double(), 2.0)[0]
    assert (grown < gains[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gains_of_a_fresh_adapter_are_one(dtype):
    a, b = noise(2, 4, 30).to(dtype), torch.zeros(2, 20, 4, dtype=dtype)
    rows, whole = allora_gains(a, b, torch.ones(2, dtype=dtype), 2.0)
    assert torch.equal(rows, torch.ones(2, 20, dtype=dtype))
    assert torch.equal(whole, torch.ones(2, dtype=dtype))


def test_larger_eta_moves_less():
    moved = []
    for eta in (0.5, 2.0, 8.0):
        weights = run_engine(LORA, allora=True, eta=eta)
        moved.append((weights["b"] - start(LORA)["b"]).norm().item())
    assert moved[0] > moved[1] > moved[2]


def test_partners_are_found_by_their_number_not_their_place(monkeypatch):
    shapes = [(20, 4, 30), (20, 4, 30), (12, 4, 30), (20, 4, 30), (9, 2, 11)]
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 2 * 4 * 120)  # two factors at once
    optimizer, params, weights = make_pairs(shapes, **ALLORA, **PENALTY)
    alone = [make_pairs([shape], **ALLORA, **PENALTY) for shape in shapes]
    for i, (single, own, _) in enumerate(alone):
        for group in single.param_groups:
            group["scalings"] = [1.0 + i]
        with torch.no_grad():
            own["a0"].copy_(weights[f"a{i}"])
            own["b0"].copy_(weights[f"b{i}"])
    for step in range(4):
        grads = {name: noise(*p.shape, seed=100 * step + k) for k, (name, p) in enumerate(params.items())}
        take_step(optimizer, params, grads)
        for i, (single, own, _) in enumerate(alone):
            take_step(single, own, {"a0": grads[f"a{i}"], "b0": grads[f"b{i}"]})
    for i, (_, own, _) in enumerate(alone):
        assert (params[f"a{i}"] - own["a0"]).abs().max() < 1e-9
        assert (params[f"b{i}"] - own["b0"]).abs().max() < 1e-9
        assert (params[f"b{i}"] - weights[f"b{i}"]).abs().max() > 1e-3


def test_gains_are_those_of_the_forward_pass_of_peft():
    """Equals PEFT's own delta_weight, row by row of what a layer puts out: linear, convolution, embedding, rsLoRA."""
    from peft import LoraConfig, get_peft_model

    from hf_automagic.peft import param_groups

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(40, 12)
            self.linear = torch.nn.Linear(12, 10)
            self.conv = torch.nn.Conv2d(6, 9, 3)

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["table", "linear", "conv"])
    model = get_peft_model(Model(), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(noise(*param.shape, seed=len(name)) * 0.3)
    optimizer = Automagic(param_groups(model), **{**PLAIN, **ALLORA})
    gains = optimizer._current_plan().pairs.row_gains()
    found = {tuple(gain.shape[1:]): gain[0] for gain in gains.values() if gain.shape[1] > 1}
    base = model.base_model.model
    deltas = {
        10: base.linear.get_delta_weight("default"),
        9: base.conv.get_delta_weight("default").flatten(1),
        12: base.table.get_delta_weight("default").T,
    }
    assert {shape[0] for shape in found} == deltas.keys()
    for (rows,), gain in found.items():
        assert torch.allclose(gain, 1 / (1 + 4 * deltas[rows].norm(dim=1)).sqrt(), rtol=1e-4)


def test_a_chain_swept_in_pieces_equals_the_whole(monkeypatch):
    whole = run_engine(LORA, **ALLORA, **PENALTY)
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 4 * 4 * 6)  # six rows of b, one of a
    pieces = run_engine(LORA, **ALLORA, **PENALTY)
    for name in LORA:
        assert (pieces[name] - whole[name]).abs().max() < 1e-6


def test_a_step_inside_autocast_changes_no_bit():
    ends = []
    for enabled in (False, True):
        optimizer, params = engine({name: w.float() for name, w in start(LORA).items()}, **ALLORA, **PENALTY)
        for grads in gradients(LORA, 3):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                take_step(optimizer, params, grads)
        ends.append(params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in LORA)


def test_pairs_survive_an_exchange_of_the_parameters():
    """FSDP2 puts other objects in the param groups' lists; partners are found by place, not by identity."""
    ends = []
    for swaps in (False, True):
        optimizer, params = engine(start(LORA), **ALLORA, **PENALTY)
        for step, grads in enumerate(gradients(LORA, 6)):
            if swaps and step == 2:
                for group, name in zip(optimizer.param_groups, LORA, strict=True):
                    fresh = torch.nn.Parameter(params[name].detach().clone())
                    optimizer.state[fresh] = optimizer.state.pop(params[name])
                    params[name] = group["params"][0] = fresh
            take_step(optimizer, params, grads)
        ends.append(params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in LORA)


# without pairs


@pytest.mark.parametrize("pairs", [[-1, -1], None], ids=["tied or AdaLoRA", "nothing known"])
def test_without_pairs_no_bit_changes(pairs, caplog):
    ends = []
    for options in ({}, {**ALLORA, **PENALTY, "rank_penalty_every": 1}):
        params = {"a": torch.nn.Parameter(noise(4, 30).float()), "b": torch.nn.Parameter(noise(20, 4).float())}
        groups = [{"params": [params[name]], "role": f"lora_{name.upper()}"} for name in "ab"]
        if pairs is not None:
            groups = [{**group, "pairs": [pair]} for group, pair in zip(groups, pairs, strict=True)]
        with caplog.at_level(logging.INFO, "hf_automagic"):
            optimizer = Automagic(groups, **{**PLAIN, **options})
        for grads in gradients({"a": (4, 30), "b": (20, 4)}, 3):
            take_step(optimizer, params, grads)
        ends.append(params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in "ab")
    said = [record.getMessage() for record in caplog.records if "allora" in record.getMessage()]
    assert len(said) == 1
    assert "no LoRA pairs found" in said[0]


# at the door


def test_lists_of_a_group_must_fit_it():
    with pytest.raises(ValueError, match="pairs of a param group must have an entry for each parameter, got 2 for 1"):
        Automagic([{"params": [torch.nn.Parameter(noise(4, 30))], "role": "lora_A", "pairs": [0, 1]}])


@pytest.mark.parametrize(
    ("shapes", "pairs", "sentence"),
    [
        ([(4, 30), (4, 30), (20, 4)], [0, 0, 0], "two parameters of role lora_A have the pair number 0"),
        ([(4, 30), (6, 30), (20, 4)], [1, 0, 0], r"pair 0 has an A of shape \(6, 30\) and a B of shape \(20, 4\)"),
    ],
)
def test_pairs_must_make_a_product(shapes, pairs, sentence):
    params = [torch.nn.Parameter(noise(*shape)) for shape in shapes]
    groups = [
        {"params": params[:2], "role": "lora_A", "pairs": pairs[:2]},
        {"params": params[2:], "role": "lora_B", "pairs": pairs[2:]},
    ]
    optimizer = Automagic(groups)
    with pytest.raises(ValueError, match=sentence):
        optimizer.pair_ranks()
