"""The first seed's 8-bit code: 256 equal steps from a block's smallest to its largest value."""

import dataclasses

import torch
from torch import Tensor

from .core import EncodeContext, Fields, block_shape, join_blocks, register_codec, split_blocks


@register_codec("affine")
@dataclasses.dataclass(frozen=True)
class Affine:
    """Stores x as round((x - zero) / scale), zero = min, scale = (max - min) / 255 of a block, both float32.

    The first seed's formulas, to the bit. It cuts flat tensors, we cut rows: the blocks are the same where the number
    of columns is a multiple of the block size; elsewhere each row ends with a short block, whose minimum and maximum
    are its own. A constant block, where the seed divides by zero, is exact. Zero itself is in general not
    representable: elements without gradient keep a small phantom momentum, for which reason this is not the default.

    Args:
        block_size: elements of a row that share scale and zero.
    """

    block_size: int

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names codes, uint8, scale and zero, float32."""
        shared = block_shape(shape, self.block_size)
        return {"codes": (shape, torch.uint8), "scale": (shared, torch.float32), "zero": (shared, torch.float32)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes to the nearest of the 256 steps; ties to even."""
        blocks = split_blocks(values, self.block_size)
        zero = blocks.amin(-1)
        scale = (blocks.amax(-1) - zero) / 255.0
        steps = ((blocks - zero[..., None]) / scale[..., None]).round().clamp(0, 255)
        codes = torch.where((scale > 0)[..., None], steps, 0.0).to(torch.uint8)  # a constant block divides by zero
        return {"codes": join_blocks(codes, values.shape[-1]), "scale": scale, "zero": zero}

    def decode(self, fields: Fields) -> Tensor:
        """Decodes to code * scale + zero."""
        steps = split_blocks(fields["codes"], self.block_size).to(torch.float32)
        values = steps * fields["scale"][..., None] + fields["zero"][..., None]
        return join_blocks(values, fields["codes"].shape[-1])

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the scale, the same all over a block."""
        like = split_blocks(fields["codes"], self.block_size)
        return join_blocks(fields["scale"][..., None].expand(like.shape), fields["codes"].shape[-1])
