"""Runs that kill themselves while they save; forks a run for each point, since importing takes longest.

    python tests/kill_points.py FOLDER count          prints how many write points the save of step 4 has
    python tests/kill_points.py FOLDER at 3 17        runs that kill themselves at points 3 and 17, in FOLDER/3 ...
    python tests/kill_points.py FOLDER random 7 10    ten runs that save at every step, killed from outside

A write point is an open for writing, a write that reaches the file, a rename or a removal below checkpoint-4. At a
write, half of the bytes arrive.
"""

import builtins
import io
import os
import pathlib
import random
import signal
import sys
import time
from typing import Any

import safetensors.torch
import torch

from hf_automagic import Automagic
from hf_automagic.callbacks import OptimizerStatsCallback
from hf_automagic.trainer import AutomagicTrainer
from tests.tiny_runs import InOrder, TinyRegression, arguments, regression_points

WATCHED = "checkpoint-4"
BUFFER = 512  # bytes of a write


def trainer(folder: Any, **changes: Any) -> AutomagicTrainer:
    """A run of a tiny regression that saves every second step."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    return AutomagicTrainer(
        model=TinyRegression(),
        args=arguments(folder, lr_scheduler_type="constant", **changes),
        train_dataset=InOrder(regression_points(1000)),
        optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3, "min_8bit_size": 0}),
        callbacks=[OptimizerStatsCallback(plots=False)],
    )


class WritePoints:
    """Counts write points, and kills this process at one of them."""

    def __init__(self, target: int | None) -> None:
        self.target, self.count = target, 0

    def reach(self) -> bool:
        self.count += 1
        return self.count == self.target

    def pass_by(self, path: Any) -> None:
        if WATCHED in str(path) and self.reach():
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        points, plain_open, plain_save = self, io.open, torch.save

        class Counted(io.FileIO):
            def write(self, data: Any) -> int:
                if points.reach():
                    super().write(bytes(data)[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().write(data)

        def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or WATCHED not in str(file):
                return plain_open(file, mode, *args, **kwargs)
            points.pass_by(file)
            buffered = io.BufferedWriter(Counted(file, mode.replace("b", "").replace("t", "")), BUFFER)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(f, str | os.PathLike):
                return plain_save(obj, f, *args, **kwargs)
            with counted_open(f, "wb") as file:
                plain_save(obj, file, *args, **kwargs)

        def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
            with counted_open(filename, "wb") as file:
                file.write(safetensors.torch.save(tensors, metadata))

        for name in ("replace", "unlink", "mkdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        builtins.open = io.open = counted_open
        torch.save, safetensors.torch.save_file = save, save_file

    def _counted(self, function: Any) -> Any:
        def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.pass_by(path)
            result = function(path, *args, **kwargs)
            self.pass_by(path)
            return result

        return counted


def fork(work: Any) -> int:
    """Does some work in a forked process, and returns its id."""
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def main(folder: pathlib.Path, mode: str, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    if mode == "count":
        points = WritePoints(None)
        points.install()
        trainer(folder / "count").train()
        print(points.count)
    elif mode == "at":
        for number in numbers:

            def work(number: int = number) -> None:
                WritePoints(number).install()
                trainer(folder / str(number)).train()

            _, status = os.waitpid(fork(work), 0)
            assert os.WIFSIGNALED(status), f"point {number} was not reached: {status}"
    else:
        seed, runs = numbers
        delays = random.Random(seed)
        for number in range(runs):
            home = folder / str(number)
            changes = {"max_steps": 500, "save_steps": 1, "save_total_limit": 3}
            process = fork(lambda home=home, changes=changes: trainer(home, **changes).train())
            while not (home / "checkpoint-2" / "trainer_state.json").exists():
                time.sleep(0.01)
            time.sleep(delays.uniform(0, 1))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], [int(number) for number in sys.argv[3:]])
