"""States survive every change of how they are stored: in the middle of a run, and between a save and a load."""

import copy
import io
import itertools
import logging
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.optim.conversion import convert_entry
from hf_automagic.optim.storage import Layout
from hf_automagic.quantization import Softsign, StateCodecs

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"quantize_states": False},
    "softsign": {},
    "smaller blocks": {"block_size": 64},
    "affine": {"codec": "affine", "block_size": 256},
    "dynamic": {"codec": "dynamic", "block_size": 64},
    "feedback": {"error_correction": True},
    "affine with feedback": {"codec": "affine", "error_correction": True},
    "vectors in 16 bits": {"vector_precision": "log16"},
    "several momenta": {"momentum_scales": (1, 5)},
}
SHAPES = [(20, 300), (300, 20), (64, 8, 3, 3), (8, 1024), (5, 7), (33,), ()]
ROUNDING = 0.03  # relative error of a momentum that went through two codes


def new_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES]


def run(optimizer: Automagic, params: Sequence[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator)
            steady = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 + i))
            param.grad = (steady + noise).to(param.dtype)
        optimizer.step()


def started(
    form: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Automagic, list[torch.nn.Parameter]]:
    params = new_params(dtype)
    return Automagic(params, lr=1e-3, **{**FORMS[form], **options}), params


def saved(optimizer: Automagic) -> dict[str, Any]:
    """What a file gives back, by the loader that trusts nothing."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def truth(optimizer: Automagic, params: Sequence[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The states as numbers, read through a copy that is converted to fp32."""
    other = copy.deepcopy(optimizer)
    other.set_quantization(False)
    owners = [p for group in other.param_groups for p in group["params"]]
    return {f"{name}.{i}": t.float() for i, p in enumerate(owners) for name, t in other.state[p].items()}


def layout_of(optimizer: Automagic) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    return [{name: (t.shape, t.dtype) for name, t in entry.items()} for entry in optimizer.state.values()]


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(list(FORMS)[:-1], 2)))
def test_a_checkpoint_of_any_form_loads_into_any_other(before: str, after: str, caplog: pytest.LogCaptureFixture):
    writer, written = started(before)
    run(writer, written, range(4))
    expected = truth(writer, written)
    reader, params = started(after)
    reader.load_state_dict(saved(writer))
    with caplog.at_level(logging.INFO, "hf_automagic"):
        run(reader, params, range(4, 5))
    said = [r for r in caplog.records if "have been converted" in r.getMessage()]
    assert len(said) == 1
    fresh, others = started(after)
    run(fresh, others, range(1))
    assert layout_of(reader) == layout_of(fresh)
    reader, _ = started(after)
    reader.load_state_dict(saved(writer))
    reader.requantize()
    assert_close(truth(reader, params), expected, ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.matrix("T3", "T4")
def test_a_checkpoint_of_the_same_form_resumes_to_the_bit(
    form: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
):
    whole, params = started(form, dtype)
    run(whole, params, range(4))
    file, weights = saved(whole), [p.detach().clone() for p in params]
    run(whole, params, range(4, 8))
    resumed, others = started(form, dtype)
    for other, weight in zip(others, weights, strict=True):
        other.data.copy_(weight)
    resumed.load_state_dict(file)
    with caplog.at_level(logging.INFO, "hf_automagic"):
        run(resumed, others, range(4, 8))
    assert not [r for r in caplog.records if "converted" in r.getMessage()]
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    for entry, other in zip(whole.state.values(), resumed.state.values(), strict=True):
        assert all(torch.equal(entry[name], other[name]) and entry[name].dtype == other[name].dtype for name in entry)


def test_storage_is_what_the_constructor_asked_for_and_tuning_what_the_file_holds():
    writer, params = started("affine", max_lr=7e-4, lr_speed=0.2)
    run(writer, params, range(2))
    reader, _ = started("softsign", min_8bit_size=100)
    reader.load_state_dict(saved(writer))
    group = reader.param_groups[0]
    assert (group["codec"], group["block_size"], group["min_8bit_size"]) == ("softsign", 128, 100)
    assert (group["max_lr"], group["lr_speed"]) == (7e-4, 0.2)


def test_options_of_the_file_that_win_over_others_are_said(caplog: pytest.LogCaptureFixture):
    """As where a run is resumed under another optimizer's name."""
    writer, params = started("softsign", max_lr=7e-4)
    run(writer, params, range(2))
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        started("affine", max_lr=7e-4, backend="eager")[0].load_state_dict(saved(writer))
        assert not caplog.records
        started("softsign", self_tuning=False, betas=(0.9, 0.99, 0.999), max_lr=7e-4)[0].load_state_dict(saved(writer))
    assert [record.getMessage() for record in caplog.records] == [
        "a group of adapter goes on with the checkpoint's options: self_tuning True and not False, betas (0.8, 0.99, "
        "0.999) and not (0.9, 0.99, 0.999); set them in optimizer.param_groups after loading to have yours"
    ]


def test_a_file_without_an_option_of_today_loads():
    writer, params = started("softsign")
    run(writer, params, range(2))
    file = saved(writer)
    for name in ("vector_precision", "error_correction", "lr_speed"):
        del file["param_groups"][0][name]
    reader, params = started("softsign", lr_speed=0.3)
    reader.load_state_dict(file)
    run(reader, params, range(2, 3))
    assert reader.param_groups[0]["lr_speed"] == 0.3


@pytest.mark.parametrize("form", [name for name in FORMS if name != "fp32"])
def test_set_quantization_converts_what_is_there(form: str, caplog: pytest.LogCaptureFixture):
    optimizer, params = started(form, quantize_states=False)
    run(optimizer, params, range(4))
    exact = truth(optimizer, params)
    with caplog.at_level(logging.INFO, "hf_automagic"):
        optimizer.set_quantization(True)
    assert [r.getMessage() for r in caplog.records] == [
        "the states of 4 parameters were stored in another way and have been converted"
    ]
    fresh, others = started(form)
    run(fresh, others, range(1))
    assert layout_of(optimizer) == layout_of(fresh)
    assert_close(truth(optimizer, params), exact, ROUNDING)
    run(optimizer, params, range(4, 6))
    optimizer.set_quantization(False)
    assert {t.dtype for entry in optimizer.state.values() for t in entry.values()} == {torch.float32}


def test_requantize_changes_blocks_and_codes():
    optimizer, params = started("softsign")
    run(optimizer, params, range(4))
    before = truth(optimizer, params)
    optimizer.requantize(block_size=32)
    assert optimizer.state[params[0]]["exp_avg_scale"].shape == (20, 10)
    optimizer.requantize(codec="affine", block_size=64)
    assert optimizer.state[params[0]]["exp_avg_zero"].shape == (20, 5)
    assert optimizer.memory_stats().total_bytes == held_bytes(optimizer)
    assert_close(truth(optimizer, params), before, ROUNDING)


def held_bytes(optimizer: Automagic) -> int:
    shared = [
        t for g in optimizer.param_groups for v in g.values() for t in (v.values() if isinstance(v, dict) else [v])
    ]
    tensors = [*shared, *(t for entry in optimizer.state.values() for t in entry.values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def test_a_step_after_a_change_goes_where_it_would_have_gone():
    plain, params = started("softsign")
    changed, others = started("softsign")
    for optimizer, owned in ((plain, params), (changed, others)):
        run(optimizer, owned, range(5))
    changed.set_quantization(False)
    run(plain, params, range(5, 8))
    run(changed, others, range(5, 8))
    for param, other, start in zip(params, others, new_params(), strict=True):
        assert (param - other).norm() <= 0.01 * (param - start).norm()


def test_a_group_option_changed_by_hand_converts_too():
    optimizer, params = started("softsign")
    run(optimizer, params, range(3))
    before = truth(optimizer, params)
    optimizer.param_groups[0]["codec"] = "affine"
    run(optimizer, params, range(3, 4))
    assert optimizer.state[params[0]]["exp_avg_codes"].dtype == torch.uint8
    momentum = truth(optimizer, params)["exp_avg.0"]
    assert torch.nn.functional.cosine_similarity(momentum, before["exp_avg.0"], 0).mean() > 0.8


@pytest.mark.parametrize(
    ("change", "error"),
    [({"codec": "softsing"}, "did you mean 'softsign'"), ({"block_size": 100}, "must be a power of two")],
)
def test_a_refused_change_changes_nothing(change: dict[str, Any], error: str):
    optimizer, params = started("softsign")
    run(optimizer, params, range(2))
    before, groups = layout_of(optimizer), [dict(group) for group in optimizer.param_groups]
    with pytest.raises((TypeError, ValueError), match=error):
        optimizer.requantize(**change)
    assert layout_of(optimizer) == before
    assert [{name: group[name] for name in ("codec", "block_size")} for group in optimizer.param_groups] == [
        {name: group[name] for name in ("codec", "block_size")} for group in groups
    ]


def test_groups_added_later_follow_a_change():
    optimizer, params = started("softsign")
    run(optimizer, params, range(2))
    optimizer.set_quantization(False)
    late = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.randn(64, 64)
    optimizer.step()
    assert "exp_avg" in optimizer.state[late]


def test_leaving_error_feedback_gives_the_residual_back():
    exact, params = started("fp32")
    kept, others = started("feedback", sync_frequency=1000)
    for optimizer, owned in ((exact, params), (kept, others)):
        run(optimizer, owned, range(5))
    target = exact.state[params[0]]["exp_avg"]
    state = kept.state[others[0]]
    in_codes = Softsign(128).decode({n: state[f"exp_avg_{n}"][None] for n in ("codes", "scale")})[0]
    kept.set_quantization(False)
    converted = kept.state[others[0]]["exp_avg"]
    assert (converted - target).norm() < 0.5 * (in_codes - target).norm()


def test_states_of_unknown_form_are_refused():
    optimizer, params = started("softsign")
    run(optimizer, params, range(2))
    file = saved(optimizer)
    file["state"][0]["exp_avg_scale"] = torch.ones(20, 7, dtype=torch.float16)
    reader, others = started("softsign")
    reader.load_state_dict(file)
    with pytest.raises(
        ValueError, match=r"the saved exp_avg of a parameter of shape \(20, 300\) has a form that no codec"
    ):
        run(reader, others, range(1))


def test_an_entry_that_fits_is_left_alone():
    optimizer, params = started("softsign")
    run(optimizer, params, range(2))
    bucket = next(bucket for _, bucket in optimizer._live_plan().buckets if bucket.params[0] is params[0])
    entry = dict(optimizer.state[params[0]])
    assert bucket.codecs == StateCodecs(Softsign(128))
    assert not convert_entry(entry, bucket.stored, Layout.of(params[0].shape))
    assert all(entry[name] is tensor for name, tensor in optimizer.state[params[0]].items())


class OnlyTheFirst:
    """Quantises one shape; at the top of the module, so that it can be pickled."""

    def should_quantize(self, param_name: str, param_shape: torch.Size, param_type: str) -> bool:
        return param_shape == (20, 300)

    def get_block_size(self, param_shape: torch.Size) -> int:
        return 32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_keep_the_strategy(copied: Any):
    params = new_params()
    optimizer = Automagic(params, quantization_strategy=OnlyTheFirst())
    run(optimizer, params, range(2))
    other = copied(optimizer)
    run(other, other.param_groups[0]["params"], range(2, 3))
    assert layout_of(other) == layout_of(optimizer)


def test_adapted_blocks_survive_a_resume_to_the_bit():
    options = {"adaptive_block_size": True, "sync_frequency": 3, "block_error_target": 0.006, "max_block_size": 256}
    whole, params = started("softsign", **options)
    run(whole, params, range(4))
    file, weights = saved(whole), [p.detach().clone() for p in params]
    assert whole.param_groups[0]["block_sizes"] != [128] * len(SHAPES)
    run(whole, params, range(4, 8))
    resumed, others = started("softsign", **options)
    for other, weight in zip(others, weights, strict=True):
        other.data.copy_(weight)
    resumed.load_state_dict(file)
    run(resumed, others, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
