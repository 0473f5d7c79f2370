"""Claims about stock Trainers: a string is enough for roles, losses and resumes, and what is missing is said once."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, Trainer

from hf_automagic import Automagic, create_automagic_optimizer, list_optimizers
from hf_automagic.callbacks import EffectiveLRCallback, attach
from hf_automagic.trainer import AutomagicTrainer, AutomagicTrainerMixin
from tests.tiny_runs import (
    CONTEXT,
    VOCABULARY,
    InOrder,
    TinyRegression,
    argument_values,
    arguments,
    assert_same_bits,
    inner,
    language,
    logged_losses,
    regression_points,
    seen_losses,
    sentences,
    tiny_adapter,
    tiny_llama,
    weights,
)

# peft still uses names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")


def banner(caplog) -> str:
    """What our logger of the Trainer door said, in one piece."""
    told = [record.getMessage() for record in caplog.records if record.name == "hf_automagic.integrations.trainers"]
    assert len(told) == 1
    return told[0]


# every string, every class


@pytest.mark.parametrize("optim", list_optimizers())
@pytest.mark.matrix("T1")
def test_every_string_trains_an_adapter_and_resumes_bit_for_bit(tmp_path, optim):
    whole = language(tmp_path, model=tiny_adapter(), optim=optim, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = language(tmp_path, model=tiny_adapter(), optim=optim, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [group["role"] for group in inner(resumed).param_groups] == ["lora_A", "lora_B"]
    assert_same_bits(weights(whole.model), weights(resumed.model))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(inner(whole).state.get(p, {}), inner(resumed).state.get(q, {}))


def test_an_encoder_decoder_shows_its_losses(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    trainer = Seq2SeqTrainer(
        model=T5ForConditionalGeneration(config),
        args=Seq2SeqTrainingArguments(**argument_values(tmp_path, optim=CONTEXT)),
        train_dataset=sentences(32),
    )
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


def test_a_class_handed_over_gets_the_groups_of_the_model(tmp_path):
    chosen = (Automagic, {"lr": 1e-4})
    trainer = Trainer(tiny_adapter(), arguments(tmp_path, weight_decay=0.1), optimizer_cls_and_kwargs=chosen)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert [(group["role"], group["max_lr"], group["weight_decay"]) for group in groups] == [
        ("lora_A", 6e-4, 0.1),
        ("lora_B", 4.8e-3, 0.1),
    ]
    assert trainer.optimizer.pair_ranks() is not None
    assert trainer.optimizer_cls_and_kwargs is chosen
    assert chosen == (Automagic, {"lr": 1e-4})


def test_groups_of_the_users_own_are_kept(tmp_path):
    model = TinyRegression()
    own = [{"params": list(model.parameters()), "role": "new"}]
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(Automagic, {"params": own, "lr": 1e-4}))
    trainer.create_optimizer()
    assert [group["role"] for group in trainer.optimizer.param_groups] == ["new"]


# losses


def test_the_models_hook_shows_the_losses_that_are_logged(tmp_path):
    trainer = language(tmp_path, model=tiny_adapter())
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


def test_an_optimizer_of_the_users_own_is_shown_the_losses_once(tmp_path):
    base = tiny_llama()
    optimizer = create_automagic_optimizer(base, CONTEXT)  # listens to the model already
    trainer = language(tmp_path, model=base, optimizers=(optimizer, None), gradient_accumulation_steps=2)
    trainer.train()
    assert len(optimizer.loss_intake.hooks) == len(base._forward_hooks) == 1
    assert logged_losses(trainer) == seen_losses(trainer)


def test_a_second_model_takes_over_the_hook(tmp_path):
    trainer = language(tmp_path, model=tiny_llama())
    trainer.train()
    trainer.model_wrapped = trainer.model = tiny_adapter()
    trainer.optimizer = None
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


class OwnLoss(Trainer):
    """Steps on another loss than the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class OwnLossShown(AutomagicTrainerMixin, OwnLoss):
    """The same, with the mixin."""


def squared_logits(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


OWN_LOSSES = [
    pytest.param(OwnLoss, OwnLossShown, {}, id="compute_loss"),
    pytest.param(Trainer, AutomagicTrainer, {"compute_loss_func": squared_logits}, id="compute_loss_func"),
    pytest.param(Trainer, AutomagicTrainer, {"label_smoothing_factor": 0.1}, id="label_smoothing"),
]


@pytest.mark.parametrize(("stock", "shown", "changes"), OWN_LOSSES)
def test_a_loss_made_outside_the_model_needs_the_mixin_and_the_banner_says_so(tmp_path, caplog, stock, shown, changes):
    trainer = language(tmp_path / "stock", cls=stock, **changes)
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer.train()
    name = stock.__name__
    classes = {"Trainer": "hf_automagic.AutomagicTrainer"}
    remedy = classes.get(name, f"class My{name}(hf_automagic.AutomagicTrainerMixin, {name})")
    assert banner(caplog).splitlines()[-1] == (
        f"Stock {name}: the logs hold the schedule's learning_rate, and no optim/lr_mean or other key of ours; the "
        f"context follows the gradients alone, as {name} computes its loss outside the model. "
        f"{remedy} mends that."
    )
    assert "saw no loss" not in caplog.text
    assert torch.tensor(inner(trainer).c_optim.history().losses).isnan().all()

    trainer = language(tmp_path / "shown", cls=shown, **changes)
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


def test_a_foreign_loss_is_not_listened_to_even_where_the_factory_did(tmp_path):
    model = tiny_llama()
    optimizer = create_automagic_optimizer(model, CONTEXT)
    trainer = language(tmp_path, model=model, cls=OwnLoss, optimizers=(optimizer, None))
    trainer.train()
    assert torch.tensor(optimizer.c_optim.history().losses).isnan().all()


# the banner


@pytest.mark.parametrize("remedy", ["callbacks", "mixin"])
def test_with_the_remedy_nothing_is_missing(tmp_path, caplog, remedy):
    trainer = language(tmp_path, cls=AutomagicTrainer if remedy == "mixin" else Trainer, max_steps=1)
    if remedy == "callbacks":
        attach(trainer, EffectiveLRCallback())
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer.train()
    law, *table = banner(caplog).splitlines()
    assert law.startswith(f"optim={CONTEXT}: lr 0.001 from learning_rate")
    assert table[-2] == (
        "The learning rate follows from role, width and step, whatever lr is; a scheduler multiplies it."
    )
    assert "eager stacks" in table[-1]


def test_other_optimizers_are_left_alone(tmp_path, caplog):
    trainer = Trainer(
        TinyRegression(), arguments(tmp_path, optim="adamw_torch"), train_dataset=InOrder(regression_points(8))
    )
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer.train()
    assert type(inner(trainer)) is torch.optim.AdamW
    assert not [record for record in caplog.records if record.name.startswith("hf_automagic")]
    assert not trainer.model._forward_hooks


def test_the_banner_shows_a_new_head_at_its_rail(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = language(tmp_path, model=peft.get_peft_model(tiny_llama(), lora), optim="automagic_8bit")
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer.create_optimizer()
    (head,) = [line.split() for line in banner(caplog).splitlines() if line.startswith("new ")]
    assert head == ["new", "1", "512", "32x16", "0.0068", "0.0068", "0"]
