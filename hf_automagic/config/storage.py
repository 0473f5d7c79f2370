"""Options of storage: how states lie in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..options import option, unknown_name_error


@dataclasses.dataclass(frozen=True)
class StorageOptions:
    """Options of how states lie in memory.

    They may change in the middle of a run; when a checkpoint is loaded, the optimizer's own win.
    """

    quantize_states: bool = option(
        True, "Stores momenta in 8 bits, and in 16 bits the vectors that vector_precision says."
    )
    codec: str = option(
        "softsign",
        "The 8-bit code of the momenta: softsign; affine, the first seed's; dynamic, bitsandbytes'; or a "
        "registered one.",
    )
    block_size: int = option(
        128,
        "Elements of a row that share one scale, a power of two. Smaller is more exact and costs 2 / "
        "block_size bytes an element.",
        low=32,
        high=4096,
    )
    error_correction: bool = option(
        False,
        "Keeps what rounding takes from a momentum in 4 more bits and gives it back in the next step: a tenth "
        "of the error for half a byte an element.",
    )
    vector_precision: Literal["auto", "fp32", "log16"] = option(
        "auto",
        "How row and column averages are stored: 'log16' halves their bytes, 'auto' does so where a matrix has"
        " fewer than 16 rows or columns, so that they weigh.",
        choices=("auto", "fp32", "log16"),
    )
    backend: Literal["auto", "triton", "compile", "eager"] = option(
        "auto",
        "What computes the step: 'triton' a few launches over all tensors, 'compile' one graph for each kind of "
        "tensor, 'eager' torch operations on stacks of same-shaped tensors; 'auto' is triton on CUDA, else eager. "
        "What a backend cannot step goes through eager stacks.",
        choices=("auto", "triton", "compile", "eager"),
    )
    min_8bit_size: int = option(4096, "Parameters with fewer elements keep their states in fp32.", low=0)
    mixed_precision: bool = option(
        True, "Keeps the states of small parameters in fp32; off, all matrices are quantised, whatever their size."
    )
    embeddings_in_fp32: bool = option(
        False,
        "Keeps the states of embeddings in fp32, as the Trainer makes bitsandbytes do; that is for a second "
        "moment in 8 bits, which there is none of here.",
    )
    adaptive_block_size: bool = option(
        False,
        "Gives each matrix the largest block whose measured rounding error is below block_error_target, anew "
        "every sync_frequency steps; that reads the device.",
    )
    min_block_size: int = option(
        64, "Smallest block that adaptive_block_size may choose, a power of two.", low=32, high=4096
    )
    max_block_size: int = option(
        1024, "Largest block that adaptive_block_size may choose, a power of two.", low=32, high=4096
    )
    block_error_target: float = option(
        0.007,
        "Relative L2 error of a momentum that adaptive_block_size accepts. Smaller chooses smaller blocks.",
        low=0,
        high=1,
    )
    storage_overrides: Mapping[str, Mapping[str, Any]] | None = option(
        None,
        "Storage options for parameters whose names match a pattern with wildcards: {'*.lm_head.*': "
        "{'quantize_states': False}}.",
    )
    strict: bool = option(
        False, "Raises where a codec cannot run, instead of keeping these states in fp32 and saying so."
    )

    def check_storage(self) -> None:
        """Raises where block sizes or overrides are not what storage can do."""
        for name in ("block_size", "min_block_size", "max_block_size"):
            size = getattr(self, name)
            if size != int(size) or int(size) & (int(size) - 1):
                raise ValueError(f"{name} must be a power of two from 32 to 4096, got {size}")
        if self.min_block_size > self.max_block_size:
            raise ValueError(
                f"min_block_size must not exceed max_block_size, got {self.min_block_size} and {self.max_block_size}"
            )
        overrides = {} if self.storage_overrides is None else self.storage_overrides
        if not (
            isinstance(overrides, Mapping) and all(isinstance(changes, Mapping) for changes in overrides.values())
        ):
            raise ValueError(
                f"storage_overrides must map name patterns to storage options, got {overrides!r}; write "
                "{'*.lm_head.*': {'quantize_states': False}}"
            )
        for name in (name for changes in overrides.values() for name in changes):
            if name not in storage_option_names() or name in ("storage_overrides", "backend"):
                raise unknown_name_error("storage option", name, storage_option_names())


def storage_option_names() -> tuple[str, ...]:
    """Returns the names of all storage options."""
    return tuple(field.name for field in dataclasses.fields(StorageOptions))
