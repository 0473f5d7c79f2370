"""Codes to measure beside ours: a bfloat16 momentum, and torchao's 8-bit state. Importing registers them."""

import dataclasses

import torch
from torch import Tensor

from hf_automagic.quantization import EncodeContext, register_codec
from hf_automagic.quantization.core import Fields, block_shape, join_blocks, split_blocks


@register_codec("bfloat16")
@dataclasses.dataclass(frozen=True)
class BFloat16:
    """A momentum in half the bytes, for comparison."""

    block_size: int

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names the one tensor."""
        return {"half": (shape, torch.bfloat16)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Rounds to nearest."""
        return {"half": values.to(torch.bfloat16)}

    def decode(self, fields: Fields) -> Tensor:
        """Widens."""
        return fields["half"].to(torch.float32)

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the distance of neighbours."""
        values = self.decode(fields)
        return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8)


@register_codec("torchao")
@dataclasses.dataclass(frozen=True)
class TorchAO:
    """torchao's 8-bit state, by its own functions, in blocks that end with a row."""

    block_size: int

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names codes, uint8, and scale, float32, beside a mark that tells them from bitsandbytes'."""
        shared = block_shape(shape, self.block_size)
        return {"ao_codes": (shape, torch.uint8), "ao_scale": (shared, torch.float32)}

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Scales by blocks and searches torchao's map."""
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        blocks = split_blocks(values, self.block_size)
        scaled, scale = scale_tensor(blocks.reshape(-1), blocks.shape[-1])
        codes = quantize_8bit_with_qmap(scaled, self._map(values.device)).view(blocks.shape)
        return {"ao_codes": join_blocks(codes, values.shape[-1]), "ao_scale": scale.view(blocks.shape[:-1])}

    def decode(self, fields: Fields) -> Tensor:
        """Looks codes up and scales them."""
        blocks = split_blocks(fields["ao_codes"], self.block_size)
        values = self._map(blocks.device)[blocks.to(torch.int32)] * fields["ao_scale"][..., None]
        return join_blocks(values, fields["ao_codes"].shape[-1])

    def spacing(self, fields: Fields) -> Tensor:
        """Is not needed here."""
        raise TypeError("torchao's code is only measured, and cannot store states")

    def _map(self, device: torch.device) -> Tensor:
        from torchao.optim.quant_utils import create_dynamic_map

        return torch.tensor(create_dynamic_map(signed=True), device=device)
