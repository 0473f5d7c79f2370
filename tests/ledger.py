"""Breaks each promise of the ledger in a copy of the package, and expects its test to see it.

    python tests/ledger.py            all rows of ledger.txt
    python tests/ledger.py attach     those whose promise or test holds the word

Each mutant runs its one test in a process forked from this one, which has imported what is slow. Prints a line a row,
and exits with 1, naming the survivors, where a test stays green or a mutant does not even import.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_automagic"
PROCESSES = 2
SLOW_IMPORTS = ("torch", "pytest", "hypothesis", "transformers.trainer", "peft", "bitsandbytes", "matplotlib.figure")
GREEN, RED, NO_IMPORT = 0, 1, 70  # how a process ends; the first two are pytest's


class Row(NamedTuple):
    """One promise: pytest's name of its test, and the text of a file that the mutant has otherwise."""

    section: str
    promise: str
    test: str
    file: str
    old: str
    new: str


def read_rows() -> list[Row]:
    """Reads ledger.txt: a line with the promise, and below it, indented, its test and `file: old => new`."""
    rows, section, lines = [], "", (ROOT / "tests" / "ledger.txt").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if line.startswith("# "):
            section = line.removeprefix("# ")
        elif section and line and not line.startswith(" "):
            file, change = lines[i + 2].strip().split(": ", 1)
            old, new = (text.strip().replace("\\n", "\n") for text in f"{change} ".split(" => "))
            rows.append(Row(section, line, lines[i + 1].strip(), file, old, new))
    return rows


def main(words: list[str]) -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = [row for row in read_rows() if all(word in f"{row.promise} {row.test}" for word in words)]
    if not rows:
        print(f"no row of the ledger holds {' and '.join(words)}")
        return 1
    for name in SLOW_IMPORTS:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        shutil.copytree(ROOT / PACKAGE, whole / PACKAGE)
        if failures := find_failures(whole, sorted({row.test for row in rows})):
            print(*failures, "a test of the ledger fails without any mutation; mend it first", sep="\n")
            return 1
        survivors = find_survivors(whole, rows)
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants killed")
    for promise in survivors:
        print(f"not killed: {promise}")
    return int(bool(survivors))


def find_failures(whole: Path, tests: list[str]) -> list[str]:
    """Runs the tests on the package as it is; returns what pytest says of failures."""
    shares = [tests[i::PROCESSES] for i in range(min(PROCESSES, len(tests)))]
    ends = run_all([functools.partial(run_tests, whole, share) for share in shares])
    return [text for _, code, text in ends if code != GREEN]


def find_survivors(whole: Path, rows: list[Row]) -> list[str]:
    """Runs every mutant and prints a line for each; returns the promises whose tests did not see theirs."""
    survivors = []
    for i, code, text in run_all([functools.partial(run_mutant, whole, i, row) for i, row in enumerate(rows)]):
        verdict = {GREEN: "SURVIVED", RED: "killed"}.get(code, f"BROKEN, {code}")
        print(f"{verdict:10} {rows[i].promise}  [{rows[i].test}]", flush=True)
        if code != RED:
            survivors.append(rows[i].promise)
        if code not in (GREEN, RED):
            print(text)
    return survivors


def run_mutant(whole: Path, number: int, row: Row) -> int:
    """Runs a row's test on a copy of the package in which the row's text is replaced."""
    folder = whole.parent / str(number)
    path = folder / PACKAGE / row.file
    shutil.copytree(whole, folder)
    source = path.read_text(encoding="utf-8")
    if source.count(row.old) != 1:
        print(f"{row.old!r} occurs {source.count(row.old)} times in {row.file}")
        return NO_IMPORT
    path.write_text(source.replace(row.old, row.new), encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()
    return run_tests(folder, [row.test])


def run_tests(folder: Path, tests: Iterable[str]) -> int:
    """Imports the package from a folder and runs tests on it, in this process."""
    import pytest

    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    try:
        package = importlib.import_module(PACKAGE)
    except Exception as error:  # whatever a mutation may break
        print(f"the mutant does not import: {error!r}")
        return NO_IMPORT
    if not Path(package.__file__ or "").is_relative_to(folder):
        print(f"{package.__file__} was imported instead of the copy")
        return NO_IMPORT
    return pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])


def run_all(jobs: list[Callable[[], int]]) -> Iterator[tuple[int, int, str]]:
    """Runs jobs in forked processes, some at a time; yields (number, exit code, what it printed) as they end."""
    waiting, running = list(enumerate(jobs)), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                number, job = waiting.pop(0)
                output = Path(folder) / str(number)
                running[fork(job, output)] = number, output
            process, status = os.wait()
            number, output = running.pop(process)
            yield number, os.waitstatus_to_exitcode(status), output.read_text(encoding="utf-8")


def fork(job: Callable[[], int], output: Path) -> int:
    """Runs one job in a forked process, with its output in a file; returns the process."""
    process = os.fork()
    if process:
        return process
    code = NO_IMPORT
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = int(job())
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    begin = time.monotonic()
    result = main(sys.argv[1:])
    print(f"{time.monotonic() - begin:.0f} s")
    sys.exit(result)
