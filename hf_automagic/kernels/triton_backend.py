"""The Triton backend: the default chain as a constant number of launches over all tensors of all groups.

What a step moves, in bytes a parameter (g 4 bytes or 2, p likewise, the momentum's code 1):

| sweep | reads and writes | fp32 | bf16 |
|---|---|---|---|
| 1 squares | g | 4 | 2 |
| 2 residuals | g, code | 5 | 3 |
| 3 length | g, code | 5 | 3 |
| 4 write | g, p, code; p, code | 14 | 8 |
| all | | 28 | 16 |

Row and column averages add up to 4 bytes a parameter on LoRA of rank 16, nothing on full weights. At 3.0 TB/s, what a
copy reaches on an H100, that is 0.39 to 0.45 ms (fp32) and 0.22 to 0.28 ms (bf16) for the 41.9M elements of a LoRA of
rank 16 on all linear layers of Llama-3-8B, and 5.9 ms for 1.1B full weights in bf16. What is measured stands in
model_cards/speed.jsonl, written by scripts/benchmark_step.py.

The third sweep exists because the last clip divides by the RMS of the direction, which no row and column sums tell.
Every other sweep runs backwards, so that it begins with what the cache still holds.
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import AutomagicConfig
from ..transforms.self_tuning import LOG_RATIO
from . import fields as f
from .decide import decide, finish
from .plain import check_plain, step_plain
from .support import Stacked
from .sweeps import sum_residuals, sum_squares, sum_steps
from .table import PURPOSES, SLICE, Kind, Tables
from .vectors import average_residuals, average_squares, encode_vectors
from .write import write_steps

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILES_AT_ONCE = 8  # partial sums of a vector's element that are loaded together


class TritonStep:
    """Steps the parameters of some buckets; holds tables and the few numbers that stay on the device.

    Args:
        buckets: (number of the group, bucket) of one device, stacks allocated.
        n_groups: param groups of the optimizer.
    """

    def __init__(self, buckets: Sequence[tuple[int, Stacked]], n_groups: int) -> None:
        """Makes the tables."""
        self.tables = tables = Tables(buckets)
        self.group_of = [group for group, bucket in buckets for _ in bucket.params]
        self.numels = [p.numel() for p in tables.params]
        device, self.n_groups = tables.device, n_groups
        self.param_addresses = [p.data_ptr() for p in tables.params]
        self.grad_addresses: list[int] = []
        self.grads = torch.zeros(len(self.numels), dtype=torch.int64, device=device)
        self.gains = torch.zeros(2 * len(self.numels), dtype=torch.int64, device=device)
        self.group_values: list[float] = []
        self.groups = torch.zeros(n_groups * f.GROUP_WIDTH.value, device=device)
        self.control = torch.tensor([f.NOBODY.value, 0, 0, 0, -1, 0], dtype=torch.int64).to(device)
        self.rates = torch.zeros(n_groups, f.RATES_WIDTH.value, device=device)
        self.rate_views = [tuple(line.unbind()) for line in self.rates.unbind()]
        self.counter_views = list(self.control[1:].unbind())
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.clip = torch.ones((), device=device)
        self.totals = torch.zeros(n_groups, 3, device=device)
        self.stats = torch.zeros(len(self.numels) * f.STATS_WIDTH.value, device=device)
        self.nobody = torch.full((), -1, dtype=torch.int64, device=device)
        self.nothing = torch.zeros(n_groups, 3, device=device)
        self.kept: list[Tensor] = []

    def is_current(self) -> bool:
        """Whether the weights still lie where the tables say."""
        return [p.data_ptr() for p in self.tables.params] == self.param_addresses

    def take_gradients(self) -> bool:
        """Notes where the gradients are; uploads only when one has moved. Returns whether one came or went."""
        self.kept.clear()
        addresses = []
        for param, exact in zip(self.tables.params, self.tables.exact, strict=True):
            grad = param.grad
            if grad is None or not grad.numel():
                addresses.append(0)
                continue
            address = grad.data_ptr()
            if grad.dtype != param.dtype or not grad.is_contiguous() or (exact and address & 15):
                grad = torch.empty(param.shape, dtype=param.dtype, device=param.device).copy_(grad)
                self.kept.append(grad)
                address = grad.data_ptr()
            addresses.append(address)
        if addresses == self.grad_addresses:
            return False
        changed = list(map(bool, addresses)) != list(map(bool, self.grad_addresses))
        self.grads.copy_(self._on_device(addresses, torch.int64), non_blocking=True)
        self.grad_addresses = addresses
        return changed

    def take_gains(self, gains: Mapping[int, Tensor], places: Mapping[int, int]) -> None:
        """Notes where ALLoRA's gains of each bucket are.

        Args:
            gains: number of the bucket -> [n, rows] or [n, 1], float32.
            places: number of the bucket -> its first tensor.
        """
        lines = [0] * self.gains.numel()
        for bucket, values in gains.items():
            if bucket not in places:
                continue
            values = values.to(torch.float32).contiguous()
            self.kept.append(values)
            for i in range(values.shape[0]):
                lines[2 * (places[bucket] + i)] = values.data_ptr() + 4 * i * values.shape[1]
                lines[2 * (places[bucket] + i) + 1] = int(values.shape[1] > 1)
        self.gains.copy_(self._on_device(lines, torch.int64), non_blocking=True)

    def take_groups(self, values: list[float]) -> None:
        """Uploads the groups' numbers, where one has changed: rates of a scheduler, sizes of pools."""
        if values != self.group_values:
            self.groups.copy_(self._on_device(values, torch.float32), non_blocking=True)
            self.group_values = values

    def _on_device(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Copies numbers without waiting: from pinned memory, which the allocator keeps until they have been read."""
        host = torch.tensor(values, dtype=dtype)
        return host.pin_memory() if self.grads.is_cuda else host

    def numel_with_grad(self) -> list[int]:
        """Counts the elements of each group that take part  # [n_groups]"""
        counts = [0] * self.n_groups
        for group, numel, address in zip(self.group_of, self.numels, self.grad_addresses, strict=True):
            counts[group] += numel if address else 0
        return counts

    def look(self, outside: Tensor | None, outside_square: Tensor | None, multiplier: Tensor, max_norm: float | None) -> None:
        """Runs sweep 1 and decides: afterwards `finite`, `clip` and `rates` are those of this step.

        Args:
            outside: position of the first bad gradient among the parameters of others, -1 without one  # [], int64
            outside_square: sum of their squares  # []
            multiplier: of the context  # []
            max_norm: largest norm of all gradients, None for no clip.
        """
        t, device = self.tables, self.grads.device
        # scratch of this step alone: between steps the allocator gives it to others
        self.parts = torch.empty(3 * t.places, device=device)
        self.work = torch.empty(max(1, t.work_size), device=device)
        self.sums = torch.empty(f.SUM_PLANES.value * t.tiles, device=device)
        self.slice_sums = torch.empty(2, max(1, t.n_slices), device=device)
        for kind, programs in t.programs.items():
            if kind.is_matrix:
                sum_squares[(programs.numel() // 2,)](
                    programs, t.table, self.grads, self.parts, self.sums, self.control, t.tiles, **_shape(kind)
                )
            else:
                check_plain[(programs.numel(),)](
                    programs, t.table, self.grads, self.sums, self.control, DTYPES[kind.dtype], 1024
                )
        decide[(1,)](
            self.control,
            self.finite,
            self.clip,
            self.groups,
            self.rates,
            self.sums,
            t.tiles,
            self.n_groups,
            multiplier,
            self.nobody if outside is None else outside,
            self.nothing if outside_square is None else outside_square,
            0.0 if max_norm is None else float(max_norm),
            HAS_NORM=max_norm is not None,
        )

    def sweep(self) -> None:
        """Runs the other sweeps: states and weights are written."""
        t = self.tables
        some = (t.slices, t.table, self.grads)
        kinds = [(kind, programs) for kind, programs in t.programs.items() if kind.is_matrix]
        if t.n_slices:
            average_squares[(t.n_slices,)](
                *some, self.groups, self.parts, self.slice_sums[0], self.work, self.finite, self.clip, SLICE, TILES_AT_ONCE
            )
        for kind, programs in reversed(kinds):
            sum_residuals[(programs.numel() // 2,)](
                programs, t.table, self.grads, self.groups, self.parts, t.places, self.sums, t.tiles,
                self.slice_sums[0], self.work, self.finite, self.clip,
                **_shape(kind), KIND=kind.codec, ELEMENTS=kind.elements,
            )  # fmt: skip
        if t.n_slices:
            average_residuals[(t.n_slices,)](
                *some, self.groups, self.parts, t.places, self.sums, t.tiles, self.stats, self.slice_sums[1], self.work,
                self.finite, SLICE, TILES_AT_ONCE,
            )  # fmt: skip
        for kind, programs in kinds:
            sum_steps[(programs.numel() // 2,)](
                programs, t.table, self.grads, self.groups, self.stats, self.sums, t.tiles,
                self.slice_sums[0], self.slice_sums[1], self.work, self.finite, self.clip,
                **_shape(kind), KIND=kind.codec, CAUTIOUS=kind.cautious,
            )  # fmt: skip
        for kind, programs in reversed(kinds):
            write_steps[(programs.numel() // 2,)](
                programs, t.table, self.grads, self.gains, self.groups, self.rates, self.stats, self.sums, t.tiles,
                self.slice_sums[0], self.slice_sums[1], self.work, self.finite, self.clip,
                **_shape(kind), KIND=kind.codec, ELEMENTS=kind.elements, CAUTIOUS=kind.cautious, GAINS=kind.gains,
                ROUND=kind.rounds, CAUTIOUS_DECAY=kind.cautious_decay,
            )  # fmt: skip
        for kind, programs in t.programs.items():
            if not kind.is_matrix:
                step_plain[(programs.numel(),)](
                    programs, t.table, self.grads, self.groups, self.rates, self.stats, self.finite, self.clip,
                    DTYPES[kind.dtype], 1024, kind.elements, kind.cautious, kind.rounds, kind.cautious_decay,
                )  # fmt: skip
        if t.has_log16:
            encode_vectors[(t.n_slices,)](
                *some, self.slice_sums[0], self.slice_sums[1], self.work, self.finite, *PURPOSES.values(), SLICE
            )

    def finish(self, outside: Tensor | None, is_global: bool, events: Tensor | None) -> None:
        """Counts the step and tunes the next rates.

        Args:
            outside: pooled sums of the parameters of others  # [n_groups, 3]
            is_global: whether all groups share one tuned rate.
            events: the buffer to record in, None where somebody else does  # [capacity, 4]
        """
        t = self.tables
        finish[(1,)](
            t.table, self.grads, self.groups, self.rates, self.stats, self.nothing if outside is None else outside,
            self.totals, self.control, self.finite, self.totals if events is None else events, len(self.numels),
            self.n_groups, 512, is_global, events is not None, 0 if events is None else events.numel(),
        )  # fmt: skip
        del self.parts, self.work, self.sums, self.slice_sums
        self.kept.clear()


def _shape(kind: Kind) -> dict[str, Any]:
    return {"DTYPE": DTYPES[kind.dtype], "BR": kind.rows, "NB": kind.blocks, "BK": kind.block, "EXACT": kind.exact}


def group_constants(config: AutomagicConfig) -> list[float]:
    """Returns the columns of a group's line that follow from its options, from `fields.BETA1` on."""
    beta1, beta2, beta3 = config.betas
    logs = [math.log(beta) if beta else -math.inf for beta in config.betas]
    limit = math.floor(math.log(config.mask_band) / LOG_RATIO)
    clear = 2 * math.sqrt((1 - beta1) / (1 + beta1))
    return [
        beta1, 1 - beta1, 1 - beta2, 1 - beta3, *logs, config.clip_threshold, config.eps[1], config.weight_decay,
        clear, float(limit), float(config.sync_frequency),
    ]  # fmt: skip
