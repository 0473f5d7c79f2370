"""Checkpoints on disk: which of them are whole, which is the newest, and what is wrong with the others.

A Trainer writes the files of a checkpoint one after the other into their final folder, `trainer_state.json` last: a
run that is killed meanwhile leaves a folder that looks like a checkpoint. `write_manifest` then notes the size and
the digest of every file that a resume reads. Where there is no manifest, the files' own structure tells: the checksums
of torch's archives, the lengths in a safetensors header, JSON that ends. Nothing is unpickled here, and no name that a
file tells is followed out of its folder.
"""

import hashlib
import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from .checkpoint_files import STRUCTURES, read_json
from .reporting.stats import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
MANIFEST_VERSION = 1  # grows when an older reader would read it wrongly
TRAINER_STATE = "trainer_state.json"
SCHEDULER_STATE = "scheduler.pt"

# As Trainer saves it: optimizer.pt, optimizer.bin and the folder optimizer_0 of FSDP, rank0-of-2-optimizer.pt of XLA.
OPTIMIZER_STATE = re.compile(r"(rank\d+-of-\d+-)?optimizer(\.(pt|bin).*|_\d+)")
MODEL = re.compile(
    r"((pytorch_)?model|adapter_model)(\.safetensors|\.bin)(\.index\.json)?|pytorch_model_fsdp(\.bin|_\d+)"
)
NAME = re.compile(r"checkpoint-(\d+)")


def find_resumable_checkpoint(folder: str | os.PathLike[str], *, needs_optimizer: bool = True) -> Path | None:
    """Returns the newest whole checkpoint-N of an output folder, None where there is no checkpoint at all.

    Each newer one is passed over with a warning that says why.

    Args:
        folder: the output folder of a Trainer.
        needs_optimizer: whether a checkpoint without optimizer state is passed over.

    Raises:
        ValueError: there are checkpoints, and none of them is whole: to start afresh is the user's decision.
    """
    reasons = []
    for path in list_checkpoints(folder):
        problems = find_problems(path, needs_optimizer=needs_optimizer)
        if not problems:
            for reason in reasons:
                logger.warning("passed over %s; resuming from %s", reason, path.name)
            return path
        reasons.append(f"{path.name}: {problems[0]}")
    if reasons:
        raise ValueError(
            f"none of the {len(reasons)} checkpoints of {Path(folder).name!r} can be resumed ({'; '.join(reasons)}); "
            "mend one, or begin anew without resume_from_checkpoint"
        )
    return None


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the folders checkpoint-N of an output folder, the newest first."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def find_problems(folder: str | os.PathLike[str], *, needs_optimizer: bool = True) -> list[str]:
    """Says what keeps a checkpoint from being resumed, a sentence each; nothing where it is whole.

    Args:
        folder: of one checkpoint.
        needs_optimizer: whether the state of optimizer and scheduler must be there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    return [*_find_missing(folder, needs_optimizer), *(_compare(folder) if has_manifest(folder) else _inspect(folder))]


def has_manifest(folder: Path) -> bool:
    """Says whether sizes and digests were noted when a checkpoint was saved."""
    return (folder / MANIFEST).is_file()


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Notes size and SHA-256 of every file of a checkpoint that a resume reads, as the last file that is written."""
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(folder)
    }
    record = {"schema_version": MANIFEST_VERSION, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(record, indent=2) + "\n")


def begin_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Takes the marks of a whole checkpoint off a folder that is about to be written over."""
    folder = Path(folder)
    if NAME.fullmatch(folder.name):
        for name in (MANIFEST, TRAINER_STATE):
            (folder / name).unlink(missing_ok=True)


def lacks_optimizer(folder: str | os.PathLike[str]) -> bool:
    """Says whether a checkpoint has no state of optimizer and scheduler, which a Trainer does without in silence."""
    names = os.listdir(folder)
    in_deepspeed = "latest" in names
    return not in_deepspeed and not (
        SCHEDULER_STATE in names and any(OPTIMIZER_STATE.fullmatch(name) for name in names)
    )


def _find_missing(folder: Path, needs_optimizer: bool) -> list[str]:
    problems = []
    names = os.listdir(folder)
    adapters = (path for path in folder.iterdir() if path.is_dir() and _holds_model(os.listdir(path)))
    if not (_holds_model(names) or "latest" in names or next(adapters, None)):
        problems.append("it lacks the model's weights")
    if needs_optimizer and lacks_optimizer(folder):
        problems.append(
            f"it lacks optimizer.pt or {SCHEDULER_STATE}, so that the optimizer would silently start afresh; resume "
            "from one saved without save_only_model, or set trainer.allow_fresh_optimizer = True"
        )
    if TRAINER_STATE not in names:
        problems.append(f"it lacks {TRAINER_STATE}, the last file that a save writes")
    else:
        step = _step(folder / TRAINER_STATE)
        told = NAME.fullmatch(folder.name)
        if told and step is not None and step != int(told[1]):
            problems.append(f"{TRAINER_STATE} is of step {step}")
    return problems


def _holds_model(names: list[str]) -> bool:
    return any(MODEL.fullmatch(name) for name in names)


def _step(path: Path) -> int | None:
    """Returns the step of a Trainer's state, None where it cannot be read, which `_inspect` says."""
    state = read_json(path)
    return state.get("global_step") if isinstance(state, dict) else None


def _files(folder: Path) -> list[Path]:
    """Lists the files of a checkpoint that a resume may read."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and p.suffix in STRUCTURES)


def _inspect(folder: Path) -> list[str]:
    """Looks at each file's own structure."""
    problems = []
    for path in _files(folder):
        problem = STRUCTURES[path.suffix](path)
        if problem is not None:
            problems.append(f"{path.relative_to(folder).as_posix()} {problem}")
        elif path.name.endswith(".index.json"):
            problems += _find_lost_shards(folder, path)
    return problems


def _find_lost_shards(folder: Path, index: Path) -> list[str]:
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        return [f"{index.name} has no weight_map"]
    names = sorted({str(name) for name in shards.values()})
    outside = [name for name in names if not stays_inside(name)]
    lost = [name for name in names if name not in outside and not (index.parent / name).is_file()]
    return [f"{index.name} names {name!r}, which lies outside of its folder" for name in outside] + [
        f"{name} is missing, and {index.name} names it" for name in lost
    ]


def _compare(folder: Path) -> list[str]:
    """Compares the files with the manifest."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return [f"{MANIFEST} cannot be read; remove it to resume by the files' own structure"]
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        return [
            f"{MANIFEST} has schema {version!r}, this version reads up to {MANIFEST_VERSION}; upgrade hf_automagic"
        ]
    problems = [_compare_file(folder, name, noted) for name, noted in files.items()]
    return [problem for problem in problems if problem is not None]


def _compare_file(folder: Path, name: str, noted: Any) -> str | None:
    if not stays_inside(name):
        return f"{MANIFEST} names {name!r}, which lies outside of its folder"
    path = folder / name
    if not isinstance(noted, dict) or not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != noted.get("bytes"):
        return f"{name} has {size} bytes, and had {noted.get('bytes')} when it was saved"
    if _digest(path) != noted.get("sha256"):
        return f"{name} is not what was saved: its digest differs; if you changed it, remove {MANIFEST}"
    return None


def stays_inside(name: str) -> bool:
    """Says whether a file name that a checkpoint or a hub tells lies below the folder it is told for."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and ":" not in parts.parts[0]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
