"""Sharded buckets: the step of parameters whose rows lie on several ranks, in a few all-reduces for all together."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantization import EncodeContext
from .bucket import Bucket
from .distributed import RankSums, Shard, local, whole
from .storage import StoredState
from .sweep import StepInputs

Sums = dict[str, Tensor]


class ShardedBucket(Bucket):
    """A bucket of DTensors: it holds some rows of each matrix, and their states beside them.

    States with rows are DTensors placed like the parameter, so that torch's distributed checkpoints cut and join them
    for any number of ranks. All other states are plain tensors, equal on every rank, since they follow from sums over
    all ranks. How a state is stored and which random numbers round it depend on its place in the whole matrix alone.
    What differs from one process is the order in which sums over rows are added: about 1e-7 of a step.
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

    def sweep(self, inputs: StepInputs) -> Generator[Sums, Sums, Sums]:
        """Steps the parameters that have a gradient, in as many sweeps over its rows as there are sums to wait for.

        Yields:
            Sums over the rows that lie here; takes those over all ranks in return.

        Returns:
            The pooled sums  # each []
        """
        chunks = [chunk for run in self._runs() for chunk in self._chunks(*run)]
        if not chunks:
            return {}
        steps = [self.stacks["step"][first:last] + inputs.finite for first, last, _ in chunks]
        totals: list[Sums] = []
        while True:
            swept, place = [], 0
            for (first, last, pieces), step in zip(chunks, steps, strict=True):
                here = slice(place, place := place + last - first)
                known = [{name: total[here] for name, total in sums.items()} for sums in totals]
                swept.append(self._sweep(slice(first, last), pieces, step, inputs, known))
            if not swept[0].sums:
                break
            totals.append((yield {name: torch.cat([s.sums[name] for s in swept]) for name in swept[0].sums}))
        coded = [s.spec.name for s in self.stored if s.needs_whole_matrix and s.spec.shape == "rows"]
        rows = {name: torch.cat([self._placed(s.whole[name]) for s in swept]) for name in coded}
        pool = {name: torch.stack([s.pool[name] for s in swept]).sum() for name in swept[0].pool}
        added = yield pool | rows
        place = 0
        for (first, last, _), step, result in zip(chunks, steps, swept, strict=True):
            here = slice(place, place := place + last - first)
            found = result.whole | {name: added[name][here] for name in coded}
            self._finish(slice(first, last), found, step, inputs)
        return {name: added[name] for name in pool}

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

    def _write(self, params: Sequence[Tensor], *values: Any, **draw: Any) -> None:
        super()._write([local(param) for param in params], *values, **draw)

    def _store_whole(self, stored: StoredState, chunk: slice, value: Tensor, step: Tensor, inputs: StepInputs) -> None:
        """Encodes a vector along all rows, and keeps those that lie here; others follow from sums that all know."""
        if stored.spec.shape != "rows":
            super()._store_whole(stored, chunk, value, step, inputs)
            return
        context = EncodeContext({}, step, self._draw(stored, chunk, step, 0))
        for name, encoded in stored.encode(value, context).items():
            if encoded.ndim > 1:
                encoded = encoded[:, self.first_row : self.first_row + self.held_rows]
            held = self.stacks[name][chunk]
            held.copy_(torch.where(inputs.finite, encoded, held))

    def _shown(self, stored: StoredState, index: int, name: str) -> Tensor:
        """Returns a field of a parameter as `optimizer.state[p]` has it: a DTensor where it has rows."""
        from torch.distributed.tensor import DTensor, Replicate

        shape = stored.fields(self.layout.rows, self.layout.cols)[name][0]
        if not (shape and stored.spec.shape in ("matrix", "rows")):
            return self.stacks[name][index]
        param, seen = self.params[index], self.layout.seen(shape)
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        return DTensor.from_local(
            self.stacks[name][index].view(self.held_rows, *seen[1:]),
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


def step_together(
    buckets: Sequence[Bucket], inputs: Sequence[StepInputs], ranks: RankSums | None
) -> list[dict[str, Tensor]]:
    """Steps buckets, the sharded ones side by side: each of their sweeps waits for one all-reduce of all their sums.

    Args:
        buckets: the same on every rank, in the same order.
        inputs: what the step hands to each.
        ranks: adds up over the ranks, None for plain tensors.

    Returns:
        The pooled sums of each bucket.
    """
    if ranks is None:
        return [bucket.step(its) for bucket, its in zip(buckets, inputs, strict=True)]
    pools: dict[int, Sums] = {}
    sweeps: dict[int, Generator[Sums, Sums, Sums]] = {}
    for i, (bucket, its) in enumerate(zip(buckets, inputs, strict=True)):
        if isinstance(bucket, ShardedBucket) and bucket.is_spread:
            sweeps[i] = bucket.sweep(its)
        else:
            pools[i] = bucket.step(its)
    answers: dict[int, Any] = dict.fromkeys(sweeps)
    while answers:
        asked: dict[int, Sums] = {}
        for i, answer in answers.items():
            try:
                asked[i] = sweeps[i].send(answer)
            except StopIteration as stop:
                pools[i] = stop.value
        totals = iter(ranks.add([value for sums in asked.values() for value in sums.values()]))
        answers = {i: {name: next(totals) for name in sums} for i, sums in asked.items()}
    return [pools[i] for i in range(len(buckets))]
