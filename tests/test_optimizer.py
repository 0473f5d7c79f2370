"""Automagic as a torch.optim.Optimizer: its contract, its errors, and what it does with odd input."""

import collections
import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch

from hf_automagic import Automagic, AutomagicConfig


def make(shapes=((16, 512), (7, 33), (17,)), dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in shapes]
    return params, Automagic(params, **options)


def fill(params, seed=0, scale=1e-3):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(params, optimizer, seeds):
    for seed in seeds:
        fill(params, seed)
        optimizer.step()


def save_and_load(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# what it promises of a step


@pytest.mark.parametrize("options", [{}, {"lr_granularity": "element"}, {"lr_search": True}], ids=str)
@pytest.mark.matrix("T25")
def test_converges_on_a_bowl(options):
    params, optimizer = make(lr=1e-3, max_lr=1e-2, **options)
    targets = [p.detach() + 0.02 * torch.ones_like(p) for p in params]
    losses = []
    for _ in range(100):
        loss = sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_the_rate_it_tells_is_the_rate_that_the_weights_went():
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Automagic([param], lr=1e-5, lr_search=True)
    direction = torch.randn(64, 64, generator=generator).sign()
    for _ in range(30):  # a gradient that never changes: every element steps by the rate itself
        before = param.detach().clone()
        param.grad = direction.clone()
        optimizer.step()
        walked = float((param.detach() - before).abs().mean())
        assert walked == pytest.approx(optimizer.get_learning_rates()[0], rel=0.02)
    assert optimizer.get_learning_rates()[0] == pytest.approx(1e-3, rel=1e-5)  # it climbed to the rail


def test_the_schedule_multiplies_and_is_never_overwritten():
    params, optimizer = make(lr=1e-4, rail_steps=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][min(step, 2)])
    rates = []
    for seed in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * [1.0, 0.5, 0.0][seed])
        before = [p.detach().clone() for p in params]
        run(params, optimizer, [seed])
        rates.append(optimizer.get_learning_rates()[0])
        scheduler.step()
    assert rates == pytest.approx([1e-3, 5e-4, 0.0])
    assert all(map(torch.equal, before, params))


def test_the_first_step_without_gradient_and_rate_makes_all_state_and_moves_nothing():
    params, optimizer = make(weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, before, params))
    first = {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"]
    run(params, optimizer, range(3))
    assert {i: set(s) for i, s in optimizer.state_dict()["state"].items()} == first
    assert len(first) == len(params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(bad, dtype):
    params, optimizer = make(dtype=dtype)
    run(params, optimizer, range(5))
    before, state = [p.detach().clone() for p in params], optimizer.state_dict()
    fill(params, 5)
    params[1].grad[3, 4] = bad
    optimizer.step()
    after = optimizer.state_dict()
    assert all(map(torch.equal, before, params))
    for i, saved in state["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in saved.items())
    assert torch.equal(state["param_groups"][0]["log_rate"], after["param_groups"][0]["log_rate"])
    counters = {name: int(value) for name, value in after["param_groups"][0]["counters"].items()}
    assert counters == {"applied": 5, "skipped": 1, "consecutive": 1, "offender": 1}


def test_a_run_with_a_skipped_step_equals_the_run_without_it():
    params, optimizer = make()
    others, other = make()
    for seed in range(6):
        run(params, optimizer, [seed])
        run(others, other, [seed])
        if seed == 2:
            fill(params, 99)
            params[0].grad[0, 0] = float("nan")
            optimizer.step()
    assert all(map(torch.equal, params, others))


def test_a_step_asks_the_device_nothing(monkeypatch):
    params, optimizer = make(dtype=torch.bfloat16, max_grad_norm=1.0, lr_granularity="element", context=True)
    run(params, optimizer, range(2))
    fill(params, 3)

    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step(loss=torch.ones(()))


def test_stochastic_rounding_lets_bf16_weights_follow_small_steps():
    moved = {}
    for rounding in (True, False):
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Automagic([param], lr=1e-5, self_tuning=False, stochastic_rounding=rounding)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[rounding] = float((1 - param.detach().float()).mean())
    assert moved[False] == 0.0  # each step is far below half of bf16's spacing
    assert moved[True] == pytest.approx(1e-3, rel=0.1)


def test_the_fused_norm_clip_equals_torchs():
    options = {"momentum_order": "before", "factored": False, "self_tuning": False, "quantize_states": False}
    params, clipped = make(lr=1e-3, max_grad_norm=0.01, **options)
    others, plain = make(lr=1e-3, **options)
    for seed in range(5):
        fill(params, seed)
        fill(others, seed)
        torch.nn.utils.clip_grad_norm_(others, 0.01)
        clipped.step()
        plain.step()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(params, others, strict=True))


def test_a_closure_runs_with_gradients_on_and_its_loss_comes_back():
    params, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    before = params[0].detach().clone()
    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(before, params[0])


# save, load, copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"lr_granularity": "element", "weight_decay": 0.1}, {"context": True}], ids=str
)
def test_six_and_six_steps_are_twelve(dtype, options):
    params, optimizer = make(dtype=dtype, **options)
    run(params, optimizer, range(6))
    resumed = copy.deepcopy(params)
    other = Automagic(resumed, **options)
    other.load_state_dict(save_and_load(optimizer))
    run(params, optimizer, range(6, 12))
    run(resumed, other, range(6, 12))
    assert all(map(torch.equal, params, resumed))
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        assert {k: (v.dtype, v.shape) for k, v in mine.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_loaded_state_saves_again_before_any_step():
    params, optimizer = make()
    run(params, optimizer, range(3))
    saved = save_and_load(optimizer)
    other = Automagic(copy.deepcopy(params))
    other.load_state_dict(saved)
    again = other.state_dict()
    for i, state in saved["state"].items():
        assert all(torch.equal(value, again["state"][i][name]) for name, value in state.items())


def test_saved_tensors_own_their_storage():
    params, optimizer = make(((64, 64), (64, 64), (64, 64)))
    run(params, optimizer, range(2))
    for state in optimizer.state_dict()["state"].values():
        for tensor in state.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copied", "pickled"])
def test_a_copied_optimizer_steps_its_own_parameters_alike(clone):
    params, optimizer = make()
    run(params, optimizer, range(4))
    twin = clone(optimizer)
    copies = twin.param_groups[0]["params"]
    run(params, optimizer, range(4, 8))
    run(copies, twin, range(4, 8))
    assert all(map(torch.equal, params, copies))
    assert params[0] is not copies[0]


def test_a_file_of_another_optimizer_or_model_is_refused_with_a_sentence():
    params, optimizer = make()
    run(params, optimizer, [0])
    adam = torch.optim.AdamW(params)
    with pytest.raises(ValueError, match="not written by hf_automagic"):
        optimizer.load_state_dict(adam.state_dict())
    _, transposed = make(((512, 16), (7, 33), (17,)))
    with pytest.raises(ValueError, match="belongs to another model"):
        transposed.load_state_dict(optimizer.state_dict())
    newer = optimizer.state_dict()
    newer["param_groups"][0]["schema"] += 1
    with pytest.raises(ValueError, match="upgrade hf_automagic"):
        optimizer.load_state_dict(newer)


# groups and options


def test_groups_keep_their_own_options_and_rails():
    params, _ = make()
    optimizer = Automagic(
        [
            {"params": params[:1], "role": "full"},
            {"params": params[1:2], "role": "lora_B", "lr": 1e-4},
            {"params": params[2:], "role": "bias", "max_lr": 5e-3},
        ],
        max_lr=1e-3,
        loraplus_lr_ratio=4.0,
        weight_decay=0.1,
    )
    full, lora, bias = optimizer.param_groups
    assert (full["max_lr"], full["weight_decay"]) == (pytest.approx(3e-4), 0.1)
    assert (lora["max_lr"], lora["lr"]) == (pytest.approx(9.6e-3), pytest.approx(4e-4))
    assert (bias["max_lr"], bias["weight_decay"]) == (5e-3, 0.0)


@pytest.mark.parametrize("lr", [1e-6, 1e-1])
def test_the_height_of_the_starting_rate_changes_no_bit(lr):
    params, optimizer = make(lr=lr)
    usual, other = make()
    run(params, optimizer, range(5))
    run(usual, other, range(5))
    assert all(map(torch.equal, params, usual))


def test_the_rate_falls_with_the_root_of_the_steps():
    params, optimizer = make(rail_steps=4)
    rates = []
    for seed in range(16):
        run(params, optimizer, [seed])
        rates.append(optimizer.get_learning_rates()[0])
    assert rates[:4] == pytest.approx([1e-3] * 4)
    assert rates[8] == pytest.approx(1e-3 * (4 / 9) ** 0.5)
    assert rates[15] == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("role", "width", "rail"),
    [
        ("lora_A", 384, 3e-4),
        ("lora_B", 384, 2.4e-3),
        ("new", 384, 3.4e-3),
        ("full", None, 3e-4),
        ("adapter", None, 1e-3),
        ("adapter", 4096, 1e-3 * (384 / 4096) ** 0.75),
        ("lora_A", 4, 6e-4),
    ],
)
def test_the_rail_follows_role_and_width(role, width, rail):
    optimizer = Automagic([{"params": make()[0], "role": role, "width": width}])
    assert optimizer.param_groups[0]["max_lr"] == pytest.approx(rail)


def test_a_group_added_in_the_middle_of_a_run_joins_in():
    params, optimizer = make()
    run(params, optimizer, range(3))
    late = torch.nn.Parameter(torch.zeros(16, 512))
    optimizer.add_param_group({"params": [late]})
    run([*params, late], optimizer, range(3, 6))
    assert float(late.detach().abs().sum()) > 0
    assert int(optimizer.state[late]["step"]) == 3
    assert int(optimizer.state[params[0]]["step"]) == 6


def test_options_of_a_group_may_change_in_the_middle_of_a_run():
    params, optimizer = make(weight_decay=0.0)
    run(params, optimizer, range(3))
    optimizer.param_groups[0]["weight_decay"] = 1e3
    optimizer.param_groups[0]["min_lr"] = optimizer.param_groups[0]["max_lr"]
    before = float(params[0].detach().norm())
    run(params, optimizer, range(3, 13))
    assert float(params[0].detach().norm()) < 0.1 * before


def test_a_parameter_without_gradient_sits_the_step_out():
    params, optimizer = make()
    run(params, optimizer, range(2))
    fill(params, 3)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(before, params[1])
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 3]


def _in_turn(state, new):
    for name in list(new):
        del state[name]
        state.setdefault(name, new[name])


def _the_last(state, new):
    name, _ = state.popitem()
    state.setdefault(name, new[name])


PUTS = {
    "codes": lambda state, new: state.__setitem__("exp_avg_codes", new["exp_avg_codes"]),
    "a count": lambda state, new: state.__setitem__("step", new["step"]),
    "an update": lambda state, new: state.update(new),
    "a union": lambda state, new: state.__ior__(new),
    "the last": _the_last,
    "one by one": _in_turn,
    "all anew": lambda state, new: (state.clear(), state.update(new)),
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_what_is_put_in_the_place_of_a_state_is_taken_over(put):
    """As a program puts it there that keeps states elsewhere between steps."""
    (params, optimizer), (others, other) = make(), make()
    run(params, optimizer, range(2))
    run(others, other, range(2))
    new = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    put(optimizer.state[params[0]], new)
    run(params, optimizer, range(2, 4))
    run(others, other, range(2, 4))
    assert all(map(torch.equal, params, others))
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in other.state[q].items())
    assert all(optimizer.state[params[0]][name] is not value for name, value in new.items())


def test_another_entry_is_taken_over():
    (params, optimizer), (others, other) = make(), make()
    run(params, optimizer, range(2))
    run(others, other, range(2))
    optimizer.state[params[0]] = put = {name: torch.clone(t) for name, t in other.state[others[0]].items()}
    run(params, optimizer, range(2, 4))
    run(others, other, range(2, 4))
    assert all(map(torch.equal, params, others))
    assert int(put["step"]) == 4


@pytest.mark.parametrize(
    "options", [{}, {"lr_granularity": "element", "codec": "dynamic"}, {"error_correction": True}]
)
@pytest.mark.parametrize("empty", ["entry", "all", "contents"])
def test_a_state_that_was_emptied_begins_anew(empty, options):
    """As ReLoRA does, and who starts a new phase."""
    params, optimizer = make(**options)
    run(params, optimizer, range(3))
    if empty == "all":
        optimizer.state.clear()
    for p in params:
        if empty == "entry":
            del optimizer.state[p]
        elif empty == "contents":
            optimizer.state[p].clear()
    fresh = make(**options)[1]
    others = [p for group in fresh.param_groups for p in group["params"]]
    run(params, optimizer, range(3, 5))
    run(others, fresh, range(3, 5))
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in fresh.state[q].items())


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_a_dictionary_that_was_put_stays_and_is_looked_at(kind):
    params, optimizer = make()
    run(params, optimizer, range(2))
    optimizer.state[params[0]] = put = kind(optimizer.state[params[0]])
    run(params, optimizer, range(2, 3))
    assert optimizer.state[params[0]] is put
    put["step"] = torch.zeros(())
    run(params, optimizer, range(3, 4))
    assert int(put["step"]) == 1


def test_others_may_keep_things_in_the_state():
    params, optimizer = make()
    optimizer.state["seen"] = 3  # type: ignore[index]
    run(params, optimizer, range(2))
    other = copy.deepcopy(optimizer)
    assert other.state["seen"] == 3
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_a_dictionary_fetched_before_the_first_step_is_the_one_that_fills():
    params, optimizer = make()
    fetched = optimizer.state[params[0]]
    run(params, optimizer, range(2))
    fetched["step"] = torch.zeros(())
    run(params, optimizer, range(2, 3))
    assert int(fetched["step"]) == 1


def test_a_field_that_was_taken_out_begins_anew():
    params, optimizer = make()
    run(params, optimizer, range(3))
    state = optimizer.state[params[0]]
    del state["exp_avg_codes"], state["exp_avg_scale"]
    run(params, optimizer, range(3, 4))
    assert bool((state["exp_avg_codes"] * params[0].grad >= 0).all())  # of this step's gradient alone
    assert int(state["step"]) == 4


def test_entries_are_made_by_others_as_they_make_dictionaries():
    params, optimizer = make()
    run(params, optimizer, range(2))
    for p in params:
        entry = optimizer.state[p]
        optimizer.state[p] = type(entry)({name: value.clone() for name, value in entry.items()})
    run(params, optimizer, range(2, 4))
    others, other = make()
    run(others, other, range(4))
    assert all(map(torch.equal, params, others))


def test_copies_of_an_entry_are_plain_and_load_as_weights_only():
    params, optimizer = make()
    run(params, optimizer, range(1))
    state = optimizer.state[params[0]]
    file = io.BytesIO()
    torch.save(state, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), loaded):
        assert type(twin) in (dict, collections.OrderedDict)
        assert all(torch.equal(twin[name], value) for name, value in state.items())
    assert {type(entry) for entry in optimizer.state_dict()["state"].values()} == {dict}


def test_a_schedule_multiplies_a_rate_in_a_tensor_too():
    rates = []
    for lr in (1e-4, torch.tensor(1e-4)):
        params, optimizer = make(lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        seen = []
        for seed in range(5):
            run(params, optimizer, [seed])
            seen.append(optimizer.get_learning_rates()[0])
            scheduler.step()
        rates.append(seen)
    assert rates[1] == pytest.approx(rates[0], rel=1e-5)
    assert rates[0][4] < 0.2 * rates[0][0]


@pytest.mark.parametrize("given", ["to the optimizer", "to its group", "later", "in a file"])
def test_the_norm_of_all_gradients_is_bounded_wherever_the_bound_is_given(given):
    bound = {"max_grad_norm": 1e-4}
    own = {"self_tuning": False, "lr": 1e-2, "momentum_order": "before"}
    params, clipped = make(**own, **bound)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    in_group, told = bound if given == "to its group" else {}, bound if given == "to the optimizer" else {}
    other = Automagic([{"params": others, **in_group}], **own, **told)
    if given == "later":
        other.param_groups[0].update(bound)
    if given == "in a file":
        other.load_state_dict(clipped.state_dict())
    for seed in range(3):
        for some, optimizer in ((params, clipped), (others, other)):
            fill(some, seed, scale=10.0 ** (seed - 3))
            optimizer.step()
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("lr_pool", "group")])
def test_what_holds_for_all_groups_cannot_differ_between_them(name, value):
    params, _ = make()
    with pytest.raises(ValueError, match=f"{name} holds for all groups"):
        Automagic([{"params": params[:1]}, {"params": params[1:], name: value}])


@pytest.mark.parametrize("change", ["pop", "append"])
def test_a_parameter_list_that_was_changed_is_told(change):
    params, _ = make()
    optimizer = Automagic([(f"layer.{i}", p) for i, p in enumerate(params)])
    run(params, optimizer, range(1))
    members = optimizer.param_groups[0]["params"]
    members.pop() if change == "pop" else members.append(torch.nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="must have an entry for each parameter"):
        run(params, optimizer, range(1, 2))


def test_the_clock_goes_on_where_groups_change_their_order():
    params, _ = make()
    optimizer = Automagic([{"params": [p]} for p in params], context=True)
    for seed in range(3):
        fill(params, seed)
        optimizer.step(loss=torch.ones(()))
    optimizer.param_groups.reverse()
    fill(params, 3)
    optimizer.step(loss=torch.ones(()))
    assert int(optimizer.param_groups[0]["counters"]["applied"]) == 4
    assert "counters" not in optimizer.param_groups[2]


def test_states_are_freed_with_their_optimizer():
    params, optimizer = make()
    run(params, optimizer, range(2))
    states = [weakref.ref(value) for value in optimizer.state[params[0]].values()]
    gc.disable()  # which would wait for memory on a GPU that somebody needs now
    try:
        del optimizer
        assert [state() for state in states] == [None] * 7
    finally:
        gc.enable()


def test_a_step_without_any_gradient_does_nothing():
    _, optimizer = make()
    optimizer.step()
    assert not optimizer.state
    assert optimizer.get_learning_rates() == [pytest.approx(1e-3)]


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 4), (4, 0), (1, 1), (1, 9), (9, 1), (3, 2, 5), (2, 3, 1, 1)], ids=str
)
@pytest.mark.matrix("T5")
def test_odd_shapes_step(shape):
    params, optimizer = make((shape, (8, 8)))
    run(params, optimizer, range(3))
    assert all(bool(p.isfinite().all()) for p in params)
    optimizer.load_state_dict(save_and_load(optimizer))
    run(params, optimizer, range(3))


def test_memory_layout_does_not_matter():
    contiguous, optimizer = make(((8, 4, 3, 3), (16, 24)))
    twisted = [
        torch.nn.Parameter(contiguous[0].detach().to(memory_format=torch.channels_last)),
        torch.nn.Parameter(contiguous[1].detach().T.contiguous().T),
    ]
    other = Automagic(twisted)
    for seed in range(4):
        fill(contiguous, seed)
        for p, q in zip(contiguous, twisted, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert all(map(torch.equal, contiguous, twisted))


def test_an_empty_group_is_no_trouble():
    params, _ = make()
    optimizer = Automagic([{"params": params}, {"params": []}])
    run(params, optimizer, range(2))
    assert len(optimizer.get_learning_rates()) == 2
    optimizer.load_state_dict(save_and_load(optimizer))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_Ir": 1e-3}, TypeError, "did you mean 'max_lr'"),
        ({"lr": -1.0}, ValueError, "lr must be between 0 and inf, got -1.0"),
        ({"betas": (0.9, 0.99)}, ValueError, "betas must hold three numbers"),
        ({"betas": (0.9, 1.0, 0.999)}, ValueError, "betas must be between"),
        ({"block_size": 100}, ValueError, "power of two from 32 to 4096, got 100"),
        ({"codec": "softsing"}, TypeError, "did you mean 'softsign'"),
        ({"eps": (1e-30, 0.0, 1e-8)}, ValueError, "eps must be between 1e-30 and inf, got 0.0"),
        ({"came_mode": "paper", "betas": (0.0, 0.9, 0.9)}, ValueError, "'paper' needs a first beta above 0"),
        ({"min_lr": 1e-2}, ValueError, "min_lr must not exceed max_lr"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a number"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_a_sentence(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_parameters_of_other_kinds_are_refused(dtype):
    param = torch.nn.Parameter(torch.zeros(4, 4).to(dtype))
    with pytest.raises(TypeError, match="Automagic steps float32"):
        Automagic([param])


def test_a_start_above_the_rail_is_said_once_with_the_remedy(caplog):
    params, _ = make()
    with caplog.at_level(logging.WARNING):
        Automagic([{"params": params[:1]}, {"params": params[1:]}], lr=1e-2, lr_search=True)
    assert [r.message for r in caplog.records] == [
        "lr 0.01 lies above max_lr 0.001 of role adapter: the run starts at the rail. Raise max_lr to step faster."
    ]


def test_two_optimizers_in_one_process_share_nothing():
    params, optimizer = make()
    alone = copy.deepcopy(params)
    lonely = Automagic(alone)
    others, other = make(lr_granularity="element", lr=1e-3)
    for seed in range(5):
        run(params, optimizer, [seed])
        run(others, other, [seed + 50])
        run(alone, lonely, [seed])
    assert all(map(torch.equal, params, alone))


def test_the_configs_help_tells_every_option():
    for name in vars(AutomagicConfig()):
        assert f"    {name} (default " in AutomagicConfig.__doc__
