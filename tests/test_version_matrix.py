"""Older and newer transformers: the rows of `scripts/version_matrix.sh` span what we promise, and run what matters."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # torch and pytest bring it there
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (ROOT / "scripts" / "version_matrix.sh").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = "tests/test_upstream_seams.py tests/test_transformers_door.py tests/test_foreign_checkpoints.py"

pytestmark = pytest.mark.matrix("T24")


def block(name: str) -> str:
    """Returns what a variable of the script holds between its quotes."""
    found = re.search(rf'^{name}="(.*?)"$', SCRIPT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def rows() -> dict[str, tuple[str, dict[str, Version]]]:
    """Returns the Python and the packages of each row, in order."""
    table = {}
    for line in filter(None, map(str.strip, block("rows").splitlines())):
        name, python, packages = map(str.strip, line.split("|"))
        pins = (requirement.split("==") for requirement in packages.split())
        table[name] = (python, {package: Version(version) for package, version in pins})
    return table


def floors() -> dict[str, Version]:
    """Returns the lowest versions that the package and its extra `hf` allow."""
    project = PROJECT["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["hf"])
    return {r.name: Version(next(s.version for s in r.specifier if s.operator == ">=")) for r in wanted}


def test_the_oldest_row_is_the_oldest_that_is_promised():
    python, packages = rows()["oldest"]
    assert PROJECT["project"]["requires-python"] == f">={python}"
    for package, floor in floors().items():
        if package in packages:
            assert packages[package].release[:2] == floor.release[:2], package


def test_rows_stand_at_each_change_of_transformers_in_order():
    versions = [packages["transformers"] for _, packages in rows().values()]
    assert versions == sorted(versions)
    assert [version.release[:2] for version in versions[:3]] == [(4, 56), (4, 57), (5, 0)]
    assert len({python for python, _ in rows().values()}) == 4


def test_the_newest_rows_are_what_the_other_tests_run_with():
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE))
    for row in ("newest", "newest13"):
        assert {name: str(version) for name, version in rows()[row][1].items()} == {
            name: pins[name] for name in rows()[row][1]
        }


def test_every_row_runs_the_doors_the_trainers_and_the_seams():
    tests = block("tests").split()
    assert all((ROOT / test).is_file() for test in tests)
    assert set(OURS.split()) <= set(tests)


def test_a_deprecated_name_is_an_error():
    filters = PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        assert f"error::{kind}:transformers" in filters


@pytest.mark.slow
def test_the_oldest_transformers_has_our_strings_and_resumes():
    """Runs where `bash scripts/version_matrix.sh oldest` has made the row's environment: gigabytes, and minutes."""
    folder = Path(os.environ.get("MATRIX_DIR", ROOT / ".cache" / "matrix"))
    if not (folder / "oldest" / ".installed").is_file():
        pytest.skip("bash scripts/version_matrix.sh oldest makes its environment")
    env = {**os.environ, "MATRIX_TESTS": OURS}
    command = ["bash", str(ROOT / "scripts" / "version_matrix.sh"), "oldest"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "failed" not in done.stdout
