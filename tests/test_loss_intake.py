"""Loss intake: however a training loop looks, the context sees each step's loss once, or says once that it cannot."""

import copy
import gc
import logging
import math
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_automagic import Automagic
from hf_automagic.optim.loss_hook import attach_loss_hook, find_loss
from tests.ranks import Ranks


class Model(nn.Module):
    """Returns its loss under a name, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor, num_items_in_batch: int | None = None) -> dict[str, Tensor]:
        errors = (x @ self.weight).square()
        return {"loss": errors.mean() if num_items_in_batch is None else errors.sum() / num_items_in_batch}


class TupleModel(Model):
    """Returns its loss first."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight
        return logits.square().mean(), logits


class NamedModel(Model):
    """Returns its loss as an attribute."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = x @ self.weight
        return SimpleNamespace(loss=logits.square().mean(), logits=logits)


class ScalarModel(Model):
    """Returns nothing but its loss."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).square().mean()


class LogitsModel(Model):
    """Returns no loss."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ self.weight,)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))


def build(model: nn.Module, **options) -> Automagic:
    return Automagic(model.parameters(), **({"lr": 1e-4, "context": True} | options))


def seen(optimizer: Automagic) -> float:
    """The loss that the context saw in the last step."""
    return optimizer.c_optim.history().losses[-1]


def train_step(model: nn.Module, optimizer: Automagic, seed: int = 0) -> float:
    output = model(inputs(seed))
    loss = find_loss(output)
    loss.backward()
    optimizer.step()
    return loss.item()


# handed over


def by_closure(optimizer, loss):
    optimizer.step(lambda: loss)


def by_argument(optimizer, loss):
    optimizer.step(loss=loss)


def by_observation(optimizer, loss):
    optimizer.observe_loss(loss)
    optimizer.step()


@pytest.mark.parametrize("hand_over", [by_closure, by_argument, by_observation])
@pytest.mark.parametrize(
    "loss", [torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.bfloat16), 2.5], ids=repr
)
def test_a_handed_loss_arrives(hand_over, loss):
    model = Model()
    optimizer = build(model)
    model.weight.grad = torch.ones_like(model.weight)
    hand_over(optimizer, loss)
    assert seen(optimizer) == 2.5


def test_a_loss_counts_for_one_step_only():
    model = Model()
    optimizer = build(model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step(loss=torch.tensor(2.5))
    optimizer.step()
    assert math.isnan(seen(optimizer))


def test_handed_micro_batches_are_averaged_and_shares_added_up():
    model = Model()
    optimizer = build(model)
    model.weight.grad = torch.ones_like(model.weight)
    for loss in (1.0, 2.0, 6.0):
        optimizer.observe_loss(torch.tensor(loss))
    optimizer.step()
    assert seen(optimizer) == 3.0
    for loss in (1.0, 2.0, 6.0):
        optimizer.observe_loss(torch.tensor(loss), is_share=True)
    optimizer.step()
    assert seen(optimizer) == 9.0


def test_a_loss_of_many_numbers_is_refused():
    with pytest.raises(ValueError, match=r"one number, got a tensor of shape \(3,\); pass loss.mean\(\)"):
        build(Model()).observe_loss(torch.ones(3))


def test_a_loss_divided_in_place_afterwards_is_seen_as_it_was():
    model = Model()
    optimizer = build(model)
    loss = model(inputs())["loss"]
    value = loss.item()
    optimizer.observe_loss(loss)
    loss.detach().div_(4)
    loss.backward()
    optimizer.step()
    assert seen(optimizer) == value


def test_a_closure_may_return_anything_where_there_is_no_context():
    model = Model()
    optimizer = build(model, context=False)
    model.weight.grad = torch.ones_like(model.weight)
    returned = torch.ones(3)
    assert optimizer.step(lambda: returned) is returned


# the hook


@pytest.mark.parametrize("kind", [Model, TupleModel, NamedModel, ScalarModel])
def test_the_hook_sees_the_loss_of_every_kind_of_output(kind):
    model = kind()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    for seed in range(3):
        assert train_step(model, optimizer, seed) == pytest.approx(seen(optimizer), rel=1e-6)


@pytest.mark.parametrize(
    "output",
    [
        (torch.ones(2, 3), torch.tensor(1.0)),
        (torch.ones(1),),
        torch.ones(4),
        torch.tensor(3),
        {"logits": torch.ones(2)},
        {"loss": None},
        {"loss": torch.ones(0)},
        SimpleNamespace(loss="large"),
        (),
        None,
    ],
    ids=repr,
)
def test_what_is_not_a_loss_is_left_alone(output):
    assert find_loss(output) is None


def test_a_loss_of_each_device_is_averaged():
    assert find_loss({"loss": torch.tensor([1.0, 3.0])}) == 2.0


def test_the_hook_leaves_the_output_as_it_is():
    model, plain = Model(), Model()
    attach_loss_hook(model, build(model))
    assert torch.equal(model(inputs())["loss"], plain(inputs())["loss"])
    assert model(inputs())["loss"].requires_grad


def evaluate(model):
    model.eval()
    model(inputs(1))
    model.train()


def look_without_gradients(model):
    with torch.no_grad():
        model(inputs(1))


def freeze(model):
    model.weight.requires_grad_(False)
    model(inputs(1))
    model.weight.requires_grad_(True)


@pytest.mark.parametrize("pass_by", [evaluate, look_without_gradients, freeze])
def test_passes_that_do_not_train_are_not_counted(pass_by):
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    loss = model(inputs())["loss"]
    pass_by(model)
    loss.backward()
    optimizer.step()
    assert seen(optimizer) == pytest.approx(loss.item())


def test_the_hook_averages_micro_batches():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    losses = [model(inputs(seed))["loss"] for seed in range(3)]
    torch.stack(losses).mean().backward()
    optimizer.step()
    assert seen(optimizer) == pytest.approx(torch.stack(losses).mean().item())


def test_the_hook_adds_up_shares_of_a_batch():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    losses = [model(inputs(seed), num_items_in_batch=60)["loss"] for seed in range(3)]
    torch.stack(losses).sum().backward()
    optimizer.step()
    assert seen(optimizer) == pytest.approx(torch.stack(losses).sum().item())


def test_what_is_handed_over_wins_over_what_the_hook_saw():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    model(inputs())["loss"].backward()
    optimizer.step(loss=torch.tensor(7.0))
    assert seen(optimizer) == 7.0


def test_attaching_twice_counts_once_and_removing_ends_it():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    handle = attach_loss_hook(model, optimizer)
    assert len(model._forward_hooks) == 1
    handle.remove()
    train_step(model, optimizer)
    assert math.isnan(seen(optimizer))
    attach_loss_hook(model, optimizer)
    assert train_step(model, optimizer) == pytest.approx(seen(optimizer))


def test_several_models_and_optimizers_share_nothing():
    models = [Model(), Model()]
    optimizers = [build(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        attach_loss_hook(model, optimizer)
    losses = [model(inputs(seed))["loss"] for seed, model in enumerate(models)]
    for loss in losses:
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [seen(optimizer) for optimizer in optimizers] == pytest.approx([loss.item() for loss in losses])


def test_one_model_may_show_its_loss_to_two_optimizers():
    model = nn.Module()
    model.first, model.second = Model(), Model()
    model.forward = lambda x: {"loss": model.first(x)["loss"] + model.second(x)["loss"]}
    optimizers = [build(model.first), build(model.second)]
    for optimizer in optimizers:
        attach_loss_hook(model, optimizer)
    loss = model(inputs())["loss"]
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        assert seen(optimizer) == pytest.approx(loss.item())


def test_model_and_optimizer_do_not_keep_each_other_alive():
    gc.disable()
    try:
        model = Model()
        parameters = list(model.parameters())
        optimizer = Automagic(parameters, lr=1e-4, context=True)
        attach_loss_hook(model, optimizer)
        train_step(model, optimizer)
        watched_model, watched_optimizer = weakref.ref(model), weakref.ref(optimizer)
        del optimizer
        assert watched_optimizer() is None
        model(inputs())["loss"].backward()
        other = Automagic(parameters, lr=1e-4, context=True)
        attach_loss_hook(model, other)
        del model
        assert watched_model() is None
        assert len(other.loss_intake.hooks) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_not_listened_to(duplicate):
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    loss = model(inputs())["loss"]
    twin = duplicate(model)
    twin(inputs(1))["loss"].backward()
    loss.backward()
    optimizer.step()
    assert seen(optimizer) == pytest.approx(loss.item())

    own = build(twin)
    attach_loss_hook(twin, own)
    assert train_step(twin, own, seed=2) == pytest.approx(seen(own))
    assert len(optimizer.c_optim.history().losses) == 1


def test_the_hook_survives_loading_a_checkpoint():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    train_step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert train_step(model, optimizer, seed=1) == pytest.approx(seen(optimizer))
    attach_loss_hook(model, optimizer)
    assert len(model._forward_hooks) == 1


def test_a_compiled_model_shows_its_loss():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    compiled = torch.compile(model, backend="eager")
    for micro_batches in (1, 1, 2, 3):
        losses = [compiled(inputs(seed))["loss"] for seed in range(micro_batches)]
        torch.stack(losses).mean().backward()
        optimizer.step()
        assert seen(optimizer) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_model_that_is_never_stepped_piles_nothing_up():
    model = Model()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    for _ in range(20):
        model(inputs())
    gc.collect()
    held = [o for o in gc.get_referents(*gc.get_referents(optimizer.loss_intake)) if isinstance(o, Tensor)]
    assert len(held) <= 1


@pytest.mark.parametrize("stranger", [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), None], ids=repr)
def test_the_hook_wants_an_automagic(stranger):
    with pytest.raises(TypeError, match="attach_loss_hook needs an Automagic"):
        attach_loss_hook(Model(), stranger)


# without a loss


def test_a_missing_loss_is_said_once(caplog):
    model = LogitsModel()
    optimizer = build(model)
    attach_loss_hook(model, optimizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            model(inputs())[0].sum().backward()
            optimizer.step()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "context is on and this step saw no loss"
    ]
    assert optimizer.c_optim.compute_gradient_consistency() > 0


def test_nothing_is_said_where_the_loss_arrives_or_no_context_asks(caplog):
    model = Model()
    with caplog.at_level(logging.WARNING):
        optimizer = build(model)
        attach_loss_hook(model, optimizer)
        train_step(model, optimizer)
        train_step(model, build(model, context=False))
    assert caplog.records == []


# many ranks


@pytest.mark.parametrize(
    ("own", "total", "count", "expected"), [(2.0, 6.0, 2.0, 3.0), (None, 5.0, 1.0, 5.0), (None, 0.0, 0.0, math.nan)]
)
def test_ranks_average_their_losses_and_a_silent_one_takes_part(monkeypatch, own, total, count, expected):
    contributions = []

    def all_reduce(pair):
        contributions.append(pair.tolist())
        pair.copy_(torch.tensor([total, count]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    model = Model()
    optimizer = build(model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step(loss=None if own is None else torch.tensor(own))
    assert contributions == [[own or 0.0, float(own is not None)]]
    assert seen(optimizer) == pytest.approx(expected, nan_ok=True)
    build(model, context=False).step(loss=torch.tensor(1.0))
    assert len(contributions) == 1


def losses_of_a_rank() -> tuple[float, ...]:
    rank, model = torch.distributed.get_rank(), Model()
    optimizer = build(model)
    for t in range(4):
        model.weight.grad = torch.ones_like(model.weight)
        loss = torch.tensor(float(t + 10 * rank)) if (t, rank) in {(0, 0), (0, 1), (1, 1)} else None
        if t == 3:
            loss, model.weight.grad = torch.tensor(1.0), None if rank else model.weight.grad
        optimizer.step(loss=loss)
    return optimizer.c_optim.history().losses


@pytest.mark.slow
def test_two_ranks_agree_on_the_loss_and_none_waits_for_ever():
    ranks = Ranks(2)
    try:
        first, second = ranks.run(losses_of_a_rank)
    finally:
        ranks.stop()
    assert first == pytest.approx((5.0, 11.0, math.nan, 1.0), nan_ok=True)
    assert second == pytest.approx(first[:3], nan_ok=True)


def test_a_loaders_trial_step_at_rate_zero_needs_no_loss(caplog):
    """Torch's distributed checkpoints take such a step before they load."""
    model = Model()
    optimizer = build(model)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert caplog.records == []
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert len(caplog.records) == 1
