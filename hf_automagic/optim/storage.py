"""Storage: how each declared state of a parameter lies in memory, derived from the declarations of its chain."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..quantization import Codec, EncodeContext, ParamInfo, QuantizationStrategy, StateCodecs, choose_codecs
from ..transforms.core import StateSpec
from .groups import group_config, parameter_names
from .recipes import Chain, build_chain

STEP = StateSpec("step", "scalar", "steps applied to this parameter")


@dataclasses.dataclass(frozen=True)
class StoredState:
    """How one declared state lies in memory.

    Args:
        spec: the declaration.
        codec: the code of few bits, None for plain tensors.
    """

    spec: StateSpec
    codec: Codec | None

    @property
    def number(self) -> int:
        """Returns a number that tells this state from the others of a parameter, for its random draws."""
        return zlib.crc32(self.spec.name.encode())

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether a piece of a matrix's rows is not enough to encode it."""
        return self.spec.shape in ("cols", "scalar") or (self.spec.shape == "rows" and self.codec is not None)

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Returns the state's own shape for one matrix."""
        return {"matrix": (rows, cols), "rows": (rows,), "cols": (cols,), "scalar": ()}[self.spec.shape]

    def fields(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names the tensors of one matrix, as in `optimizer.state[p]`, with shapes and dtypes."""
        shape = self.shape(rows, cols)
        if self.codec is None:
            return {self.spec.name: (shape, self.spec.dtype)}
        return {f"{self.spec.name}_{field}": kind for field, kind in self.codec.fields(shape).items()}

    def decode(self, fields: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decodes the stored tensors of a chunk."""
        if self.codec is None:
            return fields[self.spec.name].to(dtype)
        return self.codec.decode(self.own(fields)).to(dtype)

    def encode(self, value: Tensor, context: EncodeContext | None = None) -> dict[str, Tensor]:
        """Encodes a chunk's new state to the stored tensors.

        Args:
            value: float32 or float64, stacked.
            context: of the step, with the tensors stored before under their full names; None for the nearest codes.
        """
        name = self.spec.name
        if self.codec is None:
            return {name: value.to(self.spec.dtype)}
        if context is not None:
            context = dataclasses.replace(context, previous=self.own(context.previous))
        fields = self.codec.encode(value.to(torch.float32), context)
        return {f"{name}_{field}": stored for field, stored in fields.items()}

    def own(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns stored tensors under the codec's own names."""
        return {key.removeprefix(f"{self.spec.name}_"): value for key, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parameter's shape as a matrix: the first dimension as rows, the rest as columns."""

    shape: torch.Size
    rows: int
    cols: int

    @classmethod
    def of(cls, shape: torch.Size) -> "Layout":
        """Reads a shape; scalars are 1 x 1, vectors n x 1."""
        rows = shape[0] if len(shape) else 1
        return cls(shape, rows, shape.numel() // rows if rows else 0)

    @property
    def is_matrix(self) -> bool:
        """Whether rows and columns have anything to share."""
        return self.rows > 1 and self.cols > 1

    def seen(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that a field has in `optimizer.state[p]`: the parameter's own where it is as large."""
        return tuple(self.shape) if shape == (self.rows, self.cols) else shape


def store_states(
    config: AutomagicConfig, layout: Layout, codecs: StateCodecs, is_full_weight: bool = False
) -> tuple[Chain, tuple[StoredState, ...]]:
    """Returns the chain of a parameter and how each of its states is stored."""
    chain = build_chain(config, layout.is_matrix, tuple(layout.shape), is_full_weight)
    specs = {spec.name: spec for transform in chain for spec in transform.states()}
    by_shape = {"matrix": codecs.matrix, "rows": codecs.vector, "cols": codecs.vector, "scalar": None}
    stored = [StoredState(spec, by_shape[spec.shape] if spec.quantizes else None) for spec in specs.values()]
    return chain, (StoredState(STEP, None), *stored)


def codecs_of_group(group: Mapping[str, Any], strategy: QuantizationStrategy | None = None) -> list[StateCodecs]:
    """Returns how the states of each of a group's parameters are stored.

    Raises:
        TypeError: there is no codec of the group's `codec`.
        ValueError: `storage_overrides` have no names to match, or the strategy's block size is not allowed.
        RuntimeError: the codec cannot run here, and `strict` is on.
    """
    config = group_config(group)
    if config.storage_overrides and not (group.get("param_names") or group.get("names")):
        raise ValueError(
            "storage_overrides need the parameters' names; build the optimizer from model.named_parameters()"
        )
    names = parameter_names([group])
    blocks = group.get("block_sizes") if config.adaptive_block_size else None
    return [
        choose_codecs(
            ParamInfo(name, param.shape, group["role"], param.device, blocks[i] if blocks else None), config, strategy
        )
        for i, (param, name) in enumerate(zip(group["params"], names, strict=True))
    ]
