"""Claims about the card's section: it is there once, tells the truth, and leaves the rest of the card alone."""

from importlib import resources

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.reporting.card import END, START, insert_section, render_section, update_card
from hf_automagic.reporting.stats import RunRecord, describe_run

hub = pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

HEAD = """---
library_name: peft
base_model: someone/some-model
tags:
- lora
- optimizer:adamw_torch
model-index:
- name: mine
  results:
  - task:
      type: text-classification
    metrics:
    - type: accuracy
      value: 0.9
    dataset:
      type: glue
      name: glue
---
"""
STOCK = """
# mine

- seed: 42
- optimizer: Use OptimizerNames.ADAMW_TORCH_FUSED with betas=(0.9,0.999) and epsilon=1e-08 and optimizer_args=None
- lr_scheduler_type: linear

### Framework versions
"""


def record(**options) -> RunRecord:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(16, 32))], "role": role} for role in ("lora_A", "full", "bias")
    ]
    rows = [{"step": 10, "optim/lr_A": 8e-4, "optim/lr_full": 8e-5}]
    rows += [{"step": 20, "optim/lr_A": 2e-4, "optim/lr_full": 2e-5, "optim/skipped_steps": 3.0}]
    events = [{"code": "EDGE_CASE"}, {"code": "NONFINITE_STEP"}, {"code": "EDGE_CASE"}]
    return RunRecord(describe_run(Automagic(groups, **options)), rows, events)


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HEAD + STOCK)
    return path


def test_writing_twice_changes_nothing(card):
    update_card(card, record())
    once = card.read_bytes()
    update_card(card, record())
    assert card.read_bytes() == once
    assert once.count(START.encode()) == once.count(END.encode()) == 1


def test_metadata_stays_but_for_the_tags(card):
    before = metadata(card.read_text())
    update_card(card, record())
    after = metadata(card.read_text())
    assert after.pop("tags") == ["lora", "hf_automagic", "optimizer:Automagic"]
    before.pop("tags")
    assert after == before
    assert hub.ModelCard.load(card).data.library_name == "peft"


@pytest.mark.parametrize("tags", ["", "tags: single\n", "tags:\n- hf_automagic\n"])
def test_tags_of_every_form_are_kept(tmp_path, tags):
    path = tmp_path / "README.md"
    path.write_text(f"---\nlicense: mit\n{tags}---\n# mine\n")
    kept = ["single"] if "single" in tags else []
    update_card(path, record())
    assert metadata(path.read_text())["tags"] == [*kept, "hf_automagic", "optimizer:Automagic"]


def test_a_card_without_metadata_gets_some(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# mine\n")
    update_card(path, record())
    assert metadata(path.read_text()) == {"tags": ["hf_automagic", "optimizer:Automagic"]}


@pytest.mark.parametrize(
    "stock", ["Use adamw_torch with betas=(0.9,0.999)", "Use automagic and the args are:\nNo more"]
)
def test_the_stock_cards_optimizer_is_put_right(card, stock):
    card.write_text(f"{HEAD}\n- seed: 1\n- optimizer: {stock}\n- steps: 3\n")
    update_card(card, record())
    assert "- seed: 1\n- optimizer: Automagic, see below\n- steps: 3\n" in card.read_text()


def test_text_around_the_section_stays_where_it_is():
    text = insert_section("above\n", "first")
    moved = text + "below\n"
    assert insert_section(moved, "second") == moved.replace("first", "second")


@pytest.mark.parametrize("damage", [START, END, f"{START}\nlost", f"{END}\n{START}", f"{START}a{END}{START}b{END}"])
def test_damaged_markers_end_up_as_one_section(damage):
    text = insert_section(f"above\n{damage}\nbelow\n", "section")
    assert text.count(START) == text.count(END) == 1
    assert f"{START}\nsection\n{END}" in text
    assert text.startswith("above\n")
    assert "below" in text


def test_the_section_tells_rates_memory_steps_events_and_options():
    section = render_section(record(max_lr=3e-3, betas=(0.7, 0.98, 0.999)), ["learning_rates"])
    assert "## Optimizer: Automagic" in section
    assert "| LoRA A | 512 | 0.0009 | 0.0008 | 0.0002 |" in section
    assert "| full weights | 1,024 | 0.0009 | 8e-05 | 2e-05 |" in section
    assert (
        f"{record().config['memory']['bytes_per_parameter']:.2f} bytes for each of 1,536 trained elements" in section
    )
    assert "20, 3 of them left out because a gradient was not finite" in section
    assert "2 edge case, 1 nonfinite step" in section
    assert "`max_lr=0.003`" in section
    assert "`betas=0.7:0.98:0.999`" in section
    assert "(./optimizer_stats/learning_rates.png)" in section
    assert "$" not in section


def test_defaults_are_not_listed_as_changes():
    assert "- Options: the defaults" in render_section(record())


def test_a_rate_that_is_the_users_is_told_as_such():
    section = render_section(record(self_tuning=False))
    assert "The learning rate was the user's" in section
    assert "| LoRA A | 512 | none |" in section


def test_only_plots_that_were_drawn_are_shown(card):
    (card.parent / "optimizer_stats").mkdir()
    (card.parent / "optimizer_stats" / "memory.png").touch()
    update_card(card, record())
    assert "memory.png" in card.read_text()
    assert "learning_rates.png" not in card.read_text()


def test_the_template_is_package_data():
    assert resources.files("hf_automagic.reporting").joinpath("card_section.md").is_file()
