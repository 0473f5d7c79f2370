"""The one interface of storage: a codec turns float32 tensors into small ones and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..options import unknown_name_error

Fields = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class EncodeContext:
    """What an encoder may use beside the values, once for each of the n parameters of a stack.

    Args:
        previous: the stored tensors that are about to be replaced.
        step: applied steps, this one included  # [n], float32
        draw: returns so many random 32-bit integers for each parameter, of a counter: the same on every rank and after
            a resume  # numel -> [n, numel], int64
    """

    previous: Fields
    step: Tensor
    draw: Callable[[int], Tensor]


class Codec(Protocol):
    """Stores a stack of n tensors of one shape, [n, ..., cols], in fewer bits.

    The codes have the tensor's shape. What is shared, such as a scale, belongs to a block of the last axis: blocks
    never cross a row, so that both can be sharded like the parameter and a checkpoint does not depend on the number of
    ranks. A file's codec is recognised by its fields: let names, shapes or dtypes differ from the other codecs'. Be a
    frozen dataclass, so that parameters that are stored alike are stepped together.
    """

    def fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names the stored tensors of one tensor of this shape, with shapes and dtypes; all zeros decode to zeros."""
        ...

    def encode(self, values: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes float32 values; without a context to the nearest code  # [n, ..., cols]"""
        ...

    def decode(self, fields: Fields) -> Tensor:
        """Decodes to float32 values  # [n, ..., cols]"""
        ...

    def spacing(self, fields: Fields) -> Tensor:
        """Returns the distance of neighbouring codes around each element: twice the largest rounding error there."""
        ...


C = TypeVar("C", bound=type)
CODECS: dict[str, Callable[[int], Codec]] = {}


def register_codec(name: str) -> Callable[[C], C]:
    """Registers a codec class, built from a block size, under the name that `codec=` takes."""

    def register(cls: C) -> C:
        CODECS[name] = cast(Callable[[int], Codec], cls)
        return cls

    return register


def make_codec(name: str, block_size: int) -> Codec:
    """Builds a registered codec.

    Raises:
        TypeError: there is no codec of this name; the nearest one is given.
    """
    if name not in CODECS:
        raise unknown_name_error("codec", name, CODECS)
    return CODECS[name](block_size)


def quantize(values: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Encodes one tensor of at least one dimension to the nearest codes, checked; `dequantize` reads them.

    The optimizer's own path does not check, since looking would make a GPU wait: there the guard has already skipped a
    step whose gradients are not finite.

    Raises:
        ValueError: a value is not finite, or too large for the codec, or there is no dimension.
    """
    if not values.ndim:
        raise ValueError("a scalar has no row to quantise, got 0 dimensions; pass values[None]")
    stack = values.detach().to(torch.float32)[None]
    if not stack.isfinite().all():
        raise ValueError(
            f"only finite values can be quantised, got {int((~stack.isfinite()).sum())} others; mask them first"
        )
    fields = codec.encode(stack)
    if not codec.decode(fields).isfinite().all():
        largest = float(stack.abs().max())
        raise ValueError(f"{codec} cannot hold values as large as {largest:g}; scale them down first")
    return {name: field[0] for name, field in fields.items()}


def dequantize(fields: Fields, codec: Codec) -> Tensor:
    """Decodes what `quantize` returned, to float32."""
    return codec.decode({name: field[None] for name, field in fields.items()})[0]


def block_shape(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """Returns the shape of one number a block: the last axis cut in blocks, of which the last may be short."""
    return (*shape[:-1], -(-shape[-1] // block_size))


def split_blocks(values: Tensor, block_size: int) -> Tensor:
    """Splits rows into blocks, a short one filled up with its last element  # [..., cols] -> [..., n_blocks, block]"""
    cols = values.shape[-1]
    block = max(1, min(block_size, cols))
    n_blocks = -(-cols // block)
    missing = n_blocks * block - cols
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    return values.reshape(*values.shape[:-1], n_blocks, block)


def join_blocks(blocks: Tensor, cols: int) -> Tensor:
    """Joins the blocks of rows again, without the filling  # [..., n_blocks, block] -> [..., cols]

    The short block is joined on its own: where a compiled loop over all columns divides them by the block, torch's
    loop splitting on the CPU (2.13, `try_loop_split`) leaves out what is beyond the last whole one.
    """
    whole, rest = divmod(cols, blocks.shape[-1])
    if not rest:
        return blocks.flatten(-2)
    return torch.cat([blocks[..., :whole, :].flatten(-2), blocks[..., -1, :rest]], -1)
