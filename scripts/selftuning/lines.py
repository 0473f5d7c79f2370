"""The file of results: a JSON line for each run."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LEFT_OUT = ("curve", "rates")  # two thirds of the bytes; no figure of the report comes from them


def append_line(path: Path, line: Line) -> None:
    """Appends one line in one write, so that processes do not cut into each other's."""
    descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def end_last_line(path: Path) -> None:
    """Ends a line that was cut, so that the next one is not glued to it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_lines(path: Path) -> Sequence[Line]:
    """Reads all complete lines, the newest of each key."""
    if not path.exists():
        return []
    found = {}
    for text in path.read_text().splitlines():
        if text.endswith("}"):
            line = json.loads(text)
            found[line["key"]] = line
    return list(found.values())


def publish(runs: Iterable[Path], results: Path) -> int:
    """Takes lines over into the published file, without `LEFT_OUT`, in the order of their keys; how many are new."""
    known = {line["key"]: line for line in read_lines(results)}
    before = len(known)
    for path in runs:
        for line in read_lines(path):
            known[line["key"]] = {name: value for name, value in line.items() if name not in LEFT_OUT}
    results.write_text("".join(f"{json.dumps(known[key])}\n" for key in sorted(known)))
    return len(known) - before
