"""bitsandbytes' 8-bit code, on bitsandbytes' own table and kernels."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .core import EncodeContext, Fields, block_shape, join_blocks, register_codec, split_blocks

SMALLEST_BLOCK = 64  # of bitsandbytes' CUDA kernels; shorter blocks are filled up, which changes no code
SMALLEST_SCALE = 2.0**-120  # below it their reciprocal of the scale overflows
LOOKUP_BIN = 2.01 / 65535  # a little more than a bin of bitsandbytes' look-up on the CPU, which cuts [-1, 1] in 65536


@register_codec("dynamic")
@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Stores x / scale as the nearest of bitsandbytes' 256 dynamic values; the scale is a block's largest magnitude.

    Codes and scales, float32, are those of `bitsandbytes.functional.quantize_blockwise`, to the bit, where the number
    of columns is a multiple of the block size; elsewhere each row ends with a short block, while bitsandbytes cuts the
    flat tensor.
    One thing differs: on the CPU bitsandbytes (0.50) looks codes up in 65536 bins, and what is smaller than a bin,
    zero among it, becomes 2e-5 of the scale with either sign. Here such elements get the nearest code, as on a GPU.
    The table holds 1 and not -1: a block whose largest magnitude is negative shrinks by 0.7%.

    Args:
        block_size: elements of a row that share a scale. Smaller is more exact.

    Raises:
        ImportError: bitsandbytes is not installed.
    """

    block_size: int

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names codes, uint8, and scale, float32."""
        return {"codes": (shape, torch.uint8), "scale": (block_shape(shape, self.block_size), torch.float32)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes by bitsandbytes' kernel of the device."""
        blocks = split_blocks(values, self.block_size)
        scale = blocks.abs().amax(-1)
        block = max(SMALLEST_BLOCK, blocks.shape[-1])
        filled = torch.nn.functional.pad(blocks, (0, block - blocks.shape[-1])).reshape(-1)
        codes = _kernel()(filled, dynamic_table(values.device), block)[0]
        codes = codes.view(*scale.shape, block)[..., : blocks.shape[-1]]
        z = blocks / torch.where(scale > 0, scale, 1.0)[..., None]
        nearest = torch.bucketize(z, _midpoints(values.device)).to(torch.uint8)
        trusted = (z.abs() >= LOOKUP_BIN) & (scale >= SMALLEST_SCALE)[..., None]
        codes = torch.where(trusted, codes, nearest)
        return {"codes": join_blocks(codes, values.shape[-1]), "scale": scale}

    def decode(self, fields: Fields) -> Tensor:
        """Decodes to scale * table[code]."""
        codes = split_blocks(fields["codes"], self.block_size)
        values = dynamic_table(codes.device)[codes.to(torch.int32)] * fields["scale"][..., None]
        return join_blocks(values, fields["codes"].shape[-1])

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the wider of the two gaps beside each code."""
        codes = split_blocks(fields["codes"], self.block_size)
        gaps = _gaps(codes.device)[codes.to(torch.int32)] * fields["scale"][..., None]
        return join_blocks(gaps, fields["codes"].shape[-1])


@functools.cache
def dynamic_table(device: torch.device) -> Tensor:
    """Returns bitsandbytes' signed table on a device, sorted  # [256], float32

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        raise ImportError(
            'codec "dynamic" needs bitsandbytes: pip install bitsandbytes, or take codec "softsign"'
        ) from error
    return create_dynamic_map().to(device)


@functools.cache
def _kernel() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    dynamic_table(torch.device("cpu"))  # raises where bitsandbytes is missing
    return torch.ops.bitsandbytes.quantize_blockwise.default


@functools.cache
def _midpoints(device: torch.device) -> Tensor:
    table = dynamic_table(device)
    return (table[:-1] + table[1:]) / 2


@functools.cache
def _gaps(device: torch.device) -> Tensor:
    gaps = dynamic_table(device).diff()
    return torch.cat([gaps[:1], torch.maximum(gaps[:-1], gaps[1:]), gaps[-1:]])
