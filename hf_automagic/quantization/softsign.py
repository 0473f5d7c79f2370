"""The default 8-bit code: fine near zero, where momenta live, exact at zero."""

import dataclasses

import torch
from torch import Tensor

from .core import EncodeContext, Fields, block_shape, join_blocks, register_codec, split_blocks

LARGEST_SCALE = 65504.0  # of float16
SMALLEST_SCALE = 2.0**-14  # below it a float16 loses bits; such a block is stored as zero


@register_codec("softsign")
@dataclasses.dataclass(frozen=True)
class Softsign:
    """Stores x as round(127 y), y = 2z / (1 + |z|), z = x / scale; the scale is a block's largest magnitude, float16.

    The companding idea is FlashOptim's (arXiv 2602.23349). At block 128 the relative L2 error is 0.57% on Gaussian
    values, half that of a dynamic code with the same bytes. Rounding is to nearest, which momenta of decay up to 0.99
    prefer.
    Magnitudes above 65504 are stored as 65504, blocks below 2^-14 as zero: normalised momenta are near 1.

    Args:
        block_size: elements of a row that share a scale. Smaller is more exact.
    """

    block_size: int

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names codes, int8, and scale, float16."""
        return {"codes": (shape, torch.int8), "scale": (block_shape(shape, self.block_size), torch.float16)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes to the nearest code; ties to even."""
        blocks = split_blocks(values, self.block_size)
        largest = _largest_magnitude(blocks).clamp_max(LARGEST_SCALE)
        scale = torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(torch.float16)
        divisor = torch.where(scale > 0, scale.to(torch.float32), torch.inf)[..., None]
        z = (blocks / divisor).clamp_(-1.0, 1.0)
        codes = (254 * z).div_(z.abs().add_(1)).round_().to(torch.int8)
        return {"codes": join_blocks(codes, values.shape[-1]), "scale": scale}

    def decode(self, fields: Fields) -> Tensor:
        """Decodes y = code / 127 to scale * y / (2 - |y|)."""
        y = split_blocks(fields["codes"], self.block_size).to(torch.float32).div_(127)
        below = y.abs().sub_(2)  # -(2 - |y|): the scale takes the sign back, and everything is done in place
        return join_blocks(y.div_(below).mul_(-_scale(fields)), fields["codes"].shape[-1])

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the slope of the decoder, scale / 127 * 2 / (2 - |y|)^2."""
        y = split_blocks(fields["codes"], self.block_size).to(torch.float32) / 127
        return join_blocks(_scale(fields) * (2 / 127) / (2 - y.abs()).square(), fields["codes"].shape[-1])


def _largest_magnitude(blocks: Tensor) -> Tensor:
    """Returns the largest magnitude along the last axis, NaN where there is one  # [..., n_blocks, block], float32

    Along short rows torch's kernels for a CPU find the largest bit pattern five times sooner than the largest float,
    while what torch.compile makes of floats is the faster.
    """
    if torch.compiler.is_compiling():
        return blocks.abs().amax(-1)
    return blocks.abs().view(torch.int32).amax(-1).view(torch.float32)


def _scale(fields: Fields) -> Tensor:
    return fields["scale"].to(torch.float32)[..., None]
