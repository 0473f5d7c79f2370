"""Buckets: same-shaped parameters stepped together, gather -> decode -> chain -> encode -> scatter."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..kernels.compile_backend import StackedStep, compile_step, stack_of
from ..quantization import EncodeContext, StateCodecs, keys_for, random_bits, round_stochastically, step_keys
from ..transforms.core import ChainResult, Measured, StepContext, run_chain
from .conversion import convert_entry
from .storage import STEP, Layout, StoredState, store_states

# Largest float32 stack of a chunk, the unit of every temporary. CPU: a chunk and its dozen temporaries should stay in
# the last-level cache. GPU: few launches, and a bounded peak.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**26}


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a step hands to every bucket of a device.

    Args:
        lr: the group's rate really applied  # [], float32
        finite: whether the step may change anything  # [], bool
        clip: factor for the gradients, None for none  # []
        row_gain: ALLoRA's gains of the bucket's parameters, None without pairs  # [n, rows] or [n, 1]
    """

    lr: Tensor
    finite: Tensor
    clip: Tensor | None
    row_gain: Tensor | None = None


class Bucket:
    """The parameters of one group, shape, dtype and device, with their states stacked.

    `optimizer.state[p]` is the truth; its tensors are views into the stacks. `adopt` takes over entries that somebody
    else put there.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        positions: Sequence[int],
        config: AutomagicConfig,
        codecs: StateCodecs,
        is_full_weight: bool = False,
    ) -> None:
        """Plans the chain and the storage; allocates nothing.

        Args:
            params: same shape, dtype and device.
            positions: their stable numbers in the optimizer.
            config: options of their group.
            codecs: how their states are stored.
            is_full_weight: whether they are pretrained weights.
        """
        self.params, self.positions, self.config, self.codecs = list(params), list(positions), config, codecs
        self.layout = Layout.of(params[0].shape)
        self.device, self.dtype = params[0].device, params[0].dtype
        self.work_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.chain, self.stored = store_states(config, self.layout, codecs, is_full_weight)
        self.stacks: dict[str, Tensor] = {}
        self.views: list[dict[str, Tensor]] = []
        self.keys = torch.tensor(self.positions, dtype=torch.int64, device=self.device)
        self.graph: Callable[..., Any] | None = None  # the chain as one compiled function, see `compile`
        self.heights: set[int] = set()  # of the stacks that it was compiled for

    def compile(self) -> None:
        """Steps whole chunks through one graph from now on, where torch.compile runs."""
        layout, config = self.layout, self.config
        plan = (self.chain, self.stored, layout.rows, layout.cols, self.dtype, self.work_dtype)
        numbers = tuple(stored.number for stored in self.stored)
        step = StackedStep(*plan, config.seed, config.stochastic_rounding, numbers)
        self.graph = compile_step(step, self.device)
        chunks = self._chunks(0, len(self.params)) if layout.shape.numel() else ()
        self.heights = {last - first for first, last, rows in chunks if len(rows) == 1}

    def adopt(self, states: Sequence[dict[str, Tensor]]) -> int:
        """Makes the stacks hold what `optimizer.state[p]` holds; costs a comparison where nothing was replaced.

        Args:
            states: the state dictionaries of the bucket's parameters; empty ones are filled with initial values.

        Returns:
            How many parameters' states were stored in another way, and have been converted.
        """
        if not self.stacks:
            self._allocate()
        converted = 0
        for state, views in zip(states, self.views, strict=True):
            if all(state.get(name) is view for name, view in views.items()):
                continue
            converted += convert_entry(state, self.stored, self.layout)
            for name, view in views.items():
                if name in state:
                    view.copy_(torch.as_tensor(state[name]).view_as(view))
                state[name] = view
        return converted

    def _allocate(self) -> None:
        n, (rows, cols) = len(self.params), (self.layout.rows, self.layout.cols)
        for stored in self.stored:
            for name, (shape, dtype) in stored.fields(rows, cols).items():
                initial = stored.spec.initial if stored.codec is None else 0
                self.stacks[name] = torch.full((n, *shape), initial, dtype=dtype, device=self.device)
        for i in range(n):
            one = {name: stack[i] for name, stack in self.stacks.items()}
            whole = {name: t.view(self.layout.shape) for name, t in one.items() if t.shape == (rows, cols)}
            self.views.append(one | whole)

    def step(self, inputs: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
        """Steps the parameters that have a gradient.

        Returns:
            The pooled sums, and the sum of the squared changes of the weights  # each []
        """
        pool: dict[str, Tensor] = {}
        squares = torch.zeros((), dtype=self.work_dtype, device=self.device)
        for start, stop in self._runs():
            for first, last, rows in self._chunks(start, stop):
                compiled = self.graph is not None and last - first in self.heights
                chunk = slice(first, last)
                sums, square = self._step_graph(chunk, inputs) if compiled else self._step_chunk(chunk, rows, inputs)
                squares = squares + square
                pool = {name: pool[name] + value if name in pool else value for name, value in sums.items()}
        return pool, squares

    def numel_with_grad(self) -> int:
        """Counts the elements that take part in this step."""
        return self.layout.shape.numel() * sum(p.grad is not None for p in self.params)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yields the runs of neighbours that have a gradient; slices of a stack cost no copy."""
        if not self.layout.shape.numel():
            return
        start = None
        for i, param in enumerate([*self.params, None]):
            present = param is not None and param.grad is not None
            if present and start is None:
                start = i
            elif not present and start is not None:
                yield start, i
                start = None

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int, list[slice]]]:
        """Yields chunks of a run, and for a matrix above the limit the row slices to sweep it in."""
        row_bytes = 4 * self.layout.cols
        limit = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])
        count = limit // (row_bytes * self.layout.rows)
        if not count and any(transform.needs_whole_matrix for transform in self.chain):
            count = 1
        if count:
            for first in range(start, stop, count):
                yield first, min(first + count, stop), [slice(0, self.layout.rows)]
            return
        height = max(1, limit // row_bytes)
        rows = [slice(r, min(r + height, self.layout.rows)) for r in range(0, self.layout.rows, height)]
        for first in range(start, stop):
            yield first, first + 1, rows

    def _step_graph(self, chunk: slice, inputs: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
        """Steps a chunk of whole matrices through the compiled chain."""
        params, cols = self.params[chunk], self.layout.cols
        grads = stack_of([p.grad for p in params if p.grad is not None], cols)
        fields = {name: stack[chunk] for name, stack in self.stacks.items()}
        gain = None if inputs.row_gain is None else inputs.row_gain[chunk]
        written, new, pool, square = self.graph(  # pyright: ignore[reportOptionalCall]
            grads, stack_of(params, cols), fields, self.keys[chunk], inputs.lr, inputs.finite, inputs.clip, gain
        )
        for name, value in new.items():
            fields[name].copy_(value)
        for param, value in zip(params, written.unbind(), strict=True):
            param.copy_(value.view(param.shape))
        return pool, square

    def _step_chunk(self, chunk: slice, pieces: list[slice], inputs: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
        step = self.stacks["step"][chunk] + inputs.finite
        totals: list[dict[str, Tensor]] | None = None if len(pieces) == 1 else []
        pool: dict[str, Tensor] = {}
        squares = torch.zeros((), dtype=self.work_dtype, device=self.device)
        whole: dict[str, list[Tensor]] = {}
        while True:
            sums: dict[str, Tensor] = {}
            for rows in pieces:
                context = self._gather(chunk, rows, step, inputs)
                result = run_chain(self.chain, context.grad, self._decode(chunk, rows), context, totals)
                if isinstance(result, Measured):
                    sums = {k: sums[k] + v if k in sums else v for k, v in result.matrix.items()}
                    continue
                self._scatter(chunk, rows, context, result, inputs)
                squares = squares + torch.linalg.vector_norm(result.update).square()
                for name, value in self._encode(chunk, rows, result, step, inputs).items():
                    whole.setdefault(name, []).append(value)
                pool = {k: pool[k] + v if k in pool else v for k, v in result.pool.items()}
            if not sums:
                break
            assert totals is not None
            totals.append(sums)
        for stored in self.stored:
            if values := whole.get(stored.spec.name):
                value = torch.cat(values, 1) if stored.spec.shape == "rows" else values[-1]
                self._store(stored, chunk, slice(0, self.layout.rows), value, step, inputs)
        self.stacks["step"][chunk].copy_(step)
        return pool, squares

    def _gather(self, chunk: slice, rows: slice, step: Tensor, inputs: StepInputs) -> StepContext:
        """Stacks gradients and weights  # [n, rows, cols], float32"""
        params = self.params[chunk]
        grad = self._stack([p.grad for p in params if p.grad is not None], rows)
        if inputs.clip is not None:
            grad = grad * inputs.clip
        gain = None if inputs.row_gain is None else inputs.row_gain[chunk]
        if gain is not None and gain.shape[1] > 1:
            gain = gain[:, rows]
        param, layout = self._stack(params, rows), self.layout
        return StepContext(grad, param, step, inputs.lr, layout.rows, layout.cols, rows.start, gain)

    def _stack(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        if self.layout.shape:
            tensors = [t[rows] for t in tensors]
        return torch.stack([t.reshape(-1, self.layout.cols) for t in tensors]).to(self.work_dtype)

    def _decode(self, chunk: slice, rows: slice) -> dict[str, Tensor]:
        decoded = {}
        for stored in self.stored:
            fields = {name: self._part(name, stored, chunk, rows) for name in self._names(stored)}
            decoded[stored.spec.name] = stored.decode(fields, self.work_dtype)
        return decoded

    def _encode(
        self, chunk: slice, rows: slice, result: ChainResult, step: Tensor, inputs: StepInputs
    ) -> dict[str, Tensor]:
        """Writes the new state of these rows; returns what needs the whole matrix, written after the last piece."""
        whole = {}
        for stored in self.stored:
            if stored.needs_whole_matrix:
                whole[stored.spec.name] = result.state[stored.spec.name]
            else:
                self._store(stored, chunk, rows, result.state[stored.spec.name], step, inputs)
        return whole

    def _store(
        self, stored: StoredState, chunk: slice, rows: slice, value: Tensor, step: Tensor, inputs: StepInputs
    ) -> None:
        """Replaces one state of these rows, unless the step is skipped."""
        if stored.spec is STEP:
            return
        parts = {name: self._part(name, stored, chunk, rows) for name in self._names(stored)}

        def draw(numel: int) -> Tensor:
            keys = step_keys(self.config.seed, self.keys[chunk], step)
            return random_bits(keys_for(keys, stored.number), 0, numel)

        for name, encoded in stored.encode(value, EncodeContext(parts, step, draw)).items():
            parts[name].copy_(torch.where(inputs.finite, encoded, parts[name]))

    def _names(self, stored: StoredState) -> list[str]:
        return list(stored.fields(self.layout.rows, self.layout.cols))

    def _part(self, name: str, stored: StoredState, chunk: slice, rows: slice) -> Tensor:
        stack = self.stacks[name][chunk]
        return stack[:, rows] if stack.ndim > 1 and stored.spec.shape in ("matrix", "rows") else stack

    def _scatter(
        self, chunk: slice, rows: slice, context: StepContext, result: ChainResult, inputs: StepInputs
    ) -> None:
        """Subtracts the step from the weights, in float32 or more, and writes them back."""
        written = context.param - torch.where(inputs.finite, result.update, 0.0)
        self._write(self.params[chunk], rows, written, self.keys[chunk], context.step)

    def matrices(self, indices: Sequence[int]) -> Tensor:
        """Stacks some of the bucket's parameters as they are now: [k, rows, cols], float32."""
        return self._stack([self.params[i] for i in indices], slice(0, self.layout.rows))

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Stacks the gradients of some of the bucket's parameters: [k, rows, cols], float32."""
        grads = [self.params[i].grad for i in indices]
        return self._stack([grad for grad in grads if grad is not None], slice(0, self.layout.rows))

    def rewrite(self, indices: Sequence[int], values: Tensor) -> None:
        """Replaces whole parameters after their step; rounding draws other numbers than the step did.

        Args:
            indices: which of the bucket's parameters.
            values: their new values  # [k, rows, cols], float32
        """
        keys = torch.stack([self.keys[i] for i in indices])
        step = torch.stack([self.stacks["step"][i] for i in indices])
        rows = slice(0, self.layout.rows)
        self._write([self.params[i] for i in indices], rows, values, keys, step, draw=1)

    def _write(
        self, params: Sequence[Tensor], rows: slice, values: Tensor, keys: Tensor, step: Tensor, draw: int = 0
    ) -> None:
        if self.dtype in (torch.bfloat16, torch.float16) and self.config.stochastic_rounding:
            first = draw * self.layout.shape.numel() + rows.start * self.layout.cols
            bits = random_bits(step_keys(self.config.seed, keys, step), first, values[0].numel())
            values = round_stochastically(values, self.dtype, bits.view(values.shape))
        for param, value in zip(params, values.unbind(), strict=True):
            target = param[rows] if self.layout.shape else param
            target.copy_(value.view(target.shape))
