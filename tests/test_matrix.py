"""The matrix in tests/README.md is what the tests' marks say."""

from tests.matrix import CASES, README, TESTS, marks, with_table


def test_the_readme_shows_the_marks_as_they_are():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run `python tests/matrix.py`"


def test_every_row_has_a_test_that_runs_everywhere():
    found = [mark for path in TESTS.glob("test_*.py") for mark in marks(path)]
    assert {row for mark in found for row in mark.rows if not mark.limits} == set(CASES)


def test_every_mark_names_a_row():
    named = {row for path in TESTS.glob("test_*.py") for mark in marks(path) for row in mark.rows}
    assert named <= set(CASES)


def test_marks_are_read_from_functions_and_from_their_file(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "pytestmark = [pytest.mark.gpu, pytest.mark.matrix('T2')]\n"
        "@pytest.mark.slow\n@pytest.mark.matrix('T1', 'T3')\ndef test_a(): ...\n"
        "def test_b(): ...\ndef helper(): ...\n"
    )
    assert [tuple(mark) for mark in marks(path)] == [
        (("T2", "T1", "T3"), "test_x.py::test_a", ("gpu", "slow")),
        (("T2",), "test_x.py::test_b", ("gpu",)),
    ]
