"""The seeds' names build Automagic with their documents' defaults, and nothing else."""

import copy
import dataclasses
import inspect
import logging

import pytest
import torch
from torch import Tensor, nn

import hf_automagic
from hf_automagic import (
    Automagic,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_COptim8bit,
    AutomagicConfig,
    Optimizer8BitConfig,
    get_optimizer_info,
)
from hf_automagic.config import make_config
from tests.seed_cases import CLASSES, CONFIG_DEFAULTS, SECOND, make, run, states_of

SECOND_SEED_ARGUMENTS = [
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "warmup_steps",
    "context_window",
    "edge_threshold",
    "adaptation_rate",
    "momentum_scales",
    "blocksize",
    "verbose",
]
HELPERS = [
    "AdaptiveOptimizer",
    "CustomQuantizationStrategy",
    "MemoryMonitor",
    "Optimizer8BitConfig",
    "TrainingDashboard",
    "adjust_config_for_model_size",
    "check_memory_leak",
    "check_quantization_quality",
    "get_recommended_config",
    "monitor_learning_rates",
    "progressive_quantization_training",
]


def test_the_config_has_the_documents_defaults_and_may_be_changed():
    config = Optimizer8BitConfig()
    assert vars(config) == CONFIG_DEFAULTS
    config.block_size = 128
    assert dataclasses.asdict(config)["block_size"] == 128


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_class_has_its_documents_defaults(cls):
    config = cls([nn.Parameter(torch.zeros(3))]).config
    assert {name: getattr(config, name) for name in CLASSES[cls]} == CLASSES[cls]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_class_is_automagic_with_other_defaults(cls):
    ends = []
    for optimizer_class, options in ((cls, {}), (Automagic, CLASSES[cls])):
        model, optimizer = make(optimizer_class, **{**options, "lr": 1e-4, "warmup_steps": 2, "weight_decay": 0.1})
        run(model, optimizer, 12)
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("field", CONFIG_DEFAULTS)
def test_every_config_field_is_a_keyword(field):
    values = {bool: lambda v: not v, float: lambda v: v * 1.5, int: lambda v: v * 2}
    changed = values[type(CONFIG_DEFAULTS[field])](CONFIG_DEFAULTS[field])
    config = Optimizer8BitConfig(**{field: changed})
    optimizer = Automagic_CameAMP_8Bit([nn.Parameter(torch.zeros(3))], **config.__dict__)
    assert getattr(optimizer if field == "verbose" else optimizer.config, field) == changed


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(("wrong", "right"), [("edge_treshold", "edge_threshold"), ("verbos", "verbose")])
def test_an_unknown_keyword_is_answered_with_the_nearest(cls, wrong, right):
    with pytest.raises(TypeError, match=f"no option '{wrong}'; did you mean '{right}'"):
        cls([nn.Parameter(torch.zeros(3))], **{wrong: 1})


def test_the_second_seeds_arguments_stand_in_its_order():
    listed = list(inspect.signature(Automagic_CameAMP_COptim8bit).parameters)
    assert listed[:-1] == ["params", *SECOND_SEED_ARGUMENTS]
    config = Automagic_CameAMP_COptim8bit(
        [nn.Parameter(torch.zeros(3))], 2e-3, (0.7, 0.9, 0.99), (1e-20, 1e-10, 1e-5), 0.1, 7, 50, 0.9, 0.2, [1, 3], 512
    ).config
    assert (config.lr, config.betas, config.eps) == (2e-3, (0.7, 0.9, 0.99), (1e-20, 1e-10, 1e-5))
    assert (config.weight_decay, config.warmup_steps, config.context_window) == (0.1, 7, 50)
    assert (config.edge_case_threshold, config.adaptation_rate) == (0.9, 0.2)
    assert (config.momentum_scales, config.block_size) == ((1, 3), 512)


@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("cls", [Automagic_CameAMP_COptim8bit, Automagic_CameAMP_8Bit], ids=lambda c: c.__name__)
def test_blocksize_and_block_size_are_the_same(cls, blocksize):
    for spelling in ("blocksize", "block_size"):
        model, optimizer = make(cls, **{spelling: blocksize})
        run(model, optimizer, 1)
        assert states_of(optimizer, model.lora_A)["exp_avg_scale"].shape == (16, max(1, 512 // blocksize))


def test_each_documents_edge_threshold_keeps_its_meaning():
    param = [nn.Parameter(torch.zeros(3))]
    first = Automagic_CameAMP_8Bit(param, edge_threshold=0.3, edge_case_threshold=0.8).config
    second = Automagic_CameAMP_COptim8bit(param, edge_threshold=0.8, edge_suppression_threshold=0.3).config
    assert (first.edge_threshold, first.edge_case_threshold) == (0.3, 0.8)
    assert (second.edge_threshold, second.edge_case_threshold) == (0.3, 0.8)
    group = Automagic_CameAMP_COptim8bit([{"params": param, "edge_threshold": 0.7}]).param_groups[0]
    assert (group["edge_threshold"], group["edge_case_threshold"]) == (0.6, 0.7)
    again = Automagic_CameAMP_COptim8bit([group]).param_groups[0]
    assert (again["edge_threshold"], again["edge_case_threshold"]) == (0.6, 0.7)


@pytest.mark.parametrize("name", ["automagic_coptim", "automagic_coptim_8bit"])
def test_a_coptim_string_has_the_second_seeds_features_and_our_best_storage(name):
    config = make_config(get_optimizer_info(name).options)
    features = ("betas", "self_tuning", "lr_granularity", "cautious", "context", "momentum_scales", "error_correction")
    assert {f: getattr(config, f) for f in features} == {f: SECOND[f] for f in features}
    assert (config.warmup_steps, config.block_size, config.weight_decay, config.lr) == (
        0,
        128,
        0.0,
        AutomagicConfig.lr,
    )
    assert config.quantize_states is name.endswith("_8bit")
    assert (config.allora, config.lora_rank_penalty, config.edge_suppression) == (False, False, False)


def test_verbose_logs_at_info_and_only_when_somebody_asks(caplog):
    with caplog.at_level(logging.INFO, "hf_automagic.seeds"):
        model, optimizer = make(verbose=True)
        assert caplog.messages == [optimizer.describe()]
        run(model, optimizer, 2)
        assert len(caplog.messages) == 1
        copy.deepcopy(optimizer).get_memory_stats()
        assert caplog.messages[1].startswith("mean learning rate 0.00")
        make()[1].get_memory_stats()
    assert len(caplog.messages) == 2
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_a_verbose_step_asks_the_device_nothing(monkeypatch):
    model, optimizer = make(verbose=True, lora_rank_penalty=False)
    run(model, optimizer, 1)

    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__format__"):
        monkeypatch.setattr(Tensor, name, refuse)
    optimizer.step(loss=torch.ones(()))


def test_every_name_of_the_documents_is_the_packages():
    assert {*HELPERS, *(cls.__name__ for cls in CLASSES)} <= set(hf_automagic.__all__)
