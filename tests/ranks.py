"""Processes that form one group, started once and then given one piece of work after another."""

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240  # seconds until work counts as hung, on a busy machine


class Ranks:
    """Runs functions on every rank of a process group and brings back what each returned.

    The ranks find one another through a file, so that no port has to be guessed. After a failure they are started
    anew, because a rank may be left waiting for the others.
    """

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        """Starts nothing before there is work."""
        self.world_size, self.backend = world_size, backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `work(*args)` on every rank, at the same time; returns the results in the order of the ranks.

        Raises:
            RuntimeError: a rank raised, with its traceback, or did not answer.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((work, args))
        answers = [pipe.recv() if pipe.poll(PATIENCE) else ("a rank did not answer", b"") for pipe in self._pipes]
        errors = [error for error, _ in answers if error]
        if errors:
            self.stop()
            raise RuntimeError("\n".join(errors))
        return [torch.load(io.BytesIO(result), weights_only=False) for _, result in answers]

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        for rank in range(self.world_size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(theirs, rank, self.world_size, self.backend, meeting), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, rank: int, world_size: int, backend: str, meeting: str) -> None:
    """Is a rank: does what it is sent until it is killed, or its parent ends."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=PATIENCE / 2),
    )
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        result = io.BytesIO()
        try:
            torch.save(work(*args), result)
            pipe.send(("", result.getvalue()))
        except BaseException:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", b""))
