"""Claims about what our handler makes of TrainingArguments: whose setting counts, what is refused and what is said."""

import logging

import pytest
import torch
from torch import nn

from hf_automagic import Automagic, AutomagicConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BETA1, BETA2, BETA3 = AutomagicConfig().betas


def arguments(folder, **options):
    return transformers.TrainingArguments(
        **{"output_dir": str(folder), "optim": "automagic_8bit", "report_to": [], "use_cpu": True, **options}
    )


def answer(args, model=None):
    return transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)


def test_without_a_model_there_are_options_and_no_params(tmp_path):
    cls, kwargs = answer(arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, optim="came"))
    assert cls is Automagic
    assert kwargs == {"self_tuning": False, "quantize_states": False, "lr": 1e-3, "weight_decay": 0.1}
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0}]
    assert [g["weight_decay"] for g in cls(groups, **kwargs).param_groups] == [0.0]


def test_with_a_model_the_params_are_our_groups(tmp_path):
    _, kwargs = answer(arguments(tmp_path, weight_decay=0.1), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert [(g["role"], g["weight_decay"]) for g in kwargs["params"]] == [("bias", 0.0), ("norm", 0.0), ("full", 0.1)]


def test_the_table_of_handlers_answers_as_the_trainer_does(tmp_path):
    trainer_optimizer = pytest.importorskip("transformers.trainer_optimizer")
    args = arguments(tmp_path, optim_args="max_lr=0.01")
    context = trainer_optimizer.OptimizerContext(args, None, {}, {}, {"max_lr": "0.01"})
    assert trainer_optimizer._OPTIMIZER_HANDLERS["automagic_8bit"](context) == answer(args)


@pytest.mark.parametrize(
    ("optim_args", "option", "value"),
    [
        ("lr=1e-2", "lr", 1e-2),
        ("weight_decay=0.3", "weight_decay", 0.3),
        ("beta2=0.95", "betas", (BETA1, 0.95, BETA3)),
        ("self_tuning=False", "self_tuning", False),
        ({"max_lr": "3e-4"}, "max_lr", 3e-4),
        (None, "lr", 5e-5),
    ],
)
def test_optim_args_beat_all(tmp_path, optim_args, option, value):
    assert answer(arguments(tmp_path, weight_decay=0.1, optim_args=optim_args))[1][option] == value


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "no option 'max_l_r'; did you mean 'max_lr'", {"optim_args": "max_l_r=1e-3"}),
        (TypeError, "no option 'max_l_r'; did you mean 'max_lr'", {"optim_args": {"max_l_r": 1e-3}}),
        (ValueError, "must be name=value with commas between, got 'factored'", {"optim_args": "factored"}),
        (ValueError, "max_grad_norm=2 in optim_args .* the Trainer's to 0", {"optim_args": "max_grad_norm=2"}),
        (ValueError, "new_modules needs the model itself, got None", {"optim_args": "new_modules=head"}),
        (ValueError, "block_size must be", {"optim_args": "block_size=100"}),
    ],
)
def test_wrong_options_stop_the_run_before_it_starts(tmp_path, error, match, options):
    with pytest.raises(error, match=match):
        answer(arguments(tmp_path, **options))


def test_our_clipping_needs_the_trainers_off(tmp_path):
    args = arguments(tmp_path, optim_args="max_grad_norm=2", max_grad_norm=0.0)
    assert answer(args)[1]["max_grad_norm"] == 2.0


def test_new_modules_are_named_in_optim_args(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    _, kwargs = answer(arguments(tmp_path, optim_args="new_modules=head"), model)
    assert [(g["role"], g["names"]) for g in kwargs["params"]] == [("new", ["head.weight"]), ("full", ["body.weight"])]


def warnings_of(caplog, args, model=None):
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        answer(args, model)
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_adams_numbers_are_not_read_and_that_is_said_once(tmp_path, caplog):
    said = warnings_of(caplog, arguments(tmp_path, adam_beta1=0.85, adam_epsilon=1e-6))
    assert said == [
        "adam_beta1=0.85 is Adam's, automagic_8bit does not read it; write optim_args='beta1=0.85'",
        "adam_epsilon=1e-06 is Adam's, automagic_8bit does not read it; write optim_args='eps3=1e-06'",
    ]


@pytest.mark.parametrize(
    "options", [{}, {"adam_beta1": 0.85, "optim_args": "beta1=0.85"}], ids=["untouched", "followed"]
)
def test_nothing_is_said_where_nothing_is_lost(tmp_path, caplog, options):
    assert warnings_of(caplog, arguments(tmp_path, **options)) == []


def test_the_banner_states_the_law_the_groups_and_a_high_start_once(tmp_path, caplog):
    args = arguments(tmp_path, learning_rate=1e-2, optim_args="beta1=0.85, lr_search=true", lr_scheduler_type="cosine")
    model = nn.Linear(4, 4)
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer = transformers.Trainer(model, args)
        trainer.create_optimizer()
    (banner,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("optim=")]
    assert banner.splitlines()[0] == (
        "optim=automagic_8bit: lr 0.01 from learning_rate, weight_decay 0 from weight_decay, "
        f"lr_search True from optim_args, betas {(0.85, BETA2, BETA3)} from optim_args; adam_* are not read; "
        "the Trainer clips to max_grad_norm 1; the cosine schedule multiplies the rate."
    )
    assert trainer.optimizer.describe() in banner
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("lr 0.01 lies above max_lr 0.0006")


def test_replicas_stay_silent(tmp_path, caplog, monkeypatch):
    args = arguments(tmp_path, adam_beta1=0.85)
    monkeypatch.setattr(type(args), "should_log", property(lambda self: False))
    assert warnings_of(caplog, args, nn.Linear(2, 2)) == []
    transformers.Trainer(nn.Linear(2, 2), args).create_optimizer()
    assert not [record for record in caplog.records if record.name.startswith("hf_automagic")]


def test_logging_that_is_set_up_is_left_as_it_is(tmp_path):
    assert logging.getLogger().handlers  # pytest's
    transformers.Trainer(nn.Linear(2, 2), arguments(tmp_path)).create_optimizer()
    assert logging.getLogger("hf_automagic").handlers == []


def test_other_optimizers_answer_as_before(tmp_path):
    assert answer(arguments(tmp_path, optim="adamw_torch", optim_args=None))[0] is torch.optim.AdamW


def test_a_trainer_steps_and_shows_the_schedule_while_the_rate_is_its_own(tmp_path):
    model = nn.Linear(4, 1)

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x, labels=None):
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    data = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(8)]
    args = arguments(tmp_path, max_steps=3, logging_steps=1, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)
    trainer = transformers.Trainer(Squares(), args, train_dataset=data)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Automagic)
    shown = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert shown == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    rails = [group["max_lr"] for group in trainer.optimizer.optimizer.param_groups]
    assert trainer.optimizer.optimizer.get_learning_rates() == pytest.approx([rail / 3 for rail in rails])
