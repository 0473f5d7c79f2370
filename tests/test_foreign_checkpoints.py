"""A checkpoint of another model is refused by name, whatever its shapes; what wrappers add makes no other name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_automagic import Automagic
from hf_automagic.peft import param_groups

pytestmark = pytest.mark.matrix("T15")


class Stack(nn.Module):
    """Layers of one shape under the names that a test gives them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


# how an optimizer comes to know names
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "the model": param_groups,
    "pairs": lambda model: model.named_parameters(),
    "pairs in a group": lambda model: [{"params": list(model.named_parameters())}],
}


def stepped(params: Any) -> Automagic:
    optimizer = Automagic(params)
    for step in range(2):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()
    return optimizer


def told(optimizer: Automagic) -> list[str]:
    return [name for g in optimizer.param_groups for name in g.get("param_names") or g.get("names") or ()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("names", "first"),
    [(["query", "key"], "key"), (["value", "query"], "value")],
    ids=["another layer", "another order"],
)
def test_parameters_of_other_names_are_refused_and_nothing_is_loaded(way: str, names: list[str], first: str):
    file = stepped(WAYS[way](Stack(["query", "value"]))).state_dict()
    optimizer = Automagic(WAYS[way](Stack(names)))
    other = {"key": "value", "value": "query"}[first]
    with pytest.raises(
        ValueError, match=rf"parameter \d is layers\.{other}\.\w+ in the checkpoint and layers\.{first}\.\w+ here"
    ):
        optimizer.load_state_dict(file)
    assert not optimizer.state
    assert "counters" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("saved", "here", "sentence"),
    [
        (["a"], ["a", "b"], "is missing in the checkpoint and layers.b.bias here"),
        (["a", "b"], ["a"], "is layers.b.bias in the checkpoint and missing here"),
    ],
    ids=["one more", "one less"],
)
def test_another_number_of_layers_is_refused_with_the_first_that_differs(
    saved: list[str], here: list[str], sentence: str
):
    file = stepped(param_groups(Stack(saved))).state_dict()
    with pytest.raises(ValueError, match=sentence):
        Automagic(param_groups(Stack(here))).load_state_dict(file)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "module._orig_mod.base_model.model.",
    "_fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("is_saved_wrapped", [True, False])
def test_names_that_a_wrapper_has_lengthened_load_to_the_bit(prefix: str, is_saved_wrapped: bool):
    """Under torch's own key for names, too, which nobody strips on the way in."""
    model = Stack(["query", "value"])
    plain = [{"params": list(model.named_parameters())}]
    wrapped = [{"params": [(prefix + name, p) for name, p in model.named_parameters()]}]
    writer = stepped(wrapped if is_saved_wrapped else plain)
    reader = Automagic(plain if is_saved_wrapped else wrapped)
    own = told(reader)
    reader.load_state_dict(writer.state_dict())
    assert told(reader) == own
    for param in model.parameters():
        for key, value in writer.state[param].items():
            assert torch.equal(reader.state[param][key], value)


def test_a_compiled_model_resumes_what_the_plain_one_saved():
    model = Stack(["query", "value"])
    file = stepped(param_groups(model)).state_dict()
    Automagic(param_groups(torch.compile(model))).load_state_dict(file)  # type: ignore[arg-type]


def test_where_one_side_has_no_names_positions_count():
    named, bare = param_groups(Stack(["query"])), [{"params": list(Stack(["key"]).parameters())}]
    file = stepped([{"params": group["params"]} for group in named]).state_dict()
    Automagic(named).load_state_dict(file)
    file = stepped([{"params": list(Stack(["query"]).named_parameters())}]).state_dict()
    Automagic(bare).load_state_dict(file)


def test_the_remedy_that_the_sentence_names_works():
    file = stepped(param_groups(Stack(["query"]))).state_dict()
    reader = Automagic(param_groups(Stack(["key"])))
    without = copy.deepcopy(file)
    for group in without["param_groups"]:
        group.pop("names")
    reader.load_state_dict(without)
    assert told(reader) == ["layers.key.bias", "layers.key.weight"]


def test_a_trainer_refuses_the_checkpoint_of_other_layers_with_the_same_shapes(tmp_path: Path):
    """PEFT itself only warns of the keys that are missing, and the run would go on with another layer's momenta."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from hf_automagic.trainer import AutomagicTrainer
    from tests.tiny_runs import arguments, sentences, tiny_llama

    def trainer(layers: list[str], folder: Path, steps: int) -> AutomagicTrainer:
        config = peft.LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM")
        args = arguments(folder, max_steps=steps, optim="automagic_8bit", save_strategy="steps", save_steps=1)
        return AutomagicTrainer(peft.get_peft_model(tiny_llama(), config), args, train_dataset=sentences(16))

    trainer(["q_proj", "v_proj"], tmp_path / "a", 1).train()
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default\.weight in the checkpoint and .*k_proj\.lora_A"):
        trainer(["k_proj", "o_proj"], tmp_path / "b", 2).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")
        )
