"""Sharded buckets: the step of parameters whose rows lie on several ranks, in a few all-reduces for all together."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantization import EncodeContext
from .bucket import Bucket
from .distributed import RankSums, Shard, local, whole
from .storage import StoredState
from .sweep import StepInputs, Sweep, Writes

Sums = dict[str, Tensor]
Measured = tuple[Sums, Tensor]  # what a bucket's step returns

SQUARES = "squares"  # the squared changes among the sums that cross ranks


class ShardedBucket(Bucket):
    """A bucket of DTensors: it holds some rows of each matrix, and their states beside them.

    States with rows are DTensors placed like the parameter, so that torch's distributed checkpoints cut and join them
    for any number of ranks. All other states are plain tensors, equal on every rank, since they follow from sums over
    all ranks. How a state is stored and which random numbers round it depend on its place in the whole matrix alone.
    What differs from one process is the order in which sums over rows are added: about 1e-7 of a step.

    A step that was interrupted, as for lack of memory, is not finished later (see `open_step.py`): the ranks would
    have to agree on where it broke. Go back to a checkpoint then.
    """

    def __init__(self, shard: Shard, ranks: RankSums | None, *bucket: Any) -> None:
        """Plans as a bucket does.

        Args:
            shard: the rows of each parameter that lie here.
            ranks: adds up over the ranks that hold the others, None where all rows are here.
            *bucket: what `Bucket` takes.

        Raises:
            ValueError: an option needs all rows of a matrix at once.
        """
        super().__init__(*bucket)
        self.first_row, self.held_rows = shard.first_row, shard.rows
        self.ranks = None if shard.axis is None else ranks
        self.is_spread = self.ranks is not None
        if not self.is_spread:
            return
        if any(transform.needs_whole_matrix for transform in self.chain):
            raise ValueError(
                f"spatial_axes {self.config.spatial_axes} name axis 0, along which a parameter of shape "
                f"{tuple(self.layout.shape)} is cut over {len(shard.ranks)} ranks; leave axis 0 out, or keep the "
                "parameter whole with fully_shard(..., ignored_params=...)"
            )

    def sweep(self, inputs: StepInputs, sweeps: list[Sweep]) -> Generator[Sums, Sums, Measured]:
        """Steps the parameters that have a gradient, in as many sweeps over its rows as there are sums to wait for.

        Args:
            inputs: what the step hands to this bucket.
            sweeps: empty; tells afterwards how far each chunk has come.

        Yields:
            Sums over the rows that lie here; takes those over all ranks in return.

        Returns:
            The pooled sums, and the sum of the squared changes of the weights  # each []
        """
        chunks = [chunk for run in self._runs() for chunk in self._chunks(*run)]
        if not chunks:
            return {}, self._squares(())
        sweeps += [Sweep([]) for _ in chunks]
        steps = [self.stacks["step"][first:last] + inputs.finite for first, last, _ in chunks]
        while True:
            sums = [
                self._sweep(slice(first, last), pieces, step, inputs, sweep)
                for (first, last, pieces), step, sweep in zip(chunks, steps, sweeps, strict=True)
            ]
            if not sums[0]:
                break
            totals = yield {name: torch.cat([part[name] for part in sums]) for name in sums[0]}
            for sweep, some in zip(sweeps, _apart(totals, chunks), strict=True):
                assert sweep.totals is not None
                sweep.totals.append(some)
        found = [sweep.joined(self.along_rows) for sweep in sweeps]
        coded = [s.spec.name for s in self.stored if s.needs_whole_matrix and s.spec.shape == "rows"]
        rows = {name: torch.cat([self._placed(here[name]) for here in found]) for name in coded}
        pool = {name: torch.stack([s.pool[name] for s in sweeps]).sum() for name in sweeps[0].pool}
        added = yield pool | rows | {SQUARES: self._squares(sweeps)}
        all_rows = _apart({name: added[name] for name in coded}, chunks)
        for (first, last, _), step, here, joined, sweep in zip(chunks, steps, found, all_rows, sweeps, strict=True):
            self._finish(slice(first, last), here | joined, step, inputs, sweep)
        return {name: added[name] for name in pool}, added[SQUARES]

    def matrices(self, indices: Sequence[int]) -> Tensor:
        """Stacks whole parameters, which every rank must ask for: [k, rows, cols], float32."""
        return self._joined(super().matrices(indices))

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Stacks whole gradients, which every rank must ask for: [k, rows, cols], float32."""
        return self._joined(super().gradients(indices))

    def _joined(self, rows: Tensor) -> Tensor:
        if self.ranks is None:
            return rows
        after = self.layout.rows - self.first_row - self.held_rows
        return self.ranks.add([torch.nn.functional.pad(rows, (0, 0, self.first_row, after))])[0]

    def _placed(self, rows: Tensor) -> Tensor:
        """Puts what these rows have among zeros for all others: [n, held rows] -> [n, rows]."""
        after = self.layout.rows - self.first_row - self.held_rows
        return torch.nn.functional.pad(rows, (self.first_row, after))

    def _stack(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        return super()._stack([local(tensor) for tensor in tensors], rows)

    def _rounded(self, params: Sequence[Tensor], *values: Any, **draw: Any) -> Writes:
        return super()._rounded([local(param) for param in params], *values, **draw)

    def _new_whole_state(
        self, stored: StoredState, chunk: slice, value: Tensor, step: Tensor, inputs: StepInputs
    ) -> Writes:
        """Encodes a vector along all rows, and keeps those that lie here; others follow from sums that all know."""
        if stored.spec.shape != "rows":
            return super()._new_whole_state(stored, chunk, value, step, inputs)
        context = EncodeContext({}, step, self._draw(stored, chunk, step, 0))
        writes = []
        for name, encoded in stored.encode(value, context).items():
            if encoded.ndim > 1:
                encoded = encoded[:, self.first_row : self.first_row + self.held_rows]
            held = self.stacks[name][chunk]
            writes.append((held, torch.where(inputs.finite, encoded, held)))
        return writes

    def _shown(self, stored: StoredState, index: int, name: str, held: Tensor) -> Tensor:
        """Returns a field of a parameter as `optimizer.state[p]` has it: a DTensor where it has rows."""
        from torch.distributed.tensor import DTensor, Replicate

        shape = stored.fields(self.layout.rows, self.layout.cols)[name][0]
        if not (shape and stored.spec.shape in ("matrix", "rows")):
            return held
        param, seen = self.params[index], self.layout.seen(shape)
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        return DTensor.from_local(
            held.view(self.held_rows, *seen[1:]),
            mesh,
            [placement if placement.is_shard(0) else Replicate() for placement in placements],
            run_check=False,
            shape=torch.Size(seen),
            stride=torch.empty(seen, device="meta").stride(),
        )

    def _load(self, index: int, name: str, value: Tensor) -> None:
        """Takes over a field that was placed like the parameter, or otherwise, or that is whole."""
        held, view = self.stacks[name][index], self.views[index][name]
        mine, theirs = ((getattr(t, "device_mesh", None), getattr(t, "placements", None)) for t in (view, value))
        if mine != theirs:
            value = whole(value)
            if mine[0] is not None:
                value = value[self.first_row : self.first_row + self.held_rows]
        held.copy_(local(value).reshape(held.shape))


def _apart(sums: Sums, chunks: Sequence[tuple[int, int, list[slice]]]) -> list[Sums]:
    """Takes apart what was put together chunk after chunk."""
    sizes = [last - first for first, last, _ in chunks]
    split = {name: value.split(sizes) for name, value in sums.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(chunks))]


def step_together(
    buckets: Sequence[Bucket],
    inputs: Sequence[StepInputs],
    sweeps: Sequence[list[Sweep]],
    ranks: RankSums | None,
) -> list[Measured]:
    """Steps buckets, the sharded ones side by side: each of their sweeps waits for one all-reduce of all their sums.

    Args:
        buckets: the same on every rank, in the same order.
        inputs: what the step hands to each.
        sweeps: how far the chunks of each have come, kept up to date.
        ranks: adds up over the ranks, None for plain tensors.

    Returns:
        The pooled sums of each bucket, and the sum of the squared changes of its weights.
    """
    found: dict[int, Measured] = {}
    waiting: dict[int, Generator[Sums, Sums, Measured]] = {}
    for i, (bucket, its, done) in enumerate(zip(buckets, inputs, sweeps, strict=True)):
        if isinstance(bucket, ShardedBucket) and bucket.is_spread:
            waiting[i] = bucket.sweep(its, done)
        else:
            found[i] = bucket.step(its, done)
    answers: dict[int, Any] = dict.fromkeys(waiting)
    while answers:
        asked: dict[int, Sums] = {}
        for i, answer in answers.items():
            try:
                asked[i] = waiting[i].send(answer)
            except StopIteration as stop:
                found[i] = stop.value
        assert ranks is not None
        totals = iter(ranks.add([value for sums in asked.values() for value in sums.values()]))
        answers = {i: {name: next(totals) for name in sums} for i, sums in asked.items()}
    return [found[i] for i in range(len(buckets))]
