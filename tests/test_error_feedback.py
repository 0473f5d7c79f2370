"""Error feedback keeps what rounding takes and gives it back: e <- e + x - Q(x + e), four bits an element."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_automagic.quantization import Affine, Codec, Dynamic, EncodeContext, Softsign, WithFeedback
from hf_automagic.quantization.feedback import pack_nibbles, unpack_nibbles
from tests.cases import TUNED, Case, Twins
from tests.reference import codecs as reference

CODECS = [Softsign(64), Affine(64), Dynamic(64)]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
NO_DRAWS: Callable[[int], torch.Tensor] = functools.partial(torch.zeros, 1)


def at(fields: dict[str, torch.Tensor], step: int) -> EncodeContext:
    return EncodeContext(fields, torch.tensor([float(step)]), NO_DRAWS)


@settings(max_examples=50)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=41))
def test_nibbles_survive_packing(numbers: list[int]):
    values = torch.tensor([numbers, numbers[::-1]], dtype=torch.int8)
    packed = pack_nibbles(values)
    assert packed.shape[-1] == -(-len(numbers) // 2)
    assert torch.equal(unpack_nibbles(packed, len(numbers)), values)


@pytest.mark.parametrize(("cols", "expected"), [(8, 4), (7, 4), (1, 1)])
def test_the_residual_takes_half_a_byte_an_element(cols: int, expected: int):
    assert WithFeedback(Softsign(128), 100).fields((3, cols))["residual"] == ((3, expected), torch.uint8)


@each_codec
def test_residual_is_what_rounding_took(codec: Codec):
    kept = WithFeedback(codec, 100)
    x = torch.randn(2, 5, 77)
    fields = kept.encode(x)
    for step in range(1, 20):
        before = kept.residual(fields)
        x = x + 0.01 * torch.randn_like(x)
        fields = kept.encode(x, at(fields, step))
        expected = before + x - kept.decode(fields)
        unit = kept.spacing(fields) / 15
        assert ((kept.residual(fields) - expected).abs() <= 0.51 * unit + 2e-4 * x.abs().amax()).all()


def test_it_is_the_reference():
    kept = WithFeedback(Softsign(64), 1000)
    x = torch.randn(1, 6, 100)
    fields, error = kept.encode(x), reference.encode_with_feedback(x[0], torch.zeros(6, 100), 64)[1]
    for step in range(1, 6):
        x = x + 0.1 * torch.randn_like(x)
        fields = kept.encode(x, at(fields, step))
        decoded, error = reference.encode_with_feedback(x[0], error, 64)
        assert torch.allclose(kept.decode(fields)[0], decoded, atol=1e-6)
        assert torch.allclose(kept.residual(fields)[0], error, atol=1e-6)


@each_codec
def test_it_is_dropped_every_so_many_steps(codec: Codec):
    kept = WithFeedback(codec, 3)
    x = torch.randn(1, 5, 77)
    fields = kept.encode(x)
    seen = []
    for step in range(1, 7):
        fields = kept.encode(x, at(fields, step))
        seen.append(bool(kept.residual(fields).any()))
    assert seen == [True, True, False, True, True, False]


def displacement_error(codec: Codec | None, steps: int = 100, beta: float = 0.9) -> float:
    """Sums up momenta that went through a code in every step; relative to exact ones. None for bfloat16."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(16, 512, generator=generator).exp()
    exact = walked = torch.zeros(16, 512, dtype=torch.float64)
    displacement = torch.zeros_like(walked)
    stored = torch.zeros(1, 16, 512)
    fields = codec.encode(stored) if codec else {}
    for step in range(1, steps + 1):
        update = torch.randn(16, 512, generator=generator) * spread
        exact = beta * exact + (1 - beta) * update
        walked = walked + exact
        momentum = torch.lerp(codec.decode(fields) if codec else stored, update, 1 - beta)
        displacement = displacement + momentum[0]
        if codec:
            fields = codec.encode(momentum, at(fields, step))
        stored = momentum.to(torch.bfloat16).to(torch.float32)
    return float((displacement - walked).norm() / walked.norm())


def test_weights_end_ten_times_closer_and_closer_than_with_bfloat16():
    with_feedback = displacement_error(WithFeedback(Softsign(128), 10_000))
    assert with_feedback < 0.1 * displacement_error(Softsign(128))
    assert with_feedback < 0.5 * displacement_error(None)


def test_the_engine_computes_what_the_reference_computes():
    options = {"error_correction": True, "sync_frequency": 4}
    twins = Twins(Case("feedback", options, TUNED | options, tolerance=2e-3))
    for _ in range(12):
        twins.step()
    assert max(twins.errors()) < 2e-3
