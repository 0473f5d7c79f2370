"""What the seeds' views and memory statistics show is what the optimizer holds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_automagic import (
    Automagic_CameAMP,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_COptim8bit,
    Automagic_CameAMP_Improved,
)
from hf_automagic.transforms.lora import allora_gains
from tests.seed_cases import CLASSES, CONV, SHIFT, A, B, Pair, make, run, states_of


def test_every_state_name_of_the_first_seed_is_a_key():
    model, optimizer = make()
    run(model, optimizer, 2)
    quantized, precise = optimizer.quantized_states, optimizer.high_precision_states
    assert list(quantized) == [A, B, CONV]
    assert list(precise) == [A, B, SHIFT, CONV]
    for number in (A, B, CONV):
        assert list(quantized[number]) == ["exp_avg", "exp_avg_sq", "exp_avg_res", "s", "edge_history"]
        assert list(precise[number]) == ["lr_mask", "last_polarity", "spatial_variance", "row_scaling"]
    assert set(precise[SHIFT]) == {"exp_avg", "exp_avg_sq", "edge_history", *precise[A]}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"edge_suppression": False}, {"edge_history"}),
        ({"spatial_awareness": False}, {"spatial_variance"}),
        ({"allora": False}, {"row_scaling"}),
        ({"lr_granularity": "tensor"}, {"lr_mask", "last_polarity"}),
        (
            {"momentum_order": "before", "self_tuning": False},
            {"exp_avg_res", "s", "lr_mask", "last_polarity"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "-".join(sorted(value)),
)
def test_a_key_goes_with_its_feature(options, gone):
    names = []
    for changed in ({}, options):
        model, optimizer = make(**changed)
        run(model, optimizer, 1)
        names.append(
            {name for view in (optimizer.quantized_states, optimizer.high_precision_states) for name in view[A]}
        )
    assert names[0] - names[1] == gone


def test_there_is_nothing_to_see_before_the_first_step():
    _, optimizer = make()
    assert dict(optimizer.quantized_states) == dict(optimizer.high_precision_states) == {}
    assert not optimizer.state


def test_views_cannot_be_written():
    model, optimizer = make()
    run(model, optimizer, 1)
    for view in (optimizer.quantized_states, optimizer.high_precision_states):
        with pytest.raises(TypeError):
            view[A] = {}
        with pytest.raises(TypeError):
            view[A]["exp_avg"] = None
    with pytest.raises(AttributeError):
        optimizer.quantized_states = {}


def test_views_are_keyed_as_the_state_dict():
    model = Pair()
    model.conv.requires_grad_(False)
    optimizer = Automagic_CameAMP_8Bit(model.parameters())
    for param in (model.lora_A.weight, model.lora_B.weight):
        param.grad = torch.randn_like(param)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    assert list(optimizer.quantized_states) == [number for number in saved if "exp_avg_codes" in saved[number]]


def test_the_mask_shows_the_rate_that_each_element_stepped_with():
    model, optimizer = make(sync_frequency=1000)
    run(model, optimizer, 30)
    rate = optimizer.param_groups[0]["effective_lr"]
    codes = states_of(optimizer, model.lora_A)["lr_mask"].double()
    expected = float(rate) * 10 ** (4 / 255 * (codes - 128))
    mask = optimizer.high_precision_states[A]["lr_mask"]
    assert mask.min() < rate < mask.max()
    torch.testing.assert_close(mask.double(), expected, rtol=1e-5, atol=0)


def test_momentum_and_polarity_are_what_is_stored():
    model, optimizer = make(quantize_states=False)
    run(model, optimizer, 3)
    state = states_of(optimizer, model.conv)
    view = optimizer.high_precision_states[CONV]
    assert torch.equal(view["exp_avg"], state["exp_avg"])
    assert torch.equal(view["last_polarity"], state["exp_avg"] > 0)
    assert view["last_polarity"].dtype is torch.bool
    assert torch.equal(view["spatial_variance"], state["spatial_variance"])
    assert torch.equal(view["edge_history"], state["edge_roughness"])
    assert view["edge_history"] > 0


def test_codes_decode_close_to_the_fp32_momentum():
    (model, coded), (same, exact) = make(Automagic_CameAMP_8Bit), make(Automagic_CameAMP_Improved)
    run(model, coded, 1)
    run(same, exact, 1)
    state, momentum = coded.quantized_states[CONV]["exp_avg"], exact.high_precision_states[CONV]["exp_avg"]
    error = float((state.dequantize() - momentum).norm() / momentum.norm())
    assert 0.001 < error < 0.01
    assert float(state.relative_error) == pytest.approx(error, rel=0.1)
    assert state.dequantize().shape == momentum.shape == (32, 16, 3, 3)
    assert set(state.fields) == {"codes", "scale", "residual"}


@pytest.mark.parametrize("name", ["exp_avg_sq", "exp_avg_res"])
def test_factored_moments_are_rebuilt(name):
    model, optimizer = make(vector_precision="fp32")
    run(model, optimizer, 3)
    state = states_of(optimizer, model.lora_B)
    row, col = state[f"{name}_row"].double(), state[f"{name}_col"].double()
    rebuilt = optimizer.quantized_states[B][name].dequantize()
    torch.testing.assert_close(rebuilt.double(), torch.outer(row, col) / row.mean(), rtol=1e-5, atol=0)


def test_s_is_what_the_momentum_was_multiplied_with():
    options = {"self_tuning": False, "quantize_states": False, "weight_decay": 0.0}
    model = nn.Linear(40, 30, bias=False)
    optimizer = Automagic_CameAMP(model.parameters(), lr=1e-3, warmup_steps=0, **options)
    run(model, optimizer, 4)
    before = model.weight.detach().clone()
    run(model, optimizer, 1, first=4)
    view = optimizer.high_precision_states[0]
    moved, expected = (before - model.weight).flatten(), (view["exp_avg"] * view["s"]).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.999999
    assert torch.cosine_similarity(moved, view["exp_avg"].flatten(), dim=0) < 0.9999


def test_row_scaling_is_alloras_gain():
    model, optimizer = make()
    run(model, optimizer, 2)
    a, b = model.lora_A.weight.detach()[None], model.lora_B.weight.detach()[None]
    rows, whole = allora_gains(a, b, torch.tensor([0.5]), optimizer.config.eta)
    view = optimizer.high_precision_states
    torch.testing.assert_close(view[B]["row_scaling"], rows[0])
    torch.testing.assert_close(view[A]["row_scaling"], whole.expand(16))
    assert torch.equal(view[CONV]["row_scaling"], torch.ones(32))
    assert view[B]["row_scaling"].max() < 1


def test_the_error_accumulator_is_what_rounding_took():
    model, optimizer = make(Automagic_CameAMP_8Bit, betas=(0.0, 0.99, 0.999), momentum_scales=(1, 5))
    exact_model, exact = make(Automagic_CameAMP_Improved, betas=(0.0, 0.99, 0.999), momentum_scales=(1, 5))
    run(model, optimizer, 1)
    run(exact_model, exact, 1)
    for name in ("exp_avg", "exp_avg_k5"):
        state = optimizer.quantized_states[A][name]
        lost = exact.high_precision_states[A][name] - state.dequantize()
        assert state.error_accumulator.shape == lost.shape
        assert (state.error_accumulator - lost).norm() < 0.1 * lost.norm()


def test_without_error_correction_the_accumulator_is_zero_and_takes_no_memory():
    model, optimizer = make(error_correction=False)
    run(model, optimizer, 1)
    for states in optimizer.quantized_states.values():
        for state in states.values():
            accumulator = state.error_accumulator
            assert torch.norm(accumulator) == 0
            assert accumulator.untyped_storage().nbytes() == 4
    assert accumulator.shape == model.conv.weight.shape


def test_a_loaded_state_is_seen_in_the_form_of_now():
    model, optimizer = make(quantize_states=False)
    run(model, optimizer, 2)
    _, loaded = make()
    loaded.load_state_dict(optimizer.state_dict())
    exact = optimizer.high_precision_states[A]["exp_avg"]
    assert (loaded.quantized_states[A]["exp_avg"].dequantize() - exact).norm() < 0.01 * exact.norm()


def test_the_longer_momenta_of_the_second_seed_are_quantized_states_too():
    model, optimizer = make(Automagic_CameAMP_COptim8bit)
    run(model, optimizer, 1)
    names = ["exp_avg", "exp_avg_k5", "exp_avg_k10", "exp_avg_k25", "exp_avg_sq", "exp_avg_res", "s"]
    assert list(optimizer.quantized_states[CONV]) == names
    assert optimizer.quantized_states[CONV]["exp_avg_k25"].fields["codes"].dtype is torch.int8


# memory


def tensors_below(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors_below(item)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_memory_statistics_count_every_byte(cls):
    model, optimizer = make(cls)
    planned = optimizer.get_memory_stats()
    run(model, optimizer, 2)
    stats = optimizer.get_memory_stats()
    packed = optimizer.state_dict()
    saved = [tensor for part in (packed["state"], packed["param_groups"]) for tensor in tensors_below(part)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert stats == planned
    assert stats["total_quantized_memory"] + stats["total_high_precision_memory"] == total
    quantizes = cls.__name__.endswith(("8Bit", "8bit"))
    assert (stats["quantized_params"], stats["high_precision_params"]) == ((3, 1) if quantizes else (0, 4))
    assert stats["adam_equivalent"] == 8 * sum(p.numel() for p in model.parameters())
    coded = [t for t in saved if t.dtype in (torch.int8, torch.float16)]
    assert stats["total_quantized_memory"] >= sum(t.numel() * t.element_size() for t in coded)
    assert (stats["total_quantized_memory"] > 0) == quantizes


def test_the_compression_ratio_compares_with_the_same_states_in_fp32():
    _, coded = make(Automagic_CameAMP_8Bit)
    _, exact = make(Automagic_CameAMP_Improved)
    stats, whole = coded.get_memory_stats(), exact.get_memory_stats()
    held = stats["total_quantized_memory"] + stats["total_high_precision_memory"]
    mask = sum(p.numel() for group in exact.param_groups for p in group["params"])
    in_fp32 = (
        whole["total_quantized_memory"] + whole["total_high_precision_memory"] + 3 * mask
    )  # the mask has one byte
    assert stats["compression_ratio"] == pytest.approx(held / in_fp32)
    assert math.isclose(stats["compression_ratio"], 0.34, abs_tol=0.05)
