"""Stochastic rounding: a neighbour, without bias, the same on every rank, and nothing where nothing is to round."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_automagic.quantization import keys_for, random_bits, random_halves, round_stochastically, step_keys

DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits_for(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return random_halves(torch.tensor([seed]), 0, values.numel()).view(values.shape)


def every_number_of(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 patterns but the NaNs: zeros of both signs, subnormals and infinities among them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[~numbers.isnan()]


@each_dtype
@pytest.mark.parametrize("seed", range(5))
def test_what_the_type_can_hold_is_never_changed(dtype: torch.dtype, seed: int):
    numbers = every_number_of(dtype)
    wide = numbers.to(torch.float32)
    rounded = round_stochastically(wide, dtype, bits_for(wide, seed))
    assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


@each_dtype
@settings(max_examples=200)
@given(value=st.floats(-6e4, 6e4, width=32), seed=st.integers(0, 2**32 - 1))
def test_the_result_is_one_of_the_two_neighbours(dtype: torch.dtype, value: float, seed: int):
    wide = torch.tensor([value])
    rounded = round_stochastically(wide, dtype, bits_for(wide, seed))
    nearest = wide.to(dtype)
    towards = torch.full_like(nearest, torch.inf if nearest.float() < wide else -torch.inf)
    other = nearest if nearest.float() == wide else torch.nextafter(nearest, towards)
    assert rounded in (nearest, other)


@each_dtype
@pytest.mark.parametrize("value", [1 + 1e-4, -1 - 1e-4, 3.14159, 2e-6, -3e-7, 1e-7], ids=str)
def test_the_mean_is_the_value(dtype: torch.dtype, value: float):
    wide = torch.full((200_000,), value)
    rounded = round_stochastically(wide, dtype, bits_for(wide)).double()
    step = rounded.max() - rounded.min()
    assert step > 0
    assert (rounded.mean() - wide[0].double()).abs() < 4 * step * (0.25 / 200_000) ** 0.5


@pytest.mark.parametrize(("value", "expected"), [(65519.0, 65504.0), (-65519.0, -65504.0), (1e6, torch.inf)])
def test_the_end_of_the_range_is_cast_as_usual(value: float, expected: float):
    wide = torch.full((1000,), value)
    assert (round_stochastically(wide, torch.float16, bits_for(wide)) == expected).all()


@each_dtype
def test_nan_and_infinity_pass(dtype: torch.dtype):
    rounded = round_stochastically(torch.tensor([torch.nan, torch.inf, -torch.inf]), dtype, bits_for(torch.ones(3)))
    assert rounded.isnan().tolist() == [True, False, False]
    assert rounded[1:].tolist() == [torch.inf, -torch.inf]


@each_dtype
def test_a_nan_of_any_pattern_stays_one(dtype: torch.dtype):
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(patterns, dtype, torch.full((4,), 0xFFFF, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("draw", [random_bits, random_halves])
def test_draws_depend_on_the_position_alone(draw: Callable[[torch.Tensor, int, int], torch.Tensor]):
    keys = step_keys(3, torch.tensor([0, 7]), torch.tensor([5.0, 5.0]))
    whole = draw(keys, 0, 101)
    pieces = [draw(keys, first, numel) for first, numel in ((0, 33), (33, 40), (73, 0), (73, 27), (100, 1))]
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(draw(keys[1:], 0, 101), whole[1:])


def test_two_neighbours_take_the_halves_of_the_even_ones_bits():
    keys = step_keys(0, torch.arange(2), torch.ones(2))
    bits, halves = random_bits(keys, 0, 100)[:, ::2], random_halves(keys, 0, 100)
    assert torch.equal(halves[:, ::2], bits & 0xFFFF)
    assert torch.equal(halves[:, 1::2], bits >> 16)


def test_every_seed_parameter_step_and_use_draws_anew():
    parameters, steps = torch.arange(50).repeat(50), torch.arange(50.0).repeat_interleave(50)
    keys = torch.cat([step_keys(seed, parameters, steps) for seed in (0, 1)])
    assert len(keys.unique()) == len(keys)
    assert not (keys_for(keys, 1) == keys_for(keys, 2)).any()


def test_random_bits_are_uniform():
    bits = random_bits(step_keys(0, torch.arange(4), torch.ones(4)), 0, 50_000)
    assert (bits.double().mean(1) / 2**31 - 1).abs().max() < 0.01
    for position in range(32):
        assert abs(float((bits >> position & 1).double().mean()) - 0.5) < 0.005
    uncorrelated = torch.corrcoef(bits.double())
    assert (uncorrelated - torch.eye(4)).abs().max() < 0.02


def test_the_draws_of_two_neighbours_are_uniform_and_independent():
    halves = random_halves(step_keys(0, torch.arange(2), torch.ones(2)), 0, 100_000)
    assert int(halves.min()) >= 0
    assert int(halves.max()) < 2**16
    for numbers in (halves, halves & 0x1FFF):  # what bfloat16 and what float16 needs
        ends = numbers.view(2, 50_000, 2).mT.flatten(0, 1).double()  # each parameter's even and odd positions
        assert (ends.mean(1) / ((numbers.max() + 1) / 2) - 1).abs().max() < 0.01
        shares = torch.stack([torch.histc(row, 64) for row in ends]) / (50_000 / 64)
        assert (shares - 1).abs().max() < 0.15  # five deviations
        assert (torch.corrcoef(ends) - torch.eye(4)).abs().max() < 0.02
    for bit in range(16):
        pairs = (halves >> bit & 1).view(-1, 2).double().T
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.015
