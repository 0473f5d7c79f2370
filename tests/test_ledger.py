"""The ledger's rows point at what exists; `python tests/ledger.py` shows that their tests see the mutations."""

import ast
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.ledger import ROOT, read_rows

ROWS = read_rows()


def test_every_mutation_finds_its_text_once_and_parses():
    assert {"Names", "First seed", "Second seed", "Engine"} <= {row.section for row in ROWS}
    for row in ROWS:
        source = (ROOT / "hf_automagic" / row.file).read_text(encoding="utf-8")
        assert source.count(row.old) == 1, row
        ast.parse(source.replace(row.old, row.new))


def test_every_row_names_a_test_that_exists():
    functions: dict[str, set[str]] = {}
    for row in ROWS:
        file, test = row.test.split("::")
        if file not in functions:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test.partition("[")[0] in functions[file], row


def test_no_promise_stands_twice():
    assert [promise for promise, count in Counter(row.promise for row in ROWS).items() if count > 1] == []


SCRIPT = """
from pathlib import Path
from tests.ledger import Row, find_survivors
test = "test_ledger.py::test_no_promise_stands_twice"
rows = [
    Row("", "nothing", test, "__init__.py", "True", "False"),
    Row("", "the grammar", test, "__init__.py", "True", "("),
    Row("", "what is not there", test, "__init__.py", "absent", ""),
]
print(len(find_survivors(Path("whole").resolve(), rows)))
"""


@pytest.mark.slow
def test_a_survivor_and_a_broken_mutant_are_told(tmp_path):
    package = tmp_path / "whole" / "hf_automagic"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("flag = True\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = {line.partition("  [")[0].strip() for line in run.stdout.splitlines() if "  [" in line}
    assert said == {"SURVIVED   nothing", "BROKEN, 70 the grammar", "BROKEN, 70 what is not there"}, (
        run.stdout + run.stderr
    )
    assert "'absent' occurs 0 times in __init__.py" in run.stdout
    assert run.stdout.splitlines()[-1] == "3"
