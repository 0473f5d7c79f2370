"""Runs many jobs in parallel processes on one device; every finished run is one line of a file at once."""

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from .arms import ARMS
from .lines import append_line, end_last_line, read_lines
from .training import Job, Run


def stage(name: str) -> Iterator[Job]:
    """Yields the jobs of a stage, those that matter most first."""
    return (Job(*cell) for cell in STAGES[name]())


LORA = ("movie-lora", "topics-lora", "source-lora", "text-lora", "conv-lora")
FULL = ("movie-full", "text-full", "conv-scratch", "text-scratch")
LONG = ("movie-lora", "conv-lora", "text-lora", "movie-full", "conv-scratch")  # run for 1,000 steps too
ADAMW_RATES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
# Below and above these AdamW was never best in 300 steps; the proof leaves them out after the first seed.
USEFUL = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4, 1e-3), "scratch": (1e-4, 3e-4, 1e-3, 3e-3)}
SEEDS, HORIZONS = (0, 1, 2), (300, 100, 1000)
ANY = 5e-5  # the Trainer's own default
Cells = Iterator[tuple[str, str, float, int, int]]


def _proof() -> Cells:
    """AdamW's useful rates, the null arm, which is ours, and the search, on every task, seed and horizon."""
    for horizon in HORIZONS:
        for seed in SEEDS:
            for task in (*LORA, *FULL) if horizon < 1000 else LONG:
                yield task, "automagic_8bit", ANY, seed, horizon
                yield from ((task, "AdamW", lr, seed, horizon) for lr in USEFUL[task.split("-")[1]])
                yield task, "search", ANY, seed, horizon


def _starts() -> Cells:
    """Every starting rate, one seed, 300 steps: the plot of robustness."""
    for task in (*LORA, *FULL):
        yield from ((task, "AdamW", lr, 0, 300) for lr in ADAMW_RATES)
        yield from ((task, arm, lr, 0, 300) for arm in ("automagic_8bit", "search") for lr in (1e-6, 1e-2, 1e-1))


def _peers() -> Cells:
    """Other methods that promise to find the rate, and rivals at three rates."""
    for task in ("movie-lora", "conv-lora"):
        for arm in ("Prodigy", "schedule-free", "ancestor", "CAME", "Adafactor", "AdamW8bit"):
            yield from ((task, arm, lr, 0, 300) for lr in (1e-6, 1e-3, 1e-2))


def _parts() -> Cells:
    """Ours with one part changed."""
    parts = [arm for arm in ARMS if arm[0] in "-+" or arm.startswith(("rails", "search,"))]
    for task in (*LORA, *FULL):
        yield from ((task, arm, ANY, 0, 300) for arm in parts)


def _small() -> Cells:
    """A grid that two CPU cores run in a minute."""
    for arm, rates in (("AdamW", (1e-3, 3e-3)), ("automagic_8bit", (ANY,)), ("search", (1e-6,))):
        yield from (("conv-scratch", arm, lr, seed, 60) for lr in rates for seed in (0, 1))


STAGES: dict[str, Callable[[], Cells]] = {
    "proof": _proof,
    "starts": _starts,
    "parts": _parts,
    "peers": _peers,
    "small": _small,
}


def run_grid(
    jobs: Iterable[Job],
    folder: Path,
    results: Path,
    *,
    processes: int,
    slots: int,
    seconds: float,
    origin: dict[str, str],
) -> int:
    """Runs what the file does not hold yet; returns how many runs were added.

    Args:
        jobs: in the order of their weight.
        folder: what `prepare` wrote.
        results: a JSON line for each run; a run that was cut loses nothing but itself.
        processes: worker processes; arms that cannot be recorded want more of them.
        slots: runs that a process keeps going at once, where they can be recorded.
        seconds: no run is begun after this time, those under way are ended at 1.15 times it.
        origin: device, versions and commit, written into every line.
    """
    known = {line["key"] for line in read_lines(results)}
    waiting = [job for job in dict.fromkeys(jobs) if job.key not in known]
    if not waiting:
        return 0
    end_last_line(results)
    context = multiprocessing.get_context("spawn")
    queues = {True: context.Queue(), False: context.Queue()}
    for job in waiting:
        queues[ARMS[job.arm].records].put(job)
    time.sleep(0.5)  # a queue's feeder thread
    deadline = time.time() + seconds
    arguments = (queues, folder, results, slots, deadline, origin)
    workers = [context.Process(target=work, args=(i % 2 == 0, *arguments)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(1.0, 1.15 * seconds - (time.time() - deadline + seconds)))
        if worker.is_alive():
            worker.kill()
    return len(read_lines(results)) - len(known)


def work(
    recorded_first: bool,
    queues: dict[bool, Any],
    folder: Path,
    results: Path,
    slots: int,
    deadline: float,
    origin: dict[str, str],
) -> None:
    """Runs jobs until there are none left or the time is up."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for recorded in (recorded_first, not recorded_first):
        live: list[tuple[Run, float]] = []
        while True:
            while len(live) < (slots if recorded else 1) and time.time() < deadline:
                job = _next(queues[recorded])
                if job is None:
                    break
                live.append((Run(job, folder, device), time.time()))
            if not live:
                break
            for entry in list(live):
                run, begun = entry
                if not run.advance():
                    append_line(results, {**run.result(), "seconds": round(time.time() - begun, 2), **origin})
                    live.remove(entry)


def _next(jobs: Any) -> Job | None:
    try:
        return jobs.get(timeout=0.2)
    except queue.Empty:
        return None
