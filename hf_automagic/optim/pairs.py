"""Pairs: the one object that sees both factors of a LoRA, A and its B, which lie in two buckets."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..transforms.lora import allora_gains, effective_rank, product_spectrum, shrink_spectrum, stable_rank
from .bucket import CHUNK_BYTES, Bucket
from .roles import Role
from .sweep import carry_out

ALIGNED = ("pairs", "scalings", "ranks", "names")  # lists of a param group with one entry for each parameter


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """The pairs whose A lies in one bucket and whose B in another; a pair follows the options of its B's group.

    Args:
        a_bucket: number of the bucket of the A, [r, in] each; a convolution's is flattened.
        b_bucket: number of the bucket of the B, [out, r] each.
        a: places of the A in their bucket.
        b: places of the B in theirs, in the same order.
        scaling: what the forward pass multiplies each B A with  # [k], float32
    """

    a_bucket: int
    b_bucket: int
    a: tuple[int, ...]
    b: tuple[int, ...]
    scaling: Tensor


@dataclasses.dataclass(frozen=True)
class PairRanks:
    """Diagnostics of the products B A, on the device.

    Args:
        positions: stable number of each pair's B among the optimizer's parameters.
        effective_rank: exp(entropy of the singular values)  # [k], float32
        stable_rank: sum of their squares over the largest square  # [k], float32
    """

    positions: tuple[int, ...]
    effective_rank: Tensor
    stable_rank: Tensor


def check_aligned(group: Mapping[str, Any]) -> None:
    """Raises where a list that tells of a group's parameters one by one has another length than the group.

    Raises:
        ValueError: with the list's name and both lengths.
    """
    for name in ALIGNED:
        if name in group and len(group[name]) != len(group["params"]):
            raise ValueError(
                f"{name} of a param group must have an entry for each parameter, got {len(group[name])} for "
                f"{len(group['params'])}; take groups from hf_automagic.param_groups(model)"
            )


class PairView:
    """Reads and writes pairs through the buckets, which are found by position; planned anew whenever they are.

    Every method computes from the weights as they are, so that nothing needs to be saved.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], buckets: Sequence[tuple[int, Bucket]]) -> None:
        """Finds the pairs.

        Args:
            groups: filled param groups; their lists `pairs` and `scalings` tell which product a factor belongs to.
            buckets: (number of the group, bucket), which hold all parameters of the groups.

        Raises:
            ValueError: two factors of one kind share a pair's number, or the ranks of A and B differ.
        """
        self.group_of = [index for index, _ in buckets]
        self.buckets = [bucket for _, bucket in buckets]
        self.batches = self._plan(_listed_factors(groups))

    def row_gains(self) -> dict[int, Tensor]:
        """Returns ALLoRA's gains of each bucket with pairs: [n, rows] for B, [n, 1] for A."""
        found: dict[int, dict[int, Tensor]] = {}
        for batch in self.batches:
            config = self.buckets[batch.b_bucket].config
            if not config.allora:
                continue
            for some in self._chunks(batch, range(len(batch.a))):
                a, b = self._factors(batch, some)
                with _full_precision(b):
                    rows, whole = allora_gains(a, b, batch.scaling[some[0] : some[-1] + 1], config.eta)
                for i, row, one in zip(some, rows.unbind(), whole.unbind(), strict=True):
                    found.setdefault(batch.b_bucket, {})[batch.b[i]] = row
                    gain = one.reshape(1).to(self.buckets[batch.a_bucket].device, non_blocking=True)
                    found.setdefault(batch.a_bucket, {})[batch.a[i]] = gain
        return {number: self._spread(self.buckets[number], gains) for number, gains in found.items()}

    def shrink_spectra(self, rates: Sequence[Tensor], finite: Tensor, steps: int, done: set[tuple[int, int]]) -> None:
        """Takes the rank penalty off the pairs that stepped, where it is due; may wait for the device.

        Args:
            rates: the rate that each group really applied; A's counts  # each []
            finite: whether this step may change anything  # [], bool
            steps: calls of step() so far, this one included.
            done: what an interrupted step has shrunk, which is left alone; kept up to date.
        """
        for number, batch in enumerate(self.batches):
            config = self.buckets[batch.b_bucket].config
            if config.lora_rank_penalty and steps % config.rank_penalty_every == 0:
                stepped = [i for i in range(len(batch.a)) if self._has_grads(batch, i)]
                for some in self._chunks(batch, stepped):
                    if (number, some[0]) not in done:
                        self._shrink(batch, some, config, rates[self.group_of[batch.a_bucket]], finite)
                        done.add((number, some[0]))

    def ranks(self) -> PairRanks | None:
        """Measures the ranks of all products B A, for a snapshot; None without pairs.

        None as well where pairs are sharded: one rank that logs must not wait for the others.
        """
        if any(bucket.is_spread for bucket in self.buckets):
            return None
        positions: list[int] = []
        spectra: list[Tensor] = []
        for batch in self.batches:
            positions += [self.buckets[batch.b_bucket].positions[i] for i in batch.b]
            for some in self._chunks(batch, range(len(batch.a))):
                a, b = self._factors(batch, some)
                with _full_precision(b):
                    spectra.append(product_spectrum(a, b))
        if not spectra:
            return None
        device = spectra[0].device
        effective, stable = (
            torch.cat([rank(sigma).to(device=device, dtype=torch.float32) for sigma in spectra])
            for rank in (effective_rank, stable_rank)
        )
        return PairRanks(tuple(positions), effective, stable)

    def _shrink(
        self, batch: PairBatch, some: Sequence[int], config: AutomagicConfig, rate: Tensor, finite: Tensor
    ) -> None:
        """Shrinks some pairs; a weight whose change is zero keeps its bits.

        A gradient of A that is zero everywhere means that B was zero before this step, and such a pair is left alone.
        """
        a, b = self._factors(batch, some)
        sees_loss = self.buckets[batch.a_bucket].gradients([batch.a[i] for i in some]).ne(0).flatten(1).any(-1)
        moves = (finite.to(b.device) & sees_loss.to(b.device))[:, None, None]
        amount = rate.to(b.device) * (config.rank_penalty_every * config.rank_penalty_strength)
        with _full_precision(b):
            to_a, to_b = shrink_spectrum(a, b, amount, config.low_rank_emphasis)
        writes = []
        for number, places, old, change in ((batch.a_bucket, batch.a, a, to_a), (batch.b_bucket, batch.b, b, to_b)):
            bucket = self.buckets[number]
            new = torch.where(moves & (change != 0), old + change, old)
            writes += bucket.rewritten([places[i] for i in some], new.to(bucket.device))
        carry_out(writes)

    def _factors(self, batch: PairBatch, some: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Stacks A [k, r, in] and B [k, out, r] of some pairs of a batch, on B's device."""
        b = self.buckets[batch.b_bucket].matrices([batch.b[i] for i in some])
        a = self.buckets[batch.a_bucket].matrices([batch.a[i] for i in some])
        return a.to(device=b.device, dtype=b.dtype), b

    def _chunks(self, batch: PairBatch, chosen: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cuts some pairs of a batch so that a stack of factors stays as small as a bucket's chunk."""
        a, b = self.buckets[batch.a_bucket].layout, self.buckets[batch.b_bucket].layout
        limit = CHUNK_BYTES.get(self.buckets[batch.b_bucket].device.type, CHUNK_BYTES["cuda"])
        count = max(1, limit // (4 * max(a.shape.numel(), b.shape.numel())))
        for first in range(0, len(chosen), count):
            yield chosen[first : first + count]

    def _spread(self, bucket: Bucket, gains: Mapping[int, Tensor]) -> Tensor:
        """Lines the gains up with the bucket's parameters, ones where a parameter has no partner."""
        like = next(iter(gains.values()))
        return torch.stack([gains[i] if i in gains else torch.ones_like(like) for i in range(len(bucket.params))])

    def _has_grads(self, batch: PairBatch, i: int) -> bool:
        a, b = self.buckets[batch.a_bucket].params[batch.a[i]], self.buckets[batch.b_bucket].params[batch.b[i]]
        return a.grad is not None and b.grad is not None

    def _plan(self, listed: Iterable[tuple[int, Role, int, float]]) -> list[PairBatch]:
        place = {p: (n, i) for n, bucket in enumerate(self.buckets) for i, p in enumerate(bucket.positions)}
        factors: tuple[dict[int, tuple[int, float]], ...] = ({}, {})  # of A, of B: pair -> (position, scaling)
        for position, role, pair, scaling in listed:
            if position not in place:
                continue  # frozen since, as an adapter that was switched off
            side = factors[role.is_lora_B]
            if pair in side:
                raise ValueError(
                    f"two parameters of role {role.value} have the pair number {pair}; number every product B A anew"
                )
            side[pair] = (position, scaling)
        batches: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
        for pair in sorted(factors[0].keys() & factors[1].keys()):
            (a_bucket, a), (b_bucket, b) = place[factors[0][pair][0]], place[factors[1][pair][0]]
            self._check_ranks(pair, self.buckets[a_bucket], self.buckets[b_bucket])
            batches.setdefault((a_bucket, b_bucket), []).append((a, b, factors[1][pair][1]))
        return [self._batch(*numbers, members) for numbers, members in batches.items()]

    def _check_ranks(self, pair: int, a: Bucket, b: Bucket) -> None:
        if a.layout.rows != b.layout.cols:
            raise ValueError(
                f"pair {pair} has an A of shape {tuple(a.layout.shape)} and a B of shape {tuple(b.layout.shape)}: the "
                "first axis of A and the second of B must be the rank; give both the pair number -1 where B A is not "
                "their product"
            )

    def _batch(self, a_bucket: int, b_bucket: int, members: list[tuple[int, int, float]]) -> PairBatch:
        bucket = self.buckets[b_bucket]
        scaling = torch.tensor([s for _, _, s in members], dtype=bucket.work_dtype, device=bucket.device)
        return PairBatch(a_bucket, b_bucket, tuple(a for a, _, _ in members), tuple(b for _, b, _ in members), scaling)


def _listed_factors(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Role, int, float]]:
    """Yields (position, role, pair, scaling) of every factor that says that it has a partner."""
    position = 0
    for group in groups:
        role, count = Role(group["role"]), len(group["params"])
        is_factor = role.is_lora_B or role in (Role.LORA_A, Role.EMBEDDING_A)
        scalings = group.get("scalings", [1.0] * count)
        for i, pair in enumerate(group.get("pairs", ()) if is_factor else ()):
            if pair >= 0:
                yield position + i, role, pair, scalings[i]
        position += count


def _full_precision(like: Tensor) -> torch.autocast:
    """Keeps a step that is taken inside an autocast region from multiplying in half precision."""
    return torch.autocast(like.device.type, enabled=False)
