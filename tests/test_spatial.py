"""Spatial terms (stage 4): filters where an axis has neighbours, and not one bit anywhere else."""

import logging
import math

import pytest
import torch

from hf_automagic.optim import bucket
from hf_automagic.optim.recipes import build_chain
from hf_automagic.transforms.spatial import (
    DampBackground,
    Kernel,
    PenaliseFrequencies,
    SuppressEdges,
    WeightRowsByVariance,
    spatial_axes,
)
from tests.reference import spatial as slow
from tests.stage_cases import (
    NoHostReads,
    check_against_reference,
    context,
    engine,
    gradients,
    noise,
    run_engine,
    run_in_pieces,
    run_one,
    start,
    take_step,
)

ALL_ON = {
    "edge_suppression": True,
    "frequency_penalty": 0.05,
    "background_regularization": True,
    "spatial_awareness": True,
}
EACH = [
    {"edge_suppression": True, "edge_penalty": 0.7},
    {"frequency_penalty": 0.5},
    {"background_regularization": True},
    {"spatial_awareness": True, "detail_preservation": 0.2},
    {**ALL_ON, "detail_preservation": 0.2},
]
KERNELS = {"square": (6, 4, 3, 3), "odd": (5, 3, 5, 7), "cube": (4, 2, 3, 4, 3), "linear": (7, 33)}
UNORDERED = {
    "linear": (7, 33),
    "a": (4, 30),
    "b": (20, 4),
    "experts": (3, 8, 8),
    "pointwise": (6, 4, 1, 1),
    "bias": (17,),
}


def stacked(shape: tuple[int, ...], seed: int = 0, n: int = 2) -> torch.Tensor:
    """Draws a stack of kernels as matrices [n, rows, cols]."""
    return noise(n, shape[0], math.prod(shape[1:]), seed=seed)


# equal to their formulas


@pytest.mark.parametrize("options", EACH, ids=lambda o: "+".join(o))
def test_optimizer_equals_the_reference(options):
    check_against_reference(KERNELS, options)


@pytest.mark.parametrize("options", EACH, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("axes", [(0,), (0, 1), (1,)], ids=str)
def test_declared_axes_equal_the_reference(options, axes):
    check_against_reference({"positions": (12, 9)}, {**options, "spatial_axes": axes})


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 2, 3, 3), (2, 3)), ((3, 2, 5, 8), (2, 3)), ((4, 6, 7), (2,)), ((9, 5), (0,)), ((6,), (0,))],
    ids=str,
)
def test_smoothing_solves_the_stencil(shape, axes, sigma):
    """(I - sigma Lap) y = x, applied back to the result, along one axis after another."""
    x = stacked(shape)
    y, _ = run_one(SuppressEdges(Kernel(shape, axes), sigma, 0.0), x, {}, context(x))
    back = y.reshape(-1, *shape)
    for axis in axes:
        back = back - sigma * slow.laplacian(back, (axis + 1,))
    assert (back.reshape(x.shape) - x).abs().max() < 1e-12


@pytest.mark.parametrize("strength", [0.05, 1.0])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 2, 3, 3), (2, 3)), ((3, 2, 5, 8), (2, 3)), ((4, 2, 3, 4, 3), (2, 3, 4)), ((9, 5), (0,))],
    ids=str,
)
def test_frequency_penalty_is_the_full_transform(shape, axes, strength):
    x = stacked(shape)
    y, _ = run_one(PenaliseFrequencies(Kernel(shape, axes), strength), x, {}, context(x))
    for one, filtered in zip(x, y, strict=True):
        expected = slow.penalise_frequencies(one.reshape(shape), axes, strength)
        assert (filtered.reshape(shape) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_smoothing_leaves_the_known_share_of_noise(sigma):
    """The variance factor of LSGD, (1 + 2 sigma) / (1 + 4 sigma)^(3/2): 0.268 at sigma = 1."""
    x = noise(1, 3000, 64)
    y, _ = run_one(SuppressEdges(Kernel((3000, 64), (1,)), sigma, 0.0), x, {}, context(x))
    assert (y.var() / x.var()).item() == pytest.approx((1 + 2 * sigma) / (1 + 4 * sigma) ** 1.5, rel=0.02)


def test_three_taps_smooth_as_the_transform_does():
    """On three taps the closed form d <- mean + (d - mean) / (1 + 3 sigma) is the filter itself."""
    x = noise(5, 3)
    gain = 1 / (1 + 2 * 0.8 * (1 - torch.cos(2 * math.pi * torch.fft.fftfreq(3, dtype=torch.float64))))
    expected = torch.fft.ifft(torch.fft.fft(x, dim=1) * gain, dim=1).real
    y, _ = run_one(SuppressEdges(Kernel((5, 3), (1,)), 0.8, 0.0), x[None], {}, context(x[None]))
    assert (y[0] - expected).abs().max() < 1e-12


def test_background_and_awareness_are_their_formulas():
    d, m, g = stacked((7, 4, 3, 3)), stacked((7, 4, 3, 3), seed=1), 10 * stacked((7, 4, 3, 3), seed=2)
    damped, _ = run_one(DampBackground(), d, {"exp_avg": m}, context(g))
    weighted, changed = run_one(
        WeightRowsByVariance(0.99, 0.3), d, {"spatial_variance": torch.rand(2, 7).double()}, context(g)
    )
    for i in range(2):
        assert (damped[i] - d[i] * slow.background_weights(m[i])[:, None]).abs().max() < 1e-12
        weights = slow.awareness_weights(changed["spatial_variance"][i], 0.3)
        assert (weighted[i] - d[i] * weights[:, None]).abs().max() < 1e-12


# in the documented direction


def roughness(x: torch.Tensor, shape: tuple[int, ...]) -> float:
    return (slow.laplacian(x.reshape(shape), (2, 3)).norm() / x.norm()).item()


def test_larger_penalties_are_smoother():
    shape = (6, 4, 5, 5)
    x = stacked(shape, n=1)
    edges = [
        run_one(SuppressEdges(Kernel(shape, (2, 3)), s, 0.0), x, {}, context(x))[0] for s in (0.0, 0.1, 1.0, 10.0)
    ]
    bands = [
        run_one(PenaliseFrequencies(Kernel(shape, (2, 3)), s), x, {}, context(x))[0] for s in (0.0, 0.1, 1.0, 10.0)
    ]
    for smoothed in (edges, bands):
        found = [roughness(y[0], shape) for y in smoothed]
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0] / 2
        assert (smoothed[0] - x).abs().max() < 1e-12


def test_only_what_is_rougher_than_the_threshold_is_smoothed():
    shape = (4, 2, 8, 8)
    wave = torch.sin(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)
    smooth = (wave[:, None] + 2 + torch.zeros(4, 2, 8, 8)).reshape(4, -1)
    x = torch.stack([smooth, noise(4, 128)])
    y, changed = run_one(SuppressEdges(Kernel(shape, (2, 3)), 0.5, 0.6), x, {}, context(x))
    assert torch.equal(y[0], x[0])
    assert not torch.equal(y[1], x[1])
    assert changed["edge_roughness"].tolist() == pytest.approx([roughness(one, shape) for one in x])
    assert torch.equal(run_one(SuppressEdges(Kernel(shape, (2, 3)), 0.5, 9.0), x, {}, context(x))[0], x)


def test_what_is_constant_over_a_kernel_passes():
    shape = (3, 2, 3, 5)
    x = noise(1, 6, 1).expand(1, 6, 15).reshape(1, 3, 30)
    for transform in (
        SuppressEdges(Kernel(shape, (2, 3)), 1.0, -1.0),
        PenaliseFrequencies(Kernel(shape, (2, 3)), 1.0),
    ):
        assert (run_one(transform, x, {}, context(x))[0] - x).abs().max() < 1e-12


def test_the_fastest_alternation_is_halved_at_one():
    x = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64).expand(1, 3, 8)
    y, _ = run_one(PenaliseFrequencies(Kernel((3, 8), (1,)), 1.0), x, {}, context(x))
    assert (y - x / 2).abs().max() < 1e-12


def test_weak_filters_step_shorter_and_calm_ones_longer():
    d, m = torch.ones(1, 5, 36, dtype=torch.float64), noise(1, 5, 36)
    m[0, 0] *= 1e-3
    m[0, 4] *= 1e3
    weight = run_one(DampBackground(), d, {"exp_avg": m}, context(d))[0][0, :, 0]
    assert weight[0] == pytest.approx(0.5, abs=1e-3)
    assert weight[4] == 1.0
    assert ((weight >= 0.5) & (weight <= 1.0)).all()
    g, state = m, {"spatial_variance": torch.zeros(1, 5, dtype=torch.float64)}
    for preservation, (calm, torn) in [(0.0, (2.0, 0.5)), (0.8, (1.2, 0.9)), (1.0, (1.0, 1.0))]:
        weight = run_one(WeightRowsByVariance(0.99, preservation), d, state, context(g))[0][0, :, 0]
        assert weight[0] == pytest.approx(calm)
        assert weight[4] == pytest.approx(torn)


def test_rows_without_any_gradient_stay_finite():
    zeros = torch.zeros(1, 5, 9, dtype=torch.float64)
    for transform in (
        DampBackground(),
        WeightRowsByVariance(0.99, 0.0),
        SuppressEdges(Kernel((5, 3, 3), (1, 2)), 1.0, 0.1),
    ):
        state = {"exp_avg": zeros, "spatial_variance": zeros[:, :, 0]}
        assert torch.equal(run_one(transform, zeros, state, context(zeros))[0], zeros)


@pytest.mark.parametrize("power", [20, -20])
def test_the_gradient_scale_changes_no_bit(power):
    optimizers = [engine({name: w.float() for name, w in start(KERNELS).items()}, **ALL_ON) for _ in range(2)]
    for grads in gradients(KERNELS, 4):
        for (optimizer, params), factor in zip(optimizers, (1.0, 2.0**power), strict=True):
            take_step(optimizer, params, {name: factor * g.float() for name, g in grads.items()})
    (_, plain), (_, scaled) = optimizers
    assert all(torch.equal(plain[name], scaled[name]) for name in KERNELS)


# nowhere else


def test_axes_with_neighbours():
    assert spatial_axes((6, 4, 3, 3)) == (2, 3)
    assert spatial_axes((6, 4, 1, 3)) == (3,)
    assert spatial_axes((6, 4, 1, 1)) == ()
    assert spatial_axes((6, 4, 3, 3), (3,)) == (3,)
    assert spatial_axes((7, 33), (0,)) == (0,)
    assert spatial_axes((7, 33), (2,)) == ()
    for shape in UNORDERED.values():
        assert spatial_axes(shape) == ()


def test_without_neighbours_no_bit_changes():
    optimizers = []
    for options in ({}, ALL_ON):
        optimizer, params = engine({name: w.float() for name, w in start(UNORDERED).items()}, **options)
        for grads in gradients(UNORDERED, 4):
            take_step(optimizer, params, grads)
        optimizers.append((optimizer, params))
    (plain, left), (spatial, right) = optimizers
    for name in UNORDERED:
        assert torch.equal(left[name], right[name])
        assert plain.state[left[name]].keys() == spatial.state[right[name]].keys()
    assert build_chain(plain.config, True, (7, 33)) == build_chain(spatial.config, True, (7, 33))


def test_permuting_a_linear_permutes_its_update_and_nothing_else():
    rows, cols = torch.randperm(7, generator=torch.Generator().manual_seed(1)), torch.arange(33).flip(0)
    shapes = {"w": (7, 33)}
    options = {**ALL_ON, "cautious": True, "weight_decay": 0.1, "momentum_scales": (1, 5), "self_tuning": True}
    straight, params = engine(start(shapes), **options)
    permuted, others = engine({"w": start(shapes)["w"][rows][:, cols]}, **options)
    for grads in gradients(shapes, 6):
        take_step(straight, params, grads)
        take_step(permuted, others, {"w": grads["w"][rows][:, cols]})
    assert (params["w"][rows][:, cols] - others["w"]).abs().max() < 1e-8
    for name, value in straight.state[params["w"]].items():
        pick = {
            (7, 33): lambda t: t[rows][:, cols],
            (7,): lambda t: t[rows],
            (33,): lambda t: t[cols],
            (): lambda t: t,
        }
        expected = pick[tuple(value.shape)](value)
        assert torch.allclose(expected, permuted.state[others["w"]][name], rtol=1e-5, atol=1e-9), name


def test_where_it_acts_is_said_once(caplog):
    with caplog.at_level(logging.INFO, "hf_automagic"):
        optimizer, params = engine(start(KERNELS), **ALL_ON)
        for grads in gradients(KERNELS, 2):
            take_step(optimizer, params, grads)
    said = [record.getMessage() for record in caplog.records if "edge_suppression" in record.getMessage()]
    assert len(said) == 1
    assert "on 3 of 4 parameters" in said[0]


# in pieces, and without asking the device


@pytest.mark.parametrize("height", [1, 2, 4])
@pytest.mark.parametrize(
    "transform",
    [
        SuppressEdges(Kernel((7, 4, 3, 3), (2, 3)), 0.5, 0.6),
        PenaliseFrequencies(Kernel((7, 4, 3, 3), (2, 3)), 0.5),
        DampBackground(),
        WeightRowsByVariance(0.99, 0.2),
    ],
    ids=lambda t: type(t).__name__,
)
def test_slices_of_rows_equal_the_whole(transform, height):
    d, g = stacked((7, 4, 3, 3)), stacked((7, 4, 3, 3), seed=1)
    state = {"exp_avg": stacked((7, 4, 3, 3), seed=2), "spatial_variance": torch.rand(2, 7, dtype=torch.float64)}
    whole, _ = run_one(transform, d, state, context(g))
    assert (whole - d).abs().max() > 1e-3
    assert (run_in_pieces(transform, d, state, context(g), height) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("axes", [(), (0,)], ids=str)
def test_a_chain_swept_in_pieces_equals_the_whole(monkeypatch, axes):
    """A filter across rows cannot be swept in pieces, and is not."""
    options = {**ALL_ON, "detail_preservation": 0.2, "spatial_axes": axes}
    whole = run_engine(KERNELS, **options)
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 4 * 36 * 2)
    pieces = run_engine(KERNELS, **options)
    for name in KERNELS:
        assert (pieces[name] - whole[name]).abs().max() < 1e-6


def test_no_step_reads_the_device():
    shapes = {**KERNELS, "a": (4, 30), "b": (20, 4)}
    options = {"cautious": True, "allora": True, "momentum_scales": (1, 5), "weight_decay": 0.1, "self_tuning": True}
    optimizer, params = engine(start(shapes), weight_decay_mode="selective", **ALL_ON, **options)
    for grads in gradients(shapes, 3):
        with NoHostReads():
            take_step(optimizer, params, grads)
    with pytest.raises(AssertionError, match="reads the device"), NoHostReads():
        params["a"].sum().item()


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu_and_it_ends_where_the_cpu_ends():
    shapes = {**KERNELS, "a": (4, 30), "b": (20, 4)}
    options = {"cautious": True, "allora": True, "momentum_scales": (1, 5), "weight_decay": 0.1, **ALL_ON}
    expected = run_engine(shapes, weight_decay_mode="selective", **options)
    weights = {name: weight.cuda() for name, weight in start(shapes).items()}
    optimizer, params = engine(weights, weight_decay_mode="selective", **options)
    for t, grads in enumerate(gradients(shapes, 12)):
        for name, param in params.items():
            param.grad = grads[name].cuda()
        torch.cuda.set_sync_debug_mode("error" if t else "default")  # the first step allocates
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in shapes:
        assert (params[name].cpu() - expected[name]).abs().max() < 1e-6
