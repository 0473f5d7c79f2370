"""The 16-bit code of row and column vectors: logarithmic, and rounded at random so that slow averages keep moving."""

import dataclasses
import math

import torch
from torch import Tensor

from .core import EncodeContext, Fields

CODES_PER_OCTAVE = 1365  # neighbours differ by 0.05%
OCTAVES_BELOW = 32  # smallest value beside zero, below the scale
HIGHEST = 65534  # code 0 is zero, codes 1 to 65535 are HIGHEST + 1 steps: 16 octaves above the scale
LONGEST = 2**16  # elements of a vector whose largest cannot pass the highest code
EXACT = 2.0**-10  # of a code: float32 logarithms miss by less, and what is representable must not be rounded at random


@dataclasses.dataclass(frozen=True)
class Log16:
    """Stores x >= 0 as 1 + (log2(x / scale) + 32) * 1365, rounded at random to one of its two neighbours; 0 is exact.

    The scale is the power of two above the mean of the last axis, so that a moving mean does not move the grid, and
    sums of shards in another order give the same bits. Rounding is stochastic and unbiased: an average with decay
    0.9999 moves by less than half a code in a step, and 20,000 steps of nearest rounding left it 10% to 260% off, of
    this one 1%. Values above 2^16 times the mean cannot occur in vectors of up to 65,536 elements; longer ones get a
    larger scale. Values below 2^-32 of the scale are stored as that.
    """

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names codes, two bytes each since neither NCCL nor gloo moves int16, and scale, float32, for a last axis."""
        return {"codes": ((*shape, 2), torch.uint8), "scale": (shape[:-1], torch.float32)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes to a neighbour, drawn with `context.draw`; without a context to the nearest code."""
        mean = (values / max(1, values.shape[-1])).sum(-1, keepdim=True)
        longer = math.ceil(math.log2(max(1.0, values.shape[-1] / LONGEST)))
        scale = torch.where(mean > 0, torch.ldexp(torch.ones_like(mean), torch.frexp(mean).exponent + longer), 0.0)
        mantissa, exponent = torch.frexp(values / torch.where(scale > 0, scale, 1.0))
        # the octave apart from the place within it: their sum has 16 bits before the point and would keep 8 behind it
        place = mantissa.log2() * CODES_PER_OCTAVE
        place = place.round() if context is None else _round_randomly(place, context.draw(place[0].numel()))
        codes = ((exponent + OCTAVES_BELOW) * CODES_PER_OCTAVE + place).clamp(0, HIGHEST) + 1
        codes = torch.where((values > 0) & (scale > 0), codes, 0.0)
        pairs = codes.to(torch.int32).to(torch.int16).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
        return {"codes": pairs, "scale": scale.squeeze(-1)}

    def decode(self, fields: Fields) -> Tensor:
        """Decodes to scale * 2^((code - 1) / 1365 - 32)."""
        codes = fields["codes"].view(torch.int16).squeeze(-1).to(torch.int32) & 0xFFFF
        octave = torch.div(codes - 1, CODES_PER_OCTAVE, rounding_mode="floor")
        part = (codes - 1 - octave * CODES_PER_OCTAVE) / CODES_PER_OCTAVE
        values = torch.ldexp(part.exp2(), octave - OCTAVES_BELOW) * fields["scale"][..., None]
        return torch.where(codes > 0, values, 0.0)

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the relative distance of two codes times each value."""
        return self.decode(fields) * (2 ** (1 / CODES_PER_OCTAVE) - 1)


def _round_randomly(place: Tensor, bits: Tensor) -> Tensor:
    """Rounds so that the mean of the decoded values, not of the codes, is kept  # [n, ..., cols]"""
    below = place.floor()
    part = place - below
    step = math.log(2) / CODES_PER_OCTAVE
    chance = torch.expm1(part * step) / math.expm1(step)
    chance = torch.where(part < EXACT, 0.0, torch.where(part > 1 - EXACT, 1.0, chance))
    return below + ((bits.view(place.shape) >> 8).to(torch.float32) * 2.0**-24 < chance)
