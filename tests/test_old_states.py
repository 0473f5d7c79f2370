"""The promise that a state, once saved, loads in every later version."""

import pytest
import torch

from hf_automagic.optim.automagic import SCHEMA
from tests.old_states import AFTER, BEFORE, CASES, FOLDER, build, run, write

FILES = sorted(FOLDER.glob("states_of_schema_*.pt"))


def test_every_schema_so_far_has_its_file():
    assert [path.name for path in FILES] == [f"states_of_schema_{i}.pt" for i in range(1, SCHEMA + 1)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.matrix("T3")
def test_a_file_of_an_older_version_loads_and_goes_on_as_it_did(path, case):
    kept = torch.load(path, weights_only=True)[case]
    params, optimizer = build(case)
    for param, weight in zip(params, kept["weights"], strict=True):
        param.data.copy_(weight)
    optimizer.load_state_dict(kept["state_dict"])
    again = optimizer.state_dict()["state"]
    for i, state in kept["state_dict"]["state"].items():
        assert all(torch.equal(value, again[i][name]) for name, value in state.items())
    run(params, optimizer, range(BEFORE, BEFORE + AFTER))
    for param, weight, later in zip(params, kept["weights"], kept["later"], strict=True):
        assert float((later - weight).norm()) > 0
        # another version may round otherwise, and a code may fall to the other side
        assert float((param.detach() - later).norm()) <= 0.02 * float((later - weight).norm())
    counters = {name: int(value) for name, value in optimizer.param_groups[0]["counters"].items()}
    assert counters == {"applied": BEFORE + AFTER - 1, "skipped": 1, "consecutive": 0, "offender": 0}
    assert [event.step for event in optimizer.events()][:1] == [4]


def test_an_old_file_is_never_written_again():
    with pytest.raises(FileExistsError, match="stays as it is"):
        write()
