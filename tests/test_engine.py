"""The engine computes what the slow reference computes."""

import copy

import pytest
import torch
from came_pytorch import CAME

from hf_automagic import Automagic
from hf_automagic.optim import bucket
from tests.cases import CASES, SHAPES, Case, Twins

CASE_IDS = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.matrix("T21")
def test_matches_the_reference(case: Case):
    twins = Twins(case)
    for step in range(12):
        twins.step(missing=(0, 3) if step == 4 else ())
    errors = twins.errors()
    assert max(errors) < case.tolerance, dict(zip(SHAPES, errors, strict=True))


@pytest.mark.parametrize("case", CASES[:2], ids=CASE_IDS[:2])
def test_matches_the_reference_a_hundred_steps_deep(case: Case):
    twins = Twins(case)
    for _ in range(100):
        twins.step()
    assert max(twins.errors()) < 5 * case.tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_land_on_a_neighbour_of_the_reference(dtype):
    twins = Twins(CASES[0], dtype=dtype)
    for _ in range(8):
        for i, param in enumerate(twins.params):  # rounding must not add up
            reference = twins.reference.params[str(i)]
            reference.matrix = param.detach().double().reshape(reference.matrix.shape).clone()
        twins.step()
        for i, param in enumerate(twins.params):
            target = twins.reference.params[str(i)].value
            spacing = torch.finfo(dtype).eps * target.abs().clamp_min(torch.finfo(dtype).smallest_normal)
            assert bool(((param.detach().double() - target).abs() <= spacing * 1.001 + 1e-9).all())


def _train(steps: int = 20, scale: float = 1.0, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES]
    optimizer = Automagic(params, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3 * scale
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", [{}, {"lr_granularity": "element"}, {"factored": False}], ids=str)
@pytest.mark.parametrize("scale", [2.0**20, 2.0**-20], ids=["larger", "smaller"])
def test_the_gradients_scale_changes_no_bit(options, scale):
    assert all(map(torch.equal, _train(**options), _train(scale=scale, **options)))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"quantize_states": False}, 1e-5),
        # sums in another order may push an element over the edge between two codes
        ({}, 1e-2),
        ({"lr_granularity": "element", "quantize_states": False}, 1e-2),
    ],
    ids=str,
)
def test_a_matrix_swept_in_row_slices_equals_the_whole(options, tolerance, monkeypatch):
    start, whole = _train(steps=0), _train(**options)
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 1024)
    sliced = _train(**options)
    for a, b, origin in zip(whole, sliced, start, strict=True):
        assert float((a - b).norm()) <= tolerance * float((a - origin).norm())


@pytest.mark.matrix("T17")
def test_the_same_inputs_give_the_same_bits():
    assert all(map(torch.equal, _train(), _train()))


def _pair_of_optimizers(reference_class, reference_options, **options):
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in [(8, 64), (7, 33), (64, 8)]]
    theirs = copy.deepcopy(ours)
    optimizer = Automagic(ours, lr=1e-3, self_tuning=False, quantize_states=False, weight_decay=0.01, **options)
    reference = reference_class(theirs, lr=1e-3, weight_decay=0.01, **reference_options)
    return generator, ours, theirs, optimizer, reference


@pytest.mark.parametrize(
    ("reference_class", "reference_options", "options", "steps"),
    [
        (
            torch.optim.AdamW,
            {"betas": (0.9, 0.999), "eps": 1e-8},
            {"momentum_order": "before", "factored": False, "betas": (0.9, 0.999, 0.9999)},
            100,
        ),
        (CAME, {"betas": (0.9, 0.999, 0.9999)}, {"came_mode": "paper", "betas": (0.9, 0.999, 0.9999)}, 20),
    ],
    ids=["torch AdamW", "came-pytorch"],
)
@pytest.mark.matrix("T21")
def test_with_its_features_off_it_is_the_published_optimizer(reference_class, reference_options, options, steps):
    generator, ours, theirs, optimizer, reference = _pair_of_optimizers(reference_class, reference_options, **options)
    for _ in range(steps):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-6


@pytest.mark.parametrize("signal", [0.0, 1.0, 10.0])
def test_no_step_is_longer_than_its_rate(signal):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(s)) for s in [(16, 512), (64, 64), (300,)]]
    optimizer = Automagic(params, lr=1e-4)
    steady = [torch.randn(p.shape, generator=generator) for p in params]
    for _ in range(40):
        before = [p.detach().clone() for p in params]
        for param, mean in zip(params, steady, strict=True):
            param.grad = signal * mean + torch.randn(param.shape, generator=generator)
        optimizer.step()
        rate = optimizer.get_learning_rates()[0]
        for param, old in zip(params, before, strict=True):
            assert float((param.detach() - old).square().mean().sqrt()) <= 1.02 * rate


@pytest.mark.matrix("T6")
def test_the_first_steps_of_a_lora_are_finite_and_leave_A_alone_while_its_gradient_is_zero():
    torch.manual_seed(0)
    A, B = torch.nn.Parameter(torch.randn(8, 64) * 0.1), torch.nn.Parameter(torch.zeros(64, 8))
    optimizer = Automagic([A, B], weight_decay=0.0)
    start, x = A.detach().clone(), torch.randn(32, 64)
    for step in range(10):
        optimizer.zero_grad()
        (x @ A.T @ B.T - x).square().mean().backward()
        optimizer.step()
        if step == 0:
            assert torch.equal(A.detach(), start)
            assert float(B.detach().abs().sum()) > 0
    assert not torch.equal(A.detach(), start)
    assert all(bool(p.isfinite().all()) for p in (A, B))
