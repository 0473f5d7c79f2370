"""One run: a task, an arm, a starting rate, a seed, a horizon; on a GPU recorded once and replayed."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .arms import ARMS, trainable
from .tasks import TASKS

WARM_UP = 0.05  # share of the horizon; then a cosine to zero
BURST = 20  # steps that are handed to the device at once
MOMENTS = 30  # points of a curve that are written down


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run.

    Args:
        task: name of a task.
        arm: name of an arm.
        lr: starting rate.
        seed: of the fresh weights and of the order of the batches; arms share both.
        horizon: steps.
    """

    task: str
    arm: str
    lr: float
    seed: int
    horizon: int

    @property
    def key(self) -> str:
        """Names the run in the file of results."""
        return f"{self.task}|{self.arm}|{self.lr:g}|{self.seed}|{self.horizon}"


def schedule(horizon: int) -> Tensor:
    """Returns the factor of each step  # [horizon], float32"""
    warm = math.ceil(WARM_UP * horizon)
    steps = torch.arange(horizon, dtype=torch.float32)
    cosine = 0.5 * (1 + torch.cos(math.pi * (steps - warm) / max(1, horizon - warm)))
    return torch.where(steps < warm, (steps + 1) / (warm + 1), cosine)


def order_of_batches(examples: int, batch_size: int, horizon: int, seed: int) -> Tensor:
    """Returns which examples each step sees, epoch after epoch  # [horizon, batch_size], int64"""
    draw, picked = torch.Generator().manual_seed(seed), []
    while sum(map(len, picked)) < batch_size * horizon:
        picked.append(torch.randperm(examples, generator=draw))
    return torch.cat(picked)[: batch_size * horizon].view(horizon, batch_size)


class Run:
    """A run that hands its steps to the device in bursts, so that one process keeps several going."""

    def __init__(self, job: Job, folder: Path, device: torch.device) -> None:
        """Builds model, optimizer and everything that a step reads, on the device."""
        self.job, self.device, self.task, arm = job, device, TASKS[job.task], ARMS[job.arm]
        # one of its own, so that it can be recorded; bitsandbytes launches on the usual one, whatever is current
        self.stream = torch.cuda.Stream() if arm.records and device.type == "cuda" else None
        with self._on_stream():
            self.model = self.task.build(folder, job.seed).to(device).train()
            (train, test), self.params = self.task.data(folder), trainable(self.model)
            self.train, self.test = (tuple(t.to(device) for t in part) for part in (train, test))
            order = order_of_batches(len(train[0]), self.task.batch_size, job.horizon, job.seed)
            self.order, self.factors = order.to(device), schedule(job.horizon).to(device)
            self.optimizer = arm.make(self.model, self.task, job.lr)
            self.starts = [float(group["lr"]) for group in self.optimizer.param_groups]
            self.t = torch.zeros((), dtype=torch.int64, device=device)
            self.losses = torch.full((job.horizon,), torch.nan, device=device)
            self.rates = torch.full((job.horizon,), torch.nan, device=device)
        self.records, self.scheduled = self.stream is not None, arm.scheduled
        self.done, self.graph = 0, None
        if self.records:
            for group, start in zip(self.optimizer.param_groups, self.starts, strict=True):
                group["lr"] = torch.tensor(start, device=device)
        self.mark = torch.cuda.Event() if self.stream is not None else None

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self.stream)

    def advance(self) -> bool:
        """Hands over one burst of steps; whether there are more."""
        if self.mark is not None:
            self.mark.synchronize()
        with self._on_stream():
            for _ in range(min(BURST, self.job.horizon - self.done)):
                self._one_step()
                self.done += 1
            if self.mark is not None:
                self.mark.record()
        return self.done < self.job.horizon

    def _one_step(self) -> None:
        if not self.records:
            self._step()
            return
        if self.done == 1:
            self.graph = torch.cuda.CUDAGraph()
            held = dict(_tensors_of(self.optimizer))
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self._step()
                _keep_in_place(self.optimizer, held)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        """Takes one step; reads nothing on the host where the arm can be recorded."""
        picked = self.order.index_select(0, self.t[None])[0]
        loss, _ = self.task.loss(self.model, tuple(t.index_select(0, picked) for t in self.train))
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self._set_rate()
        if hasattr(self.optimizer, "observe_loss"):
            self.optimizer.observe_loss(loss.detach())
        self.optimizer.step()
        where = self.t[None]
        self.losses.index_copy_(0, where, loss.detach()[None])
        rate = self.optimizer.param_groups[0].get("effective_lr")
        if rate is not None:
            self.rates.index_copy_(0, where, rate[None])
        self.t += 1

    def _set_rate(self) -> None:
        if not self.scheduled:
            return
        factor = (
            self.factors.index_select(0, self.t[None])[0] if self.records else schedule(self.job.horizon)[self.done]
        )
        for group, start in zip(self.optimizer.param_groups, self.starts, strict=True):
            if self.records:
                group["lr"].copy_(factor * start)
            else:
                group["lr"] = float(factor) * start

    def result(self) -> dict[str, Any]:
        """Reads the outcome; a run that ended in a non-finite loss says so."""
        with self._on_stream(), torch.no_grad():
            if hasattr(self.optimizer, "eval"):
                self.optimizer.eval()  # schedule-free steps with other weights than it is judged by
            self.model.eval()
            parts = [self.task.loss(self.model, batch) for batch in _pieces(self.test, 250)]
            sizes = torch.tensor([len(batch[0]) for batch in _pieces(self.test, 250)], dtype=torch.float64)
            losses = torch.stack([loss for loss, _ in parts]).double().cpu()
            right = torch.stack([right.double().mean() for _, right in parts]).cpu()
            curve, rates = self.losses.cpu(), self.rates.cpu()
        every = max(1, self.job.horizon // MOMENTS)
        outcome = {
            **dataclasses.asdict(self.job),
            "key": self.job.key,
            "loss": float((losses * sizes).sum() / sizes.sum()),
            "accuracy": float((right * sizes).sum() / sizes.sum()),
            "curve": [round(float(part.mean()), 4) for part in curve.split(every)],
        }
        if not rates.isnan().all():
            outcome["rates"] = [float(f"{rate:.3g}") for rate in rates[::every].tolist()]
        return outcome


def _pieces(data: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(data[0]), size):
        yield tuple(t[start : start + size] for t in data)


def _tensors_of(optimizer: Optimizer) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yields what an optimizer keeps from step to step, with the way to it."""
    roots = [(("group", i), group) for i, group in enumerate(optimizer.param_groups)]
    roots += [(("state", p), state) for p, state in optimizer.state.items()]
    for way, root in roots:
        for name, value in root.items():
            if isinstance(value, Tensor):
                yield (*way, name), value
            elif isinstance(value, dict):
                yield from (((*way, name, key), t) for key, t in value.items() if isinstance(t, Tensor))


def _keep_in_place(optimizer: Optimizer, held: dict[tuple[Any, ...], Tensor]) -> None:
    """Copies what a step replaced back into the tensors that the next replay reads."""
    for way, tensor in list(_tensors_of(optimizer)):
        before, (kind, where, *names, last) = held[way], way
        if before is not tensor:
            before.copy_(tensor)
            holder: Any = optimizer.param_groups[where] if kind == "group" else optimizer.state[where]
            for name in names:
                holder = holder[name]
            holder[last] = before
