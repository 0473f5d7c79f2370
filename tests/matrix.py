"""Writes the matrix of tests/README.md from the marks `@pytest.mark.matrix("T1")` of the tests.

python tests/matrix.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
README = TESTS / "README.md"
START, END = "<!-- matrix:start -->", "<!-- matrix:end -->"

CASES = {
    "T1": "6 + 6 steps through the Trainer are 12: fp32 adapters, accumulation, an epoch's border",
    "T2": "the same for bf16 adapters with stochastic rounding, dtype kept",
    "T3": "loading keeps every dtype, whatever the parameter's, and the files of older versions",
    "T4": "`weights_only` loads; a malicious pickle executes nothing",
    "T5": "empty groups, zero-size, 0-d, frozen, unfrozen, late and missing parameters",
    "T6": "zero gradients from step 0, constant blocks, one huge outlier",
    "T7": "gradients that are not finite, the fp16 scaler's skipped steps",
    "T8": "sparse, complex, fp64, fp8 and integer: stepped, or refused in a sentence",
    "T9": "non-contiguous, channels_last, expanded, tied, views",
    "T10": "mixed dtypes and devices, parameters that move",
    "T11": "schedules multiply the tuned rate and are never overwritten",
    "T12": "keys in logs, trackers and files; one read of the device for a log",
    "T13": "DDP: ranks identical to the bit",
    "T14": "FSDP2: sharded states, uneven shards, other numbers of ranks",
    "T15": "kill -9 in a save; truncated, missing, flipped, foreign and newer files: never silently fresh",
    "T16": "memory that runs out in the middle of a step, and the batch size that is found",
    "T17": "the same inputs give the same bits, whatever the seed of Python's hashes",
    "T18": "gradient checkpointing, compiled models, clipping, accumulation",
    "T19": "bytes of state are those that were predicted",
    "T20": "properties of every codec, and of every configuration",
    "T21": "equal to the slow reference, to AdamW and to the published CAME",
    "T22": "the card's section, pushes to the Hub, nothing private in them",
    "T23": "registration: every place where the string works, pickles, unknown names",
    "T24": "older and newer transformers: every release from 4.56 on at which something changed",
    "T25": "convergence, and long runs without drift",
}


class Marked(NamedTuple):
    """A test, by file and name, with what limits where it runs."""

    rows: tuple[str, ...]
    test: str
    limits: tuple[str, ...]


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(text: str) -> str:
    """Puts the table between its markers."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


def table() -> str:
    """Returns a row for each case, with its tests."""
    marked = [mark for path in sorted(TESTS.glob("test_*.py")) for mark in marks(path)]
    lines = ["| row | case | tests |", "|---|---|---|"]
    for row, case in CASES.items():
        tests = [f"`{m.test}`" + "".join(f" ({limit})" for limit in m.limits) for m in marked if row in m.rows]
        lines.append(f"| {row} | {case} | {'<br>'.join(tests) or 'none yet'} |")
    return "\n".join(lines)


def marks(path: Path) -> Iterator[Marked]:
    """Yields the tests of a file that carry the mark, by themselves or through their file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_file = [mark for node in tree.body if is_pytestmark(node) for mark in ast.walk(node)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found = [*of_file, *(mark for decorator in node.decorator_list for mark in ast.walk(decorator))]
            rows = tuple(row for mark in found for row in rows_of(mark))
            limits = tuple(dict.fromkeys(m.attr for m in found if isinstance(m, ast.Attribute)))
            if rows:
                yield Marked(rows, f"{path.name}::{node.name}", tuple(x for x in limits if x in ("slow", "gpu")))


def is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)


def rows_of(node: ast.AST) -> list[str]:
    """Returns the rows that a call `pytest.mark.matrix(...)` names."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "matrix":
        return [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


if __name__ == "__main__":
    main()
