"""Which stacks the fused kernels can step, and why not the others; imports no triton."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..quantization import Affine, Log16, Softsign
from ..transforms.cautious import SMALLEST_SHARE, Cautious
from ..transforms.confidence import RESIDUAL_FLOOR, Confidence
from ..transforms.core import Transform
from ..transforms.decay import CautiousWeightDecay, DecoupledWeightDecay
from ..transforms.lora import ScaleByRowGain
from ..transforms.momentum import Momentum
from ..transforms.second_moment import ClipByRMS, FactoredSecondMoment, FullSecondMoment
from ..transforms.self_tuning import MeasureAgreement, ScaleByElementRate, ScaleByRate, VoteOnElements

# Squares of larger ones could overflow float32 where they are added up, and stay in the second moment for good: such a
# gradient counts as non-finite. 3e10 elements of this size still add up.
LARGEST_GRADIENT = 1e14
LARGEST_PLAIN = 2**17  # elements of a vector that one program steps in time
VECTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")

# the chains that are fused; what is optional may be missing
_END = (Cautious, ScaleByElementRate, ScaleByRate, DecoupledWeightDecay, CautiousWeightDecay)
_MATRIX = (
    FactoredSecondMoment, ClipByRMS, MeasureAgreement, VoteOnElements, Momentum, Confidence, ScaleByRowGain, *_END,
)  # fmt: skip
_VECTOR = (FullSecondMoment, ClipByRMS, MeasureAgreement, VoteOnElements, Momentum, ScaleByRowGain, *_END)
_OPTIONAL = {MeasureAgreement, VoteOnElements, ScaleByRowGain, *_END} - {ScaleByRate}


class Stacked(Protocol):
    """What a backend needs to know of a bucket, see `optim.bucket.Bucket`."""

    params: list[Tensor]
    positions: list[int]
    config: AutomagicConfig
    layout: Any
    chain: tuple[Transform, ...]
    stored: tuple[Any, ...]
    stacks: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype


def is_interpreted() -> bool:
    """Whether triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def find_obstacle(bucket: Stacked) -> str | None:
    """Returns why the fused kernels cannot step a bucket, in a few words; None where they can."""
    if bucket.device.type != "cuda" and not (bucket.device.type == "cpu" and is_interpreted()):
        return f"no triton on {bucket.device.type}"
    if bucket.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return str(bucket.dtype).removeprefix("torch.")
    if any(type(p.data) is not torch.Tensor for p in bucket.params):
        return "sharded or another kind of tensor"
    if not all(p.is_contiguous() for p in bucket.params):
        return "not contiguous"
    if not bucket.layout.shape.numel():
        return "no elements"
    return _chain_obstacle(bucket) or _storage_obstacle(bucket)


def _chain_obstacle(bucket: Stacked) -> str | None:
    expected = _MATRIX if bucket.layout.is_matrix else _VECTOR
    place = 0
    for transform in bucket.chain:
        while place < len(expected) and type(transform) is not expected[place]:
            if expected[place] not in _OPTIONAL:
                return f"{type(transform).__name__} is not fused"
            place += 1
        if place == len(expected) or not _is_usual(transform):
            return f"{type(transform).__name__} is not fused"
        place += 1
    if not bucket.layout.is_matrix and len(bucket.layout.shape) > 1 and bucket.config.allora:
        return "a factor of rank one with allora"
    if not bucket.layout.is_matrix and bucket.layout.shape.numel() > LARGEST_PLAIN:
        return "a very long vector"
    return None


def _is_usual(transform: Transform) -> bool:
    """Whether a transform is in the form that the kernels compute."""
    match transform:
        case FactoredSecondMoment():
            return transform.corrected and transform.eps == 0
        case FullSecondMoment():
            return transform.corrected and transform.eps == 0 and transform.root_eps == 0
        case Momentum():
            return transform.corrected
        case Confidence():
            return transform.corrected and transform.clips and transform.floor == RESIDUAL_FLOOR
        case Cautious():
            return transform.floor == SMALLEST_SHARE
    return True


def _storage_obstacle(bucket: Stacked) -> str | None:
    for stored in bucket.stored:
        codec = stored.codec
        if codec is None or type(codec) is Log16:
            continue
        if type(codec) not in (Softsign, Affine):
            return f"codec {type(codec).__name__}"
        if not bucket.layout.is_matrix:
            return "a quantised vector"
    return None


def codec_kind(bucket: Stacked) -> tuple[int, int]:
    """Returns how a momentum is stored, 0 float32, 1 softsign, 2 affine, and the elements that share a scale."""
    codec = next(stored.codec for stored in bucket.stored if stored.spec.name == "exp_avg")
    block = min(getattr(codec, "block_size", 128), bucket.layout.cols)
    return (0 if codec is None else 1 if type(codec) is Softsign else 2), block


def has(chain: Sequence[Transform], kind: type) -> bool:
    """Whether a chain holds a transform of this kind."""
    return any(type(transform) is kind for transform in chain)
