"""The one interface of the algorithm: a transform turns stacks of matrices into others and declares its state."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Declares one piece of state; allocation, 8-bit storage, checkpoints, accounting and docs follow from it.

    Args:
        name: the key in `optimizer.state[p]`.
        shape: 'matrix' [n, rows, cols], 'rows' [n, rows], 'cols' [n, cols] or 'scalar' [n], n parameters at once.
        meaning: one sentence for the docs.
        quantizes: whether fewer bits may hold it: a matrix 8, a vector, which is then never negative, 16.
        dtype: how it is stored where it is not quantised.
        initial: the value that every element starts from.
    """

    name: str
    shape: Literal["matrix", "rows", "cols", "scalar"]
    meaning: str
    quantizes: bool = False
    dtype: torch.dtype = torch.float32
    initial: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a transform may read of the step, all on the device.

    Args:
        grad: raw gradient  # [n, rows, cols], float32
        param: weights before the step  # [n, rows, cols], float32
        step: applied steps of each parameter, this one included  # [n], float32
        lr: the rate really applied  # [], float32
        rows: rows of the whole matrix, of which a piece or a shard holds some.
        cols: columns of the matrix.
        first_row: where in the whole matrix the rows at hand begin.
        row_gain: ALLoRA's gain of each row, None without pairs  # [n, rows] or [n, 1]
        kept: where a compiled step collects what `once` is given, None elsewhere.
    """

    grad: Tensor
    param: Tensor
    step: Tensor
    lr: Tensor
    rows: int
    cols: int
    first_row: int = 0
    row_gain: Tensor | None = None
    kept: list[Tensor] | None = None

    def once(self, value: Tensor) -> Tensor:
        """Returns a value as it is; a compiled step computes it once.

        Its compiler would otherwise compute a factor of rows or columns, roots and all, anew for each element, and a
        matrix in each loop that reads it.
        """
        if self.kept is not None:
            self.kept.append(value)
        return value

    @property
    def numel(self) -> int:
        """Elements of one whole matrix."""
        return self.rows * self.cols


@dataclasses.dataclass(frozen=True)
class Measured:
    """Partial sums of a transform over the rows it was given.

    Args:
        matrix: sums that belong to a matrix and cross its rows; pieces and shards of a matrix add theirs up before
            `apply`  # each [n] or [n, cols]
        rows: what stays with the rows it was measured on  # each [n, rows]
        pool: sums over all parameters, which decide about the next step  # each []
    """

    matrix: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    pool: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Transform:
    """One idea of the algorithm, as a pure function on stacks [n, rows, cols].

    `measure` may take sums; `apply` returns the new update and the new state. What `apply` returns under a name that
    no StateSpec declares is carried to the later transforms of the step and then forgotten.
    """

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether `apply` cannot run on a piece of the rows, even when it knows the sums of all."""
        return False

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the state that the transform keeps."""
        return ()

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured | None:
        """Takes the partial sums that `apply` or the next step needs; None where there are none."""
        return None

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the transformed update and the state it changed."""
        raise TypeError(f"{type(self).__name__} must define apply()")


@dataclasses.dataclass(frozen=True)
class ChainResult:
    """The outcome of a chain: the step to subtract, the new state, the sums for the next step."""

    update: Tensor
    state: dict[str, Tensor]
    pool: dict[str, Tensor]


def run_chain(
    transforms: Sequence[Transform],
    update: Tensor,
    state: State,
    context: StepContext,
    totals: Sequence[dict[str, Tensor]] | None = None,
) -> ChainResult | Measured:
    """Runs the transforms in order on whole matrices, or on a piece of their rows.

    A piece cannot know the sums of its matrix. It is run with the `totals` known so far and stops at the first
    transform whose sums are missing, returning its own partial sums; the caller adds them over all pieces and runs the
    chain again with one more total.

    Args:
        transforms: the algorithm as a list.
        update: gradients  # [n, rows, cols], float32
        state: decoded state of the parameters.
        context: what the transforms may read of the step.
        totals: for a piece, the `Measured.matrix` sums of the whole matrix, one for each measuring transform passed.
    """
    state, pool, known = dict(state), {}, iter(totals or ())
    for transform in transforms:
        measured = transform.measure(update, state, context)
        if measured is not None:
            pool |= measured.pool
            if totals is not None and measured.matrix:
                total = next(known, None)
                if total is None:
                    return measured
                measured = dataclasses.replace(measured, matrix=total)
        update, changed = transform.apply(update, state, measured, context)
        state |= changed
    return ChainResult(update, state, pool)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """Returns 1 - beta^step without cancellation  # [n, 1, 1]; 1 where beta is 0."""
    if beta == 0.0:
        return torch.ones_like(step)[:, None, None]
    return -torch.expm1(step * math.log(beta))[:, None, None]
