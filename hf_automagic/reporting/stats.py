"""The files that a run leaves behind in `optimizer_stats/`: statistics and events line by line, and what was run."""

import dataclasses
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..optim.automagic import Automagic
from ..optim.events import Event
from ..registry import list_optimizers
from .rates import unwrap_optimizer

logger = logging.getLogger(__name__)

FOLDER = "optimizer_stats"  # inside the run's output folder; a name without a leading _ is pushed to the Hub
SCHEMA_VERSION = 1  # of every line and of config.json; grows when a reader would have to know
ROWS, EVENTS, CONFIG = "stats.jsonl", "events.jsonl", "config.json"

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets")
# Of TrainingArguments, what decides the result and tells nothing about the machine or the data.
TRAINING_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "weight_decay",
    "bf16",
    "fp16",
    "world_size",
    "seed",
    "data_seed",
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything that plots and cards are made from, as plain JSON values.

    Args:
        config: what `describe_run` returned.
        rows: one for each log: `step`, and what was logged.
        events: as `describe_event` returned them.
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """Reads a folder of statistics, up to the last whole line of a run that was killed.

        Args:
            folder: `optimizer_stats`, or the output folder that it lies in.

        Raises:
            FileNotFoundError: there are no statistics.
        """
        folder = stats_folder(folder)
        if not (folder / CONFIG).is_file() and not (folder / ROWS).is_file():
            raise FileNotFoundError(
                f"{folder.name!r} holds neither {ROWS} nor {CONFIG}; name the output folder of a run that had an "
                "OptimizerStatsCallback"
            )
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
        return cls(config, read_lines(folder / ROWS), read_lines(folder / EVENTS))

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Returns steps and values of one logged key, without the logs that lack it."""
        points = [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]
        return [step for step, _ in points], [value for _, value in points]


def stats_folder(folder: str | os.PathLike[str]) -> Path:
    """Returns the folder of statistics inside an output folder, or the folder itself where it is one."""
    folder = Path(folder)
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


class StatsWriter:
    """Writes the files of one run; a process killed at any moment leaves whole lines."""

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        """Chooses the folder; nothing is written yet.

        Args:
            output_dir: the run's output folder.
        """
        self.folder = Path(output_dir) / FOLDER

    def start(self, step: int) -> None:
        """Makes the folder, and drops the lines that a run resumed at `step`, or begun anew at 0, will write again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (ROWS, EVENTS):
            path = self.folder / name
            lines = read_lines(path)
            kept = [line for line in lines if line.get("logged_at", line["step"]) <= step] if step else []
            if kept != lines:
                write_atomically(path, "".join(_dump(line) + "\n" for line in kept))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replaces `config.json`."""
        write_atomically(self.folder / CONFIG, _dump(config, indent=2) + "\n")

    def append_row(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends the numbers of one log; what is no number is left out."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        append_line(self.folder / ROWS, {"schema_version": SCHEMA_VERSION, **numbers, "step": step})

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Appends one event, as `describe_event` returned it."""
        append_line(self.folder / EVENTS, event)

    def last_event(self) -> int:
        """Returns the number of the newest event on file, 0 without one."""
        return max((line["number"] for line in read_lines(self.folder / EVENTS)), default=0)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record as one line, in one write, on a line of its own even after a line that was cut off."""
    with path.open("a+b", buffering=0) as file:
        at_start = file.seek(0, os.SEEK_END) == 0
        if not at_start:
            file.seek(-1, os.SEEK_END)
        gap = b"" if at_start or file.read(1) == b"\n" else b"\n"
        file.write(gap + _dump(record).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a file, none where it is missing; lines that a crash cut off are left out."""
    if not path.is_file():
        return []
    records, broken = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        else:
            broken += 1
    if broken:
        logger.warning("%s: left out %d line(s) that were cut off", path.name, broken)
    return records


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole; see `replaced`."""
    with replaced(path) as file:
        file.write(text.encode())


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Lends a file to write the new content of `path` into.

    Whoever reads `path`, also after the power failed, sees the old or the new content; after an error the old one.
    """
    draft = path.with_name(f"_{path.name}.part")  # never uploaded: push_to_hub leaves out what begins with _
    with draft.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _dump(record: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(record), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """Returns what JSON can hold: numbers that are not finite as null, enums by value, sequences as lists."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def describe_event(event: Event, logged_at: int) -> dict[str, Any]:
    """Returns an event as a record with the stable name of its code.

    Args:
        event: as the optimizer reported it; its step counts calls of `step()`.
        logged_at: the training step at which it was read.
    """
    named = {**dataclasses.asdict(event), "code": event.code.name}
    return {"schema_version": SCHEMA_VERSION, **named, "logged_at": logged_at}


def optimizer_name(optimizer: Any, requested: str | None = None) -> str:
    """Returns the true name: the registered string that was asked for where it made this optimizer, else the class.

    Args:
        optimizer: wrapped or not.
        requested: the `optim=` string of the TrainingArguments, which says nothing where a class was handed over.
    """
    inner = unwrap_optimizer(optimizer)
    requested = str(getattr(requested, "value", requested))
    return requested if isinstance(inner, Automagic) and requested in list_optimizers() else type(inner).__name__


def describe_run(optimizer: Any, args: Any = None) -> dict[str, Any]:
    """Returns what is needed to repeat a run, and what a plot needs beside the logs; no host name, no path, no data.

    Args:
        optimizer: any optimizer, wrapped or not; an Automagic tells its options, groups and memory.
        args: TrainingArguments, or another object with such fields.
    """
    inner = unwrap_optimizer(optimizer)
    config = {
        "schema_version": SCHEMA_VERSION,
        "optimizer": optimizer_name(inner, getattr(args, "optim", None)),
        "optimizer_class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "groups": [_describe_group(group) for group in inner.param_groups],
        "training": {name: getattr(args, name) for name in TRAINING_FIELDS if hasattr(args, name)},
        "versions": _versions(),
        "device": _device_name(inner.param_groups),
    }
    if isinstance(inner, Automagic):
        memory = inner.memory_stats()
        config["options"] = dataclasses.asdict(inner.config)
        config["memory"] = {
            "total_bytes": memory.total_bytes,
            "bytes_by_state": memory.bytes_by_state,
            "parameters": memory.parameters,
            "bytes_per_parameter": memory.bytes_per_parameter,
            "adam_bytes": memory.adam_bytes,
        }
    return _plain(config)


def _describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    names = ("role", "adapter", "is_full_weight", "self_tuning", "lr_search", "min_lr", "max_lr", "weight_decay")
    start = group.get("initial_lr", group["lr"])
    return {
        **{name: group[name] for name in names if name in group},
        "initial_lr": float(start),
        "parameters": len(group["params"]),
        "elements": sum(p.numel() for p in group["params"]),
    }


def _versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of what of its surroundings is installed."""
    versions = {"python": platform.python_version(), "hf_automagic": _version("hf_automagic")}
    return {name: v for name, v in (versions | {name: _version(name) for name in PACKAGES}).items() if v}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _device_name(groups: Iterable[Mapping[str, Any]]) -> str:
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
