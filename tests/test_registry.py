"""Claims about the registry: records are checked, found by wildcards, and a wrong name gets the nearest one."""

import dataclasses

import pytest

from hf_automagic import cli
from hf_automagic.config import AutomagicConfig, make_config
from hf_automagic.registry import (
    OptimizerInfo,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
    unregister_optimizer,
)


@pytest.fixture
def mine():
    info = OptimizerInfo("mine", "An optimizer for this test.", {"max_lr": 0.5})
    register_optimizer(info)
    yield info
    if info.name in list_optimizers():
        unregister_optimizer(info.name)


@pytest.mark.parametrize("name", list_optimizers())
def test_every_record_says_what_it_is_and_builds(name):
    info = get_optimizer_info(name)
    assert info.name == name
    assert info.description.endswith(".")
    assert make_config(info.options) == dataclasses.replace(AutomagicConfig(), **info.options)


def test_the_default_string_is_the_default_config():
    assert make_config(get_optimizer_info("automagic_8bit").options) == AutomagicConfig()


def test_fp32_siblings_differ_in_storage_alone():
    for name in ("automagic", "automagic_coptim", "came"):
        wide, narrow = (make_config(get_optimizer_info(n).options) for n in (name, f"{name}_8bit"))
        assert wide == narrow.replace(quantize_states=False) != narrow


def test_came_leaves_the_rate_to_the_user():
    assert [make_config(get_optimizer_info(n).options).self_tuning for n in ("came", "came_8bit")] == [False, False]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("came*", ["came", "came_8bit"]),
        ("automagic", ["automagic"]),
        ("c?me", ["came"]),
        ("adam*", []),
    ],
)
def test_wildcards_select_names(pattern, names):
    assert list_optimizers(pattern) == names


def test_a_registered_record_is_listed_until_it_is_unregistered(mine):
    assert mine.name in list_optimizers("m*")
    register_optimizer(OptimizerInfo("mine", "An optimizer for this test.", {"max_lr": 0.5}))
    assert unregister_optimizer("mine") is mine
    assert mine.name not in list_optimizers()


def test_a_name_is_not_given_away_twice(mine):
    with pytest.raises(ValueError, match="there is an optimizer 'mine' already; unregister_optimizer it first"):
        register_optimizer(OptimizerInfo("mine", "Another one.", {}))
    assert get_optimizer_info("mine") is mine


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(TypeError, match="no optimizer 'automagic8bit'; did you mean 'automagic_8bit'"):
        get_optimizer_info("automagic8bit")


@pytest.mark.parametrize(
    ("error", "match", "record"),
    [
        (TypeError, "no option 'max_rl'; did you mean 'max_lr'", {"name": "x", "options": {"max_rl": 1.0}}),
        (ValueError, "block_size", {"name": "x", "options": {"block_size": 100}}),
        (ValueError, "name must be lower case letters, digits and underscores, got 'My-Name'", {"name": "My-Name"}),
    ],
)
def test_a_record_that_cannot_be_built_is_refused(error, match, record):
    with pytest.raises(error, match=match):
        OptimizerInfo(description="No good.", **record)


def test_a_record_cannot_be_changed(mine):
    with pytest.raises(TypeError, match="does not support item assignment"):
        mine.options["max_lr"] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.name = "other"


def test_the_command_lists_names_and_their_options(capsys):
    assert cli.main(["list", "came*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["came", "came_8bit"]
    assert "self_tuning=False, quantize_states=False" in lines[0]


def test_the_command_fails_where_nothing_matches(capsys):
    assert cli.main(["list", "adam*"]) == 1
    assert "no optimizer matches 'adam*'" in capsys.readouterr().err
