"""Every codec keeps its promises on every tensor: bounded error, exact zeros, signs, order, and codes that stay."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_automagic.quantization import (
    CODECS,
    Affine,
    Codec,
    Dynamic,
    EncodeContext,
    Log16,
    Softsign,
    WithFeedback,
    dequantize,
    make_codec,
    quantize,
    random_bits,
    register_codec,
)
from tests.reference import codecs as reference

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec and what it promises.

    Args:
        slack: error beyond half the spacing, relative to a block's largest magnitude.
        least: magnitude of a row below which nothing is promised.
    """

    name: str
    codec: Codec
    slack: float = 1e-6
    least: float = 1e-30
    keeps_zero: bool = True
    signed: bool = True


CASES = [
    Case("softsign", Softsign(BLOCK), slack=2**-11, least=2**-13),
    Case("affine", Affine(BLOCK), keeps_zero=False),
    Case("dynamic", Dynamic(BLOCK), slack=2 / 65535),
    Case("log16", Log16(), signed=False),
    Case("softsign with feedback", WithFeedback(Softsign(BLOCK), 100), slack=2**-11, least=2**-13),
]
few_examples = settings(max_examples=40)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_registered_codec_is_tested():
    assert set(CODECS) == {"softsign", "affine", "dynamic"} == {case.name for case in CASES[:3]}


numbers = st.one_of(
    st.floats(-6e4, 6e4, width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, 1.0, -1.0, 2**-14, -(2**-20)])
)


@st.composite
def matrices(draw: Callable) -> torch.Tensor:
    """Rows of any length, ragged last blocks among them: plain numbers, or heavy-tailed noise between zeros."""
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 80))
    if draw(st.booleans()):
        few = draw(st.lists(numbers, min_size=1, max_size=12))
        return torch.tensor([few[i % len(few)] for i in range(rows * cols)]).view(rows, cols)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    noise = torch.randn(rows, cols, generator=generator) ** 3 * 10.0 ** draw(st.integers(-2, 2))
    return noise * (torch.rand(rows, cols, generator=generator) > draw(st.sampled_from([0.0, 0.5, 0.95])))


def stacked(x: torch.Tensor, case: Case) -> torch.Tensor:
    return (x if case.signed else x.abs())[None]


def block_max(x: torch.Tensor, case: Case) -> torch.Tensor:
    """The largest magnitude of each element's block; of its row where the code has no blocks."""
    size = BLOCK if case.signed else x.shape[-1]
    return torch.cat([part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.split(size, -1)], -1)


@each_case
@few_examples
@given(x=matrices())
def test_error_stays_below_half_the_spacing(case: Case, x: torch.Tensor):
    x = stacked(x, case)
    fields = case.codec.encode(x)
    decoded, largest = case.codec.decode(fields), block_max(x, case)
    bound = 0.505 * case.codec.spacing(fields) + case.slack * largest + (largest < case.least) * case.least
    bound = bound + largest * 2.0**-31 * x.shape[-1]  # log16 raises what lies 32 octaves below its scale
    assert ((decoded - x).abs() <= bound).all()


@each_case
@few_examples
@given(x=matrices())
@pytest.mark.matrix("T20")
def test_zero_maps_to_zero(case: Case, x: torch.Tensor):
    x = stacked(x, case)
    decoded = case.codec.decode(case.codec.encode(x))
    if case.keeps_zero:
        assert (decoded[x == 0] == 0).all()
    all_zero = block_max(x, case) == 0
    assert (decoded[all_zero] == 0).all()


@each_case
@few_examples
@given(x=matrices())
def test_no_sign_is_turned(case: Case, x: torch.Tensor):
    x = stacked(x, case)
    decoded = case.codec.decode(case.codec.encode(x))
    allowed = 0 if case.keeps_zero else 2 * block_max(x, case) / 255  # the affine code has no zero to stop at
    assert ((decoded * x.sign() >= 0) | (x.abs() <= allowed)).all()


@each_case
@few_examples
@given(x=matrices())
def test_order_within_a_block_is_kept(case: Case, x: torch.Tensor):
    x = stacked(x, case)
    decoded = case.codec.decode(case.codec.encode(x))
    for original, stored in zip(x.split(BLOCK, -1), decoded.split(BLOCK, -1), strict=True):
        in_order = stored.gather(-1, original.argsort(dim=-1, stable=True))
        assert (in_order.diff(dim=-1) >= 0).all()


@each_case
@few_examples
@given(x=matrices())
def test_encoding_what_was_decoded_changes_nothing(case: Case, x: torch.Tensor):
    once = case.codec.encode(stacked(x, case))
    values = case.codec.decode(once)
    twice = case.codec.encode(values)
    if case.name == "affine":  # its codes stay, its float32 range may move by an ulp
        largest = block_max(values, case)
        assert ((case.codec.decode(twice) - values).abs() <= 1e-6 * largest).all()
    elif (
        case.name == "dynamic"
    ):  # the table holds no -1, and bitsandbytes' look-up is coarser than the table near zero
        kept = block_max(values, case) == block_max(stacked(x, case), case)
        seen = values.abs() > 1e-4 * block_max(values, case)
        assert (case.codec.decode(twice) == values)[kept & seen].all()
    else:
        assert (case.codec.decode(twice) == values).all()
        assert all((twice[name] == once[name]).all() for name in once if name != "residual")


@each_case
@few_examples
@given(x=matrices(), power=st.integers(-8, 8))
@pytest.mark.matrix("T20")
def test_scaling_by_a_power_of_two_scales_what_is_read(case: Case, x: torch.Tensor, power: int):
    x = stacked(x, case)
    x = x * (block_max(x, case) >= 2**-5)  # where float16 scales stay normal, and float32 does not overflow
    x = x * (block_max(x, case) <= 2**7)
    decoded = case.codec.decode(case.codec.encode(x))
    assert torch.equal(case.codec.decode(case.codec.encode(x * 2.0**power)), decoded * 2.0**power)


@each_case
@few_examples
@given(value=st.floats(2**-10, 6e4, width=32), sign=st.sampled_from([1, -1]), cols=st.integers(1, 80))
@example(value=1.0, sign=1, cols=1)
@pytest.mark.matrix("T6", "T20")
def test_constant_blocks_are_exact_up_to_their_scale(case: Case, value: float, sign: int, cols: int):
    x = stacked(torch.full((2, cols), value * sign), case)
    error = (case.codec.decode(case.codec.encode(x)) / x - 1).abs().max()
    allowed = {"affine": 0, "log16": 2**-11, "dynamic": 0 if sign > 0 else 0.0071}.get(case.name, 2**-11)
    assert error <= allowed


@each_case
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (0, 3), (1, 1), (2, 3, 41)], ids=str)
def test_empty_and_single_elements_pass(case: Case, shape: tuple[int, ...]):
    x = torch.full(shape, 0.5)
    fields = quantize(x, case.codec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in fields.items()} == case.codec.fields(shape)
    read = dequantize(fields, case.codec)
    assert read.shape == x.shape
    assert torch.allclose(read, x, rtol=1e-3)


@each_case
def test_fields_of_zeros_decode_to_zeros(case: Case):
    fields = {n: torch.zeros((2, *shape), dtype=dtype) for n, (shape, dtype) in case.codec.fields((3, 41)).items()}
    assert torch.equal(case.codec.decode(fields), torch.zeros(2, 3, 41))


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(case: Case, bad: float):
    with pytest.raises(ValueError, match="only finite values can be quantised, got 2 others; mask them first"):
        quantize(torch.tensor([[1.0, bad, 2.0, bad]]), case.codec)


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match="a scalar has no row"):
        quantize(torch.tensor(1.0), Softsign(32))


def test_a_range_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"cannot hold values as large as 3e\+38"):
        quantize(torch.tensor([3e38, -3e38]), Affine(32))


def test_an_unknown_codec_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="there is no codec 'softsing'; did you mean 'softsign'"):
        make_codec("softsing", 128)


def test_one_more_codec_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_automagic.quantization.core.CODECS", {})
    register_codec("half")(Softsign)
    assert make_codec("half", 64) == Softsign(64)


# what the published formulas give, to the bit


@pytest.mark.parametrize("shape", [(7, 256), (16, 96), (3, 32), (64, 16)], ids=str)
def test_affine_is_the_seeds_formula(shape: tuple[int, int]):
    x, block = torch.randn(shape).pow(3), min(32, shape[1])
    blocks = x.flatten().reshape(-1, block)
    zeros = blocks.min(dim=1, keepdim=True).values
    scales = (blocks.max(dim=1, keepdim=True).values - zeros) / 255.0
    quantized = torch.round((blocks - zeros) / scales).clamp(0, 255)
    fields = quantize(x, Affine(32))
    assert torch.equal(fields["codes"].flatten(), quantized.to(torch.uint8).flatten())
    assert torch.equal(fields["scale"].flatten(), scales.flatten())
    assert torch.equal(fields["zero"].flatten(), zeros.flatten())
    assert torch.equal(dequantize(fields, Affine(32)).flatten(), (quantized * scales + zeros).flatten())


@pytest.mark.parametrize("block_size", [64, 128, 256, 4096])
def test_dynamic_is_bitsandbytes(block_size: int):
    x = torch.randn(16, 4096).pow(3)
    codes, state = quantize_blockwise(x, blocksize=block_size)
    fields = quantize(x, Dynamic(block_size))
    assert torch.equal(fields["scale"].flatten(), state.absmax)
    z = x / state.absmax.repeat_interleave(block_size).view_as(x)
    in_lookup = z.abs() > 2.01 / 65535  # below it bitsandbytes' look-up on the CPU has one bin
    assert in_lookup.float().mean() > 0.9
    assert torch.equal(fields["codes"][in_lookup], codes[in_lookup])


def test_dynamic_gives_tiny_values_the_nearest_code_where_bitsandbytes_loses_zero():
    x = torch.tensor([[1.0, 0.0, 1e-8, -1e-8, 1e-6, -1e-6, 2e-5, -2e-5] + [0.0] * 56])
    table = create_dynamic_map()
    nearest = table[(x[..., None] - table).abs().argmin(-1)]
    assert torch.equal(dequantize(quantize(x, Dynamic(64)), Dynamic(64)), nearest)


def test_softsign_is_the_reference():
    x = torch.randn(5, 200)
    codes, scale = reference.encode_softsign(x, 64)
    fields = quantize(x, Softsign(64))
    assert torch.equal(fields["codes"], codes)
    assert torch.equal(fields["scale"], scale)
    assert torch.allclose(
        dequantize(fields, Softsign(64)).double(), reference.decode_softsign(codes, scale, 64), rtol=1e-6
    )


def test_log16_is_as_fine_as_the_reference():
    x = torch.randn(300).square()
    step = 2 ** (48 / 65534) - 1
    theirs = reference.decode_log16(*reference.encode_log16(x.double()))
    assert (theirs / x - 1).abs().max() <= 0.51 * step
    assert (dequantize(quantize(x, Log16()), Log16()) / x - 1).abs().max() <= 0.51 * step


# quality


GAUSS, LAPLACE = torch.distributions.Normal(0.0, 1.0), torch.distributions.Laplace(0.0, 1.0)


@pytest.mark.parametrize(("noise", "bound"), [(GAUSS, 0.0058), (LAPLACE, 0.0067)], ids=["gauss", "laplace"])
def test_softsign_has_six_tenths_of_bitsandbytes_error_at_equal_bytes(
    noise: torch.distributions.Distribution, bound: float
):
    x = noise.sample((64, 4096))
    errors = {codec: float((dequantize(quantize(x, codec), codec) - x).norm() / x.norm()) for codec in PEERS}
    assert bytes_of(PEERS[0]) == bytes_of(PEERS[1])
    assert errors[PEERS[0]] <= bound
    assert errors[PEERS[0]] <= 0.6 * errors[PEERS[1]]


PEERS = (Softsign(128), Dynamic(256))


def bytes_of(codec: Codec) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in codec.fields((64, 4096)).values())


# vectors over a long run


DECAYS = (0.999, 0.9999)  # the second moment's and the confidence's


def average_for(steps: int, draws: bool) -> torch.Tensor:
    """Follows a moving target from its codes alone; returns the relative errors at the end  # [2, 512]"""
    codec, keys = Log16(), torch.arange(16)
    decay = torch.tensor(DECAYS).repeat_interleave(8)[:, None]
    target = torch.randn(16, 64).mul(1.5).exp()
    exact, fields = target.double(), codec.encode(target)
    for step in range(steps):
        drift = 1 + 0.5 * math.sin(3 * math.pi * step / steps)
        seen = target * drift * (1 + 0.35 * torch.randn(16, 64)).clamp_min(0)
        exact = decay * exact + (1 - decay) * seen
        number = torch.tensor(step)
        context = EncodeContext(fields, number, lambda numel, n=number: random_bits(keys + 64 * n, 0, numel))
        fields = codec.encode(torch.lerp(codec.decode(fields), seen, 1 - decay), context if draws else None)
    return (codec.decode(fields) / exact - 1).view(2, -1)


@pytest.mark.slow
def test_vectors_neither_freeze_nor_drift_over_20000_steps():
    errors = average_for(20_000, draws=True)
    assert errors.mean(-1).abs().max() < 0.002
    assert errors.square().mean(-1).sqrt().max() < 0.015


def test_vectors_do_not_drift_over_1000_steps():
    errors = average_for(1_000, draws=True)
    assert errors.mean(-1).abs().max() < 0.002
    assert errors.square().mean(-1).sqrt().max() < 0.008


@pytest.mark.slow
def test_nearest_rounding_would_freeze_the_slower_average():
    assert average_for(20_000, draws=False)[1].square().mean().sqrt() > 0.05


def test_the_largest_of_a_very_long_vector_is_kept():
    x = torch.zeros(200_000)
    x[7], x[8] = 3.0, 1e-6
    read = dequantize(quantize(x, Log16()), Log16())
    assert torch.allclose(read, x, rtol=3e-4, atol=0)


def test_rows_can_be_cut_anywhere():
    x = torch.randn(1, 12, 77)
    for codec in (*PEERS, Affine(64), WithFeedback(Softsign(64), 100)):
        whole = codec.encode(x)
        shards = [codec.encode(part) for part in x.split([1, 4, 7], 1)]
        for name in whole:
            assert torch.equal(torch.cat([shard[name] for shard in shards], 1), whole[name])
