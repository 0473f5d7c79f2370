"""The codes lose no more than their formulas say, and keep zeros."""

import pytest
import torch
from torch import Tensor

from . import codecs
from .runs import noise


def relative_error(x: Tensor, decoded: Tensor) -> float:
    return ((x - decoded).norm() / x.norm()).item()


@pytest.mark.parametrize(("kind", "bound"), [("gaussian", 0.0060), ("laplace", 0.0070)])
def test_softsign_loses_little_at_block_128(kind, bound):
    x = noise(20, 1280)
    if kind == "laplace":
        x = x.sign() * torch.empty_like(x).exponential_(generator=torch.Generator().manual_seed(1))
    codes, scale = codecs.encode_softsign(x, 128)
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.float16, (20, 10))
    assert relative_error(x, codecs.decode_softsign(codes, scale, 128)) <= bound


@pytest.mark.parametrize("shape", [(3, 5), (2, 128), (3, 130), (1, 1), (2, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softsign_codes_are_stable_and_keep_zeros(shape, dtype):
    x = noise(*shape).to(dtype)
    x[0, 0] = 0
    codes, scale = codecs.encode_softsign(x, 128)
    decoded = codecs.decode_softsign(codes, scale, 128, dtype)
    assert decoded[0, 0] == 0
    assert relative_error(x, decoded) < 0.01 or x.numel() == 1
    again, _ = codecs.encode_softsign(decoded, 128)
    assert (
        again.int() - codes.int()
    ).abs().max() <= 1  # fp16 may round the scale down, then the block's maximum shrinks
    assert codecs.encode_softsign(x * 2.0**-20, 128)[1].max() == 0


def test_affine_codes_are_exact_on_constant_blocks_and_within_half_a_level_elsewhere():
    x = torch.cat([torch.full((64,), 0.1), noise(100).float()])
    codes, scale, zero = codecs.encode_affine(x, 64)
    decoded = codecs.decode_affine(codes, scale, zero, 64)
    assert torch.equal(decoded[:64], x[:64])
    assert ((decoded - x).abs().split(64)[1] <= 0.5001 * scale[1]).all()
    assert len(scale) == 3


def test_log_codes_keep_zeros_and_twelve_decades():
    x = 10.0 ** torch.linspace(-8, 4, 500, dtype=torch.float64)
    x[7] = 0
    x = torch.cat([x, torch.full((20_000,), 1.0, dtype=torch.float64)])
    codes, scale = codecs.encode_log16(x)
    decoded = codecs.decode_log16(codes, scale)
    assert (decoded[7], codes.max() <= 65535, codes.min()) == (0, True, 0)
    assert (decoded / x - 1)[x > 0].abs().max() < 2 ** (48 / 65534 / 2) - 1 + 1e-9
    assert codecs.decode_log16(*codecs.encode_log16(torch.zeros(5))).tolist() == [0.0] * 5


def test_error_feedback_returns_later_what_it_lost():
    """The mean of many encodings of one tensor converges to it; without feedback the same error stays for ever."""
    x = noise(4, 128)
    error, total = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(50):
        decoded, error = codecs.encode_with_feedback(x, error, 128)
        total += decoded
    plain, _ = codecs.encode_with_feedback(x, torch.zeros_like(x), 128)
    assert relative_error(x, total / 50) < 0.1 * relative_error(x, plain)
