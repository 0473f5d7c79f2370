"""The structure of a checkpoint's files: each kind tells by itself whether it is whole; nothing is unpickled."""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What zipfile raises where bits of an archive's own structure have flipped.
BROKEN_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
)


def check_archive(path: Path) -> str | None:
    """Reads every checksum of a file that torch.save wrote; says what is wrong, None where it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "is damaged: its checksums do not fit"
    except BROKEN_ARCHIVE:
        return "is no archive of torch.save, or is cut off"


def check_safetensors(path: Path) -> str | None:
    """Compares the size of a safetensors file with what its header tells."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            return "is cut off"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "has a header that is no table of tensors"
    return None if size == expected else f"has {size} bytes, and its header tells of {expected}"


def check_json(path: Path) -> str | None:
    """Says where JSON does not parse."""
    return None if read_json(path) is not None else "is no JSON, or is cut off"


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_filled(path: Path) -> str | None:
    """Says where a file of torch's distributed checkpoints is empty; it has no checksum of its own."""
    return None if path.stat().st_size else "is empty"


STRUCTURES: dict[str, Callable[[Path], str | None]] = {
    ".pt": check_archive,
    ".pth": check_archive,
    ".bin": check_archive,
    ".safetensors": check_safetensors,
    ".json": check_json,
    ".distcp": check_filled,
}
