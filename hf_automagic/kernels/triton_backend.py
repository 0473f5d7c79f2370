"""The Triton backend: the default chain as a constant number of launches over all tensors of all groups.

What a step moves, in bytes a parameter (g 4 bytes or 2, p likewise, the momentum's code 1):

| sweep | reads and writes | fp32 | bf16 |
|---|---|---|---|
| 1 squares | g | 4 | 2 |
| 2 residuals | g, code | 5 | 3 |
| 3 write | g, p, code; p, code | 14 | 8 |
| all | | 23 | 13 |

Row and column averages add up to 4 bytes a parameter on LoRA of rank 16, nothing on full weights. At 3.0 TB/s, what a
copy reaches on an H100, that is 0.32 to 0.38 ms (fp32) and 0.18 to 0.24 ms (bf16) for the 41.9M elements of a LoRA of
rank 16 on all linear layers of Llama-3-8B, and 4.8 ms for 1.1B full weights in bf16. Measured in bf16 on an H100 on
2026-11-22: 0.35 ms (write 0.162, residuals 0.088, averages 0.046, squares 0.046) and 5.8 ms; see
model_cards/speed.jsonl, written by scripts/benchmark_step.py. Thin matrices lie further from the copy's speed.

The last clip divides by the RMS of the direction, which row and column sums tell nearly (see `transforms.Confidence`):
that spares a sweep. The cautious mask needs one more, to count what agrees. The second sweep runs backwards, so that
it begins with what the cache still holds. The host needs longer than the GPU: it looks at every weight and gradient,
and hands over two CUDA graphs (see `launch.Series`).
"""

import functools
import itertools
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import fields as f
from .decide import decide, finish
from .launch import IS_DIRECT, REMEMBERED, Launch, Series, Work
from .plain import check_plain, step_plain
from .support import Stacked, is_interpreted
from .sweeps import count_agreement, sum_residuals, sum_squares
from .table import PURPOSES, SLICE, Kind, Tables
from .vectors import average_residuals, average_squares, encode_vectors
from .write import write_steps

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_dtype = operator.attrgetter("dtype")
# chosen by timing 1 to 4 warps, 8 to 64 elements a thread, and caps on registers, on LoRA and on full weights
SQUARES, RESIDUALS, AGREEMENT = Work(1024, 4), Work(512, 1), Work(512, 1)
WRITE = Work(512, 2, registers=80)
AVERAGES = Work(SLICE, 4)
TOTALS = Work(4096, 16)


class TritonStep:
    """Steps the parameters of some buckets; holds tables and the few numbers that stay on the device.

    Args:
        buckets: (number of the group, bucket) of one device, stacks allocated.
        n_groups: param groups of the optimizer.
    """

    def __init__(self, buckets: Sequence[tuple[int, Stacked]], n_groups: int) -> None:
        """Makes the tables."""
        self.tables = tables = Tables(buckets, n_groups)
        self.params = tables.params
        self.positions = [i for _, bucket in buckets for i in bucket.positions]
        groups = [group for group, bucket in buckets for _ in bucket.params]
        self.of_groups = [slice(bisect_left(groups, i), bisect_right(groups, i)) for i in range(n_groups)]
        self.numels, self.dtypes = list(map(Tensor.numel, self.params)), list(map(_dtype, self.params))
        self.device, self.n_groups = tables.device, n_groups
        self.param_addresses = [p.data_ptr() for p in self.params]
        self.seen: list[int] = []  # where the gradients were in the step before
        self.is_plain = False  # whether the kernels read them there
        self.counts: list[int] = []
        self.group_values: list[float] = []
        self.kept: list[Tensor] = []
        self.series: tuple[Series, ...] = ()
        self.scratch: Tensor | None = None
        self.is_looking = False
        self.planned: dict[Any, tuple[Series, ...]] = {}
        new = self._new
        self.grads = new(len(self.numels), torch.int64)
        self.gains = new(2 * len(self.numels), torch.int64)
        self.groups = new(n_groups * f.GROUP_WIDTH.value)
        self.control = torch.tensor([f.NOBODY.value, 0, 0, 0, -1, 0, f.NOBODY.value], dtype=torch.int64).to(
            self.device
        )
        self.rates = new(n_groups * f.RATES_WIDTH.value).view(n_groups, -1)
        self.stats = new(len(self.numels) * f.STATS_WIDTH.value)
        self.totals = new(3 * n_groups).view(-1, 3)
        self.outside_pools = new(n_groups * f.POOL_WIDTH.value).view(n_groups, -1)
        self.finite, self.clip, self.multiplier = new((), torch.bool), new(()), new(()).fill_(1.0)
        self.clip.fill_(1.0)
        self.flag = self.finite.view(torch.uint8)  # the kernels' own view
        self.outside, self.outside_square = new((), torch.int64).fill_(-1), new(())
        self.rate_views = [tuple(line.unbind()) for line in self.rates.unbind()]
        self.counter_views = list(self.control[f.APPLIED.value : f.RECORDED.value + 1].unbind())

    def _new(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def is_current(self) -> bool:
        """Whether the weights still lie where the tables say."""
        return list(map(Tensor.data_ptr, self.params)) == self.param_addresses

    def are_gradients_in_place(self) -> bool:
        """Whether the gradients still lie where they were seen last."""
        return _places([p.grad for p in self.params])[0] == self.seen

    def take_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Notes where the gradients of `params` are; uploads only when one has moved."""
        addresses, present = _places(grads)
        is_dense = all(map(Tensor.is_contiguous, present))
        if self.is_plain and addresses == self.seen and is_dense:
            return
        self.is_plain, self.kept, places = False, [], addresses
        is_usual = len(present) == len(grads) and is_dense and not functools.reduce(operator.or_, addresses) & 15
        if not is_usual or list(map(_dtype, present)) != self.dtypes:
            places = self._copy_odd(grads, addresses)
        self.grads.copy_(self._on_host(places, torch.int64), non_blocking=True)
        self.counts = [sum(itertools.compress(self.numels[own], places[own])) for own in self.of_groups]
        self.seen, self.is_plain = addresses, not self.kept

    def _copy_odd(self, grads: Sequence[Tensor | None], addresses: Sequence[int]) -> list[int]:
        """Copies the gradients that the kernels could not read where they are; returns where all of them are then."""
        found = list(addresses)
        for i, (grad, param, exact) in enumerate(zip(grads, self.params, self.tables.exact, strict=True)):
            if grad is None:
                continue
            if grad.dtype != param.dtype or not grad.is_contiguous() or (exact and found[i] & 15):
                copy = torch.empty(param.shape, dtype=param.dtype, device=param.device).copy_(grad)
                self.kept.append(copy)
                found[i] = copy.data_ptr()
        return found

    def take_gains(self, gains: Mapping[int, Tensor], places: Mapping[int, int]) -> None:
        """Notes where ALLoRA's gains of each bucket are.

        Args:
            gains: number of the bucket -> [n, rows] or [n, 1], float32.
            places: number of the bucket -> its first tensor.
        """
        lines = [0] * self.gains.numel()
        self.held = [gains[bucket].to(torch.float32).contiguous() for bucket in gains if bucket in places]
        for bucket, values in zip((bucket for bucket in gains if bucket in places), self.held, strict=True):
            for i in range(values.shape[0]):
                lines[2 * (places[bucket] + i)] = values.data_ptr() + 4 * i * values.shape[1]
                lines[2 * (places[bucket] + i) + 1] = int(values.shape[1] > 1)
        self.gains.copy_(self._on_host(lines, torch.int64), non_blocking=True)

    def take_groups(self, values: list[float]) -> None:
        """Uploads the groups' numbers, where one has changed: rates of a scheduler, sizes of pools."""
        if values != self.group_values:
            self.groups.copy_(self._on_host(values, torch.float32), non_blocking=True)
            self.group_values = values

    def _on_host(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Copies numbers without waiting: from pinned memory, which the allocator keeps until they have been read."""
        host = torch.tensor(values, dtype=dtype)
        return host.pin_memory() if self.grads.is_cuda else host

    def open(self, max_norm: float | None, is_global: bool, events: Tensor | None) -> None:
        """Takes the scratch of one step, which `close` gives back; whatever may fail has been done afterwards.

        Args:
            max_norm: largest norm of all gradients, None for no clip.
            is_global: whether all groups share one tuned rate.
            events: the buffer to record in, None where somebody else does  # [capacity, 4]
        """
        if self.is_looking:  # an interrupted look may have left the offender of other gradients
            self.control[f.OFFENDER.value].fill_(f.NOBODY.value)
        self.scratch = torch.empty(self.tables.scratch_size, device=self.device)
        key = (max_norm, is_global, None if events is None else events.data_ptr())
        if key not in self.planned:
            if len(self.planned) >= REMEMBERED:
                self.planned.clear()
            self.planned[key] = self._plan_launches(self.scratch, max_norm, is_global, events)
        self.series = self.planned[key]
        for series in self.series:
            series.begin(self.scratch)

    def close(self) -> None:
        """Gives the scratch back: between steps others have it."""
        self.scratch, self.series = None, ()
        if not IS_DIRECT:  # such launches hold the scratch itself
            self.planned.clear()

    def look(self) -> None:
        """Runs sweep 1 and decides: afterwards `finite`, `clip` and `rates` are those of this step."""
        self.is_looking = True
        self.series[0].run()
        self.is_looking = False

    def sweep(self) -> None:
        """Runs the rest, from where an interrupted call got to: writes states and weights, tunes the next rates."""
        self.series[1].run()

    def _plan_launches(
        self, scratch: Tensor, max_norm: float | None, is_global: bool, events: Tensor | None
    ) -> tuple[Series, ...]:
        """Lists what a step launches: to look, to sweep."""
        t, n = self.tables, self.tables.n_slices
        parts, work, sums, squares, residuals = t.cut(scratch)
        look, sweep = [], []
        some = (t.slices, t.table, self.grads)
        group = (self.groups, self.rates, self.stats)
        kinds = [kind for kind in t.programs if kind.is_matrix]
        plain = [kind for kind in t.programs if not kind.is_matrix]

        def matrices(kernel: Any, work: Work, kind: Kind, *arguments: Any) -> Launch:
            of = t.programs[kind]
            return Launch(kernel, of.numel() // 2, (of, t.table, self.grads, *arguments), work)

        look += [
            matrices(sum_squares, SQUARES, kind, parts, sums, self.control, *_shape(kind, SQUARES)) for kind in kinds
        ]
        for kind in plain:
            of = t.programs[kind]
            arguments = (of, t.table, self.grads, sums, self.control, DTYPES[kind.dtype], 1024)
            look.append(Launch(check_plain, of.numel(), arguments))
        numbers = (self.multiplier, self.outside, self.outside_square, max_norm or 0.0, max_norm is not None)
        arguments = (self.control, self.flag, self.clip, self.groups, self.rates, sums, t.tiles, self.n_groups)
        look.append(Launch(decide, 1, (*arguments, *numbers)))
        if kinds:
            arguments = (self.groups, parts, squares, work, self.flag, self.clip, SLICE)
            sweep.append(Launch(average_squares, n, (*some, *arguments), AVERAGES))
            common = (squares, work, self.flag, self.clip)
            sweep += [
                matrices(
                    sum_residuals, RESIDUALS, kind, self.groups, parts, t.places, sums, t.tiles, *common,
                    *_shape(kind, RESIDUALS), kind.codec, kind.elements, kind.measures,
                )
                for kind in reversed(kinds)
            ]  # fmt: skip
            arguments = (parts, t.places, sums, t.tiles, self.stats, residuals, n, work, self.flag, SLICE)
            sweep.append(Launch(average_residuals, n, (*some, self.groups, *arguments, t.measures), AVERAGES))
            sweep += [
                matrices(
                    count_agreement, AGREEMENT, kind, self.groups, self.stats, sums, t.tiles, *common,
                    *_shape(kind, AGREEMENT), kind.codec,
                )
                for kind in kinds if kind.cautious
            ]  # fmt: skip
            arguments = (*group, sums, t.tiles, squares, residuals, n, work, self.flag, self.clip)
            sweep += [
                matrices(
                    write_steps, WRITE, kind, self.gains, *arguments, *_shape(kind, WRITE),
                    kind.codec, kind.elements, kind.cautious, kind.gains, kind.rounds, kind.cautious_decay,
                    kind.paired,
                )
                for kind in kinds
            ]  # fmt: skip
        for kind in plain:
            of = t.programs[kind]
            flags = (DTYPES[kind.dtype], 1024, kind.elements, kind.cautious, kind.rounds, kind.cautious_decay)
            arguments = (of, t.table, self.grads, *group, sums, t.tiles, self.flag, self.clip, *flags)
            sweep.append(Launch(step_plain, of.numel(), arguments))
        if t.has_log16:
            arguments = (squares, residuals, work, self.flag, *PURPOSES.values(), SLICE)
            sweep.append(Launch(encode_vectors, n, (*some, *arguments)))
        arguments = (
            t.table, self.grads, *group, sums, t.tiles, t.ranges, self.outside_pools, self.totals, self.control,
            self.flag, self.totals if events is None else events, len(self.numels), self.n_groups, TOTALS.elements,
            t.measures, is_global, events is not None, 0 if events is None else events.numel(),
        )  # fmt: skip
        sweep.append(Launch(finish, 2, arguments, TOTALS))
        return Series(look, scratch), Series(sweep, scratch)


def _places(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Returns where tensors lie, 0 for none, and those that are there; quick where all are."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) == len(tensors):
        return list(map(Tensor.data_ptr, present)), present
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors], present


def _shape(kind: Kind, work: Work) -> tuple[Any, ...]:
    """Returns the constants that every sweep ends with."""
    rows = max(1, work.elements // (kind.blocks * kind.block))
    rows = kind.rows if is_interpreted() else min(kind.rows, rows)  # the interpreter is as quick with many
    return DTYPES[kind.dtype], rows, kind.blocks, kind.block, kind.exact
