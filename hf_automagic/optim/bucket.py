"""Buckets: same-shaped parameters stepped together, gather -> decode -> chain -> encode -> scatter."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..kernels.choice import choose, choose_or_zero
from ..quantization import (
    EncodeContext,
    StateCodecs,
    keys_for,
    random_bits,
    random_halves,
    round_stochastically,
    step_keys,
)
from ..transforms.core import ChainResult, Measured, StepContext, run_chain
from .conversion import convert_entry
from .storage import STEP, Layout, StoredState, store_states
from .sweep import StepInputs, Sweep, Writes, added, carry_out

# Largest float32 stack of a chunk, the unit of every temporary. CPU: a chunk and its dozen temporaries should stay in
# the last-level cache. GPU: few launches, and a bounded peak.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**26}
ARENA_BYTES = 2**24  # more than a chunk's temporaries on a CPU


class Bucket:
    """The parameters of one group, shape, dtype and device, with their states stacked.

    `optimizer.state[p]` is the truth; its tensors are views into the stacks. `adopt` takes over entries that somebody
    else put there.
    """

    is_spread = False  # whether other ranks hold rows of these parameters
    refusal = ""  # why the backend that was chosen could not step them after all

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
        self.is_full_weight = is_full_weight
        self.layout = Layout.of(params[0].shape)
        self.device, self.dtype = params[0].device, params[0].dtype
        self.work_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.chain, self.stored = store_states(config, self.layout, codecs, is_full_weight)
        self.along_rows = {stored.spec.name for stored in self.stored if stored.spec.shape == "rows"}
        self.stacks: dict[str, Tensor] = {}
        self.initial: dict[str, float] = {}  # of each stack
        self.views: list[dict[str, Tensor]] = []
        self.first_row, self.held_rows = 0, self.layout.rows  # which rows of each matrix are here
        self.keys = torch.tensor(self.positions, dtype=torch.int64, device=self.device)

    def adopt(self, states: Sequence[dict[str, Tensor]]) -> int:
        """Makes the stacks hold what `optimizer.state[p]` holds; costs a comparison where nothing was replaced.

        Args:
            states: the state dictionaries of the bucket's parameters; empty ones are filled with initial values.

        Returns:
            How many parameters' states were stored in another way, and have been converted.
        """
        is_new, converted = not self.stacks, 0
        if is_new:
            self._allocate()
        for i, (state, views) in enumerate(zip(states, self.views, strict=True)):
            if all(state.get(name) is view for name, view in views.items()):
                continue
            converted += convert_entry(state, self.stored, self.layout)
            for name, view in views.items():
                if name in state:
                    self._load(i, name, torch.as_tensor(state[name]))
                elif not is_new:  # somebody has taken it out
                    self.stacks[name][i].fill_(self.initial[name])
                state[name] = view
        return converted

    def _load(self, index: int, name: str, value: Tensor) -> None:
        """Takes over a field of one parameter's states."""
        view = self.views[index][name]
        view.copy_(value.view_as(view))

    def _allocate(self) -> None:
        n, rows, cols = len(self.params), self.held_rows, self.layout.cols
        stacks: dict[str, Tensor] = {}
        for stored in self.stored:
            for name, (shape, dtype) in stored.fields(rows, cols).items():
                self.initial[name] = stored.spec.initial if stored.codec is None else 0
                stacks[name] = torch.full((n, *shape), self.initial[name], dtype=dtype, device=self.device)
        owners = {name: stored for stored in self.stored for name in self._names(stored)}
        views = [{name: self._shown(s, i, name, stacks[name][i]) for name, s in owners.items()} for i in range(n)]
        self.stacks, self.views = stacks, views  # all of them, or, where memory runs out, none
        if self.device.type == "cpu":
            # glibc gives freed memory back to the system and gets it again page by page, 60 of 120 ms in a step, until
            # it has seen so large a block freed; this one is never written and costs nothing
            torch.empty(ARENA_BYTES, dtype=torch.uint8)

    def _shown(self, stored: StoredState, index: int, name: str, held: Tensor) -> Tensor:
        """Returns a field of a parameter as `optimizer.state[p]` has it: a view of what the stack holds."""
        return held.view(self.layout.seen(tuple(held.shape)))

    def step(self, inputs: StepInputs, sweeps: list[Sweep]) -> tuple[dict[str, Tensor], Tensor]:
        """Steps the parameters that have a gradient.

        Args:
            inputs: the same as before where the step is an interrupted one.
            sweeps: how far each chunk has come, kept up to date; empty where the step begins.

        Returns:
            The pooled sums, and the sum of the squared changes of the weights  # each []
        """
        chunks = [chunk for run in self._runs() for chunk in self._chunks(*run)]
        sweeps += [Sweep(None if len(pieces) == 1 else []) for _, _, pieces in chunks[len(sweeps) :]]
        for (first, last, pieces), sweep in zip(chunks, sweeps, strict=True):
            if not sweep.is_over:
                self._step_chunk(slice(first, last), pieces, inputs, sweep)
        return functools.reduce(added, [sweep.pool for sweep in sweeps], {}), self._squares(sweeps)

    def _squares(self, sweeps: Sequence[Sweep]) -> Tensor:
        return torch.zeros((), dtype=self.work_dtype, device=self.device) + sum(sweep.squares for sweep in sweeps)

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
        count = limit // (row_bytes * max(1, self.held_rows))
        if not count and any(transform.needs_whole_matrix for transform in self.chain):
            count = 1
        if count:
            for first in range(start, stop, count):
                yield first, min(first + count, stop), [slice(0, self.held_rows)]
            return
        height = max(1, limit // row_bytes)
        rows = [slice(r, min(r + height, self.held_rows)) for r in range(0, self.held_rows, height)]
        for first in range(start, stop):
            yield first, first + 1, rows

    def _step_chunk(self, chunk: slice, pieces: list[slice], inputs: StepInputs, sweep: Sweep) -> None:
        step = self.stacks["step"][chunk] + inputs.finite
        while sums := self._sweep(chunk, pieces, step, inputs, sweep):
            assert sweep.totals is not None
            sweep.totals.append(sums)
        self._finish(chunk, sweep.joined(self.along_rows), step, inputs, sweep)

    def _sweep(
        self, chunk: slice, pieces: list[slice], step: Tensor, inputs: StepInputs, sweep: Sweep
    ) -> dict[str, Tensor]:
        """Runs the chain on one piece of rows after another, as far as the totals reach.

        Returns:
            Sums that a further sweep waits for, empty once the pieces are written  # each [n, ...]
        """
        sums: dict[str, Tensor] = {}
        for rows in pieces[sweep.written :]:
            context = self._gather(chunk, rows, step, inputs)
            result = run_chain(self.chain, context.grad, self._decode(chunk, rows), context, sweep.totals)
            if isinstance(result, Measured):
                sums = added(sums, result.matrix)
                continue
            pool = added(sweep.pool, result.pool)
            squares = sweep.squares + torch.linalg.vector_norm(result.update).square()
            writes = self._new_weights(chunk, rows, context, result, inputs)
            for stored in self.stored:
                if not stored.needs_whole_matrix:
                    writes += self._new_state(stored, chunk, rows, result.state[stored.spec.name], step, inputs)
            carry_out(writes)
            sweep.pool, sweep.squares, sweep.written = pool, squares, sweep.written + 1
            for stored in self.stored:
                if stored.needs_whole_matrix:
                    sweep.whole.setdefault(stored.spec.name, []).append(result.state[stored.spec.name])
        return sums

    def _finish(
        self, chunk: slice, whole: Mapping[str, Tensor], step: Tensor, inputs: StepInputs, sweep: Sweep
    ) -> None:
        """Writes the states that take whole matrices to encode, and counts the step."""
        writes: Writes = []
        for stored in self.stored:
            if stored.spec.name in whole:
                writes += self._new_whole_state(stored, chunk, whole[stored.spec.name], step, inputs)
        carry_out([*writes, (self.stacks["step"][chunk], step)])
        sweep.is_over = True

    def _gather(self, chunk: slice, rows: slice, step: Tensor, inputs: StepInputs) -> StepContext:
        """Stacks gradients and weights  # [n, rows, cols], float32"""
        params = self.params[chunk]
        grad = self._stack([p.grad for p in params if p.grad is not None], rows)
        if inputs.clip is not None:
            grad.mul_(inputs.clip)
        gain = None if inputs.row_gain is None else inputs.row_gain[chunk]
        if gain is not None and gain.shape[1] > 1:
            gain = gain[:, self._in_matrix(rows)]
        param, layout = self._stack(params, rows), self.layout
        first = self._in_matrix(rows).start
        return StepContext(grad, param, step, inputs.lr, layout.rows, layout.cols, first, gain)

    def _in_matrix(self, rows: slice) -> slice:
        """Counts rows that are here as rows of the whole matrix."""
        return slice(self.first_row + rows.start, self.first_row + rows.stop)

    def _stack(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        """Copies rows of parameters or gradients together  # [n, rows, cols], float32"""
        stack = torch.stack([self._cut(t, rows) for t in tensors])
        return stack.reshape(len(tensors), -1, self.layout.cols).to(self.work_dtype)

    def _cut(self, tensor: Tensor, rows: slice) -> Tensor:
        """Returns rows of a parameter or a gradient, the tensor itself where they are all."""
        return tensor if rows == slice(0, self.held_rows) else tensor[rows]

    def _decode(self, chunk: slice, rows: slice) -> dict[str, Tensor]:
        decoded = {}
        for stored in self.stored:
            fields = {name: self._part(name, stored, chunk, rows) for name in self._names(stored)}
            decoded[stored.spec.name] = stored.decode(fields, self.work_dtype)
        return decoded

    def _new_whole_state(
        self, stored: StoredState, chunk: slice, value: Tensor, step: Tensor, inputs: StepInputs
    ) -> Writes:
        return self._new_state(stored, chunk, slice(0, self.held_rows), value, step, inputs)

    def _new_state(
        self, stored: StoredState, chunk: slice, rows: slice, value: Tensor, step: Tensor, inputs: StepInputs
    ) -> Writes:
        """Encodes one new state of these rows, the old one where the step is skipped."""
        if stored.spec is STEP:
            return []
        parts = {name: self._part(name, stored, chunk, rows) for name in self._names(stored)}
        first = self._in_matrix(rows).start * self.layout.cols if stored.spec.shape == "matrix" else 0
        encoded = stored.encode(value, EncodeContext(parts, step, self._draw(stored, chunk, step, first)))
        return [(parts[name], choose(inputs.mask, new, parts[name])) for name, new in encoded.items()]

    def _draw(self, stored: StoredState, chunk: slice, step: Tensor, first: int) -> Callable[[int], Tensor]:
        """Returns what draws random numbers for a state, from an element's place in the whole matrix on."""

        def draw(numel: int) -> Tensor:
            keys = step_keys(self.config.seed, self.keys[chunk], step)
            return random_bits(keys_for(keys, stored.number), first, numel)

        return draw

    def _names(self, stored: StoredState) -> list[str]:
        return list(stored.fields(self.layout.rows, self.layout.cols))

    def _part(self, name: str, stored: StoredState, chunk: slice, rows: slice) -> Tensor:
        stack = self.stacks[name][chunk]
        return stack[:, rows] if stack.ndim > 1 and stored.spec.shape in ("matrix", "rows") else stack

    def _new_weights(
        self, chunk: slice, rows: slice, context: StepContext, result: ChainResult, inputs: StepInputs
    ) -> Writes:
        """Subtracts the step from the weights, in float32 or more, and rounds them."""
        stepped = context.param.sub_(choose_or_zero(inputs.mask, result.update))
        return self._rounded(self.params[chunk], rows, stepped, self.keys[chunk], context.step)

    def matrices(self, indices: Sequence[int]) -> Tensor:
        """Stacks some of the bucket's parameters as they are now: [k, rows, cols], float32."""
        return self._stack([self.params[i] for i in indices], slice(0, self.held_rows))

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Stacks the gradients of some of the bucket's parameters: [k, rows, cols], float32."""
        grads = [self.params[i].grad for i in indices]
        return self._stack([grad for grad in grads if grad is not None], slice(0, self.held_rows))

    def rewritten(self, indices: Sequence[int], values: Tensor) -> Writes:
        """Rounds new values of whole parameters after their step, by other draws than the step's.

        Args:
            indices: which of the bucket's parameters.
            values: their new values  # [k, rows, cols], float32
        """
        keys = torch.stack([self.keys[i] for i in indices])
        step = torch.stack([self.stacks["step"][i] for i in indices])
        rows = slice(0, self.held_rows)
        return self._rounded(
            [self.params[i] for i in indices], rows, values[:, self._in_matrix(rows)], keys, step, draw=1
        )

    def _rounded(
        self, params: Sequence[Tensor], rows: slice, values: Tensor, keys: Tensor, step: Tensor, draw: int = 0
    ) -> Writes:
        if self.dtype in (torch.bfloat16, torch.float16) and self.config.stochastic_rounding:
            first = draw * self.layout.shape.numel() + self._in_matrix(rows).start * self.layout.cols
            bits = random_halves(step_keys(self.config.seed, keys, step), first, values[0].numel())
            values = round_stochastically(values, self.dtype, bits.view(values.shape))
        targets = [self._cut(param, rows) for param in params]
        return [*zip(targets, values.reshape(len(targets), *targets[0].shape).unbind(), strict=True)]
