"""Every python block of the two seed documents runs as it stands there; only the import lines name this package.

`seed_examples/` holds the blocks. What a block leaves out, such as models, data and loss functions, is supplied here,
and what it leaves behind is checked.
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_automagic
from hf_automagic import Automagic_CameAMP_8Bit, Automagic_CameAMP_COptim8bit, Optimizer8BitConfig

FOLDER = Path(__file__).parent / "seed_examples"
FIRST, SECOND = "automagic_cameamp_8bit", "automagic_cameamp_coptim8bit"
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


def read_blocks(document: str) -> list[str]:
    text = (FOLDER / f"{document}.txt").read_text(encoding="utf-8")
    return [textwrap.dedent(block) for _, block in BLOCK.findall(text)]


class LoRA(nn.Module):
    """A pair large enough for 8 bits, as hand-written as the document's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(512, 16, bias=False)
        self.lora_B = nn.Linear(16, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.lora_B(self.lora_A(x))


def loss_of(model: nn.Module) -> torch.Tensor:
    return torch.mean(model(torch.randn(4, 512)) ** 2)


def trained(model: nn.Module, cls: type = Automagic_CameAMP_8Bit, steps: int = 3, **options: Any) -> Any:
    optimizer = cls(model.parameters(), **{"lr": 1e-4, "warmup_steps": 0, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss=loss)
    return optimizer


def train_epoch(model: nn.Module, optimizer: Any, dataloader: list[torch.Tensor]) -> None:
    for batch in dataloader:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


# what is supplied


def nothing() -> Names:
    return {}


def tensors() -> Names:
    original, new = torch.randn(5), torch.randn(5)
    return {
        "original_tensor": original,
        "dequantized_tensor": original.round(),
        "error_accumulator": torch.zeros(5),
        "new_tensor": new,
        "rest": original - original.round(),
    }


def a_large_state() -> Names:
    return {"tensor": torch.zeros(100, 100), "threshold": 4096, "is_optimizer_state": True}


def a_model() -> Names:
    model = LoRA()
    return {"model": model, "before": model.lora_A.weight.detach().clone()}


def a_model_and_data() -> Names:
    def compute_loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    model = LoRA()
    return {"model": model, "dataloader": list(torch.randn(3, 4, 512)), "compute_loss": compute_loss}


def an_optimizer() -> Names:
    return {"optimizer": trained(LoRA())}


def a_small_model_and_optimizer() -> Names:
    model = nn.Linear(512, 1)
    return {"model": model, "optimizer": trained(model)}


def the_classes() -> Names:
    return {name: getattr(hf_automagic, name) for name in ("Automagic_CameAMP_8Bit", "Optimizer8BitConfig")}


def digits() -> Names:
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    batch = torch.randn(4, 784), torch.tensor([0, 1, 2, 3])
    return {
        "model": model,
        "optimizer": Automagic_CameAMP_COptim8bit(model.parameters(), lr=1e-3),
        "criterion": nn.CrossEntropyLoss(),
        "dataloader": [batch] * 2,
        "num_epochs": 2,
    }


def a_context() -> Names:
    optimizer = trained(LoRA(), Automagic_CameAMP_COptim8bit)
    return {"optimizer": optimizer, "base_lr": float(optimizer.param_groups[0]["base_lr"])}


def a_spike() -> Names:
    model = LoRA()
    optimizer = trained(model, Automagic_CameAMP_COptim8bit, steps=25)
    loss_of(model).backward()
    optimizer.step(loss=100.0)
    return {"optimizer": optimizer}


# what is checked


def pass_by(names: Names) -> None:
    """What the block prints is all there is to see."""


def expect(**options: Any) -> Callable[[Names], None]:
    """The block's optimizer, or one that is built from its config, has these options, and steps."""

    def check(names: Names) -> None:
        model = names.get("model") or LoRA()
        config = names.get("config") or next((v for k, v in names.items() if k.endswith("_config")), None)
        optimizer = names.get("optimizer") or Automagic_CameAMP_8Bit(model.parameters(), **config.__dict__)
        assert {name: getattr(optimizer.config, name) for name in options} == options
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        assert len(optimizer.state) == len(list(model.parameters()))

    return check


def check_compensation(names: Names) -> None:
    assert torch.equal(names["corrected_input"], names["new_tensor"] + names["rest"])


def check_decision(names: Names) -> None:
    assert names["use_8bit_quantization"]
    assert "use_high_precision" not in names


def check_training(names: Names) -> None:
    assert names["optimizer"].quantized_states[0]["exp_avg"].error_accumulator.norm() > 0


def check_monitor(names: Names) -> None:
    assert names["monitor"].step_count == 1000


def check_leak(names: Names) -> None:
    names["check_memory_leak"](trained(LoRA()))


def check_quality(names: Names) -> None:
    names["check_quantization_quality"](trained(LoRA()))


def check_rates(names: Names) -> None:
    names["monitor_learning_rates"](trained(LoRA()))


def check_recommendation(names: Names) -> None:
    for memory in (4, 7.9, 8, 12, 16, 80):
        assert names["get_recommended_config"](memory) == hf_automagic.get_recommended_config(memory)


def check_adjustment(names: Names) -> None:
    for size in (9_999_999, 10_000_000, 99_999_999, 100_000_000):
        params = [torch.empty(size, device="meta")]
        ours = hf_automagic.adjust_config_for_model_size(Optimizer8BitConfig(), params)
        assert names["adjust_config_for_model_size"](Optimizer8BitConfig(), params) == ours


def check_progress(names: Names) -> None:
    epochs = []

    def count_epoch(model: nn.Module, optimizer: Any, dataloader: list[torch.Tensor]) -> None:
        epochs.append((optimizer.config.quantize_states, optimizer.config.block_size))
        train_epoch(model, optimizer, dataloader)

    names["train_epoch"] = count_epoch
    names["progressive_quantization_training"](LoRA(), list(torch.randn(2, 4, 512)), 8)
    assert epochs == [(False, 256)] * 2 + [(True, 128)] * 6


def check_adaptation(names: Names) -> None:
    model = nn.Linear(4, 4)
    adaptive = names["AdaptiveOptimizer"](model.parameters(), Optimizer8BitConfig())
    for loss in [1.0] * 200 + [2.0] * 100:
        adaptive.step_with_adaptation(loss + 0 * model.weight.sum())
    assert adaptive.base_config.block_size == 128


def check_dashboard(names: Names) -> None:
    model = LoRA()
    dashboard = names["TrainingDashboard"](trained(model))
    for step in range(2):
        dashboard.update(step)
    dashboard.plot_metrics()
    assert len(dashboard.metrics["memory_usage"]) == 2
    assert dashboard.metrics["quantization_errors"][0] > 0


def check_strategy(names: Names) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 101))
    strategy = names["CustomQuantizationStrategy"]()
    optimizer = Automagic_CameAMP_8Bit(model.parameters(), quantization_strategy=strategy)
    expect()({"model": model, "optimizer": optimizer})
    assert list(optimizer.quantized_states) == [2]


def check_effective_rate(names: Names) -> None:
    assert names["lr_multiplier"] != 1.0
    assert np.float32(names["effective_lr"]) == names["optimizer"].param_groups[0]["effective_lr"].numpy()


def check_consistency(names: Names) -> None:
    assert -1 <= names["consistency"] <= 1
    assert names["consistency"] != 0


def check_saved(names: Names) -> None:
    assert Path("optimizer_state.pth").exists()
    fresh = Automagic_CameAMP_COptim8bit(LoRA().parameters())
    fresh.load_state_dict(names["loaded_state"])
    assert fresh.c_optim.history() == names["optimizer"].c_optim.history()
    assert fresh.c_optim.history().losses


def check_verbose(names: Names) -> None:
    assert names["optimizer"].verbose is True


def check_scales(names: Names) -> None:
    assert names["momentum_scales"] == [1, 10, 25, 50]
    optimizer = trained(LoRA(), Automagic_CameAMP_COptim8bit, momentum_scales=names["momentum_scales"])
    assert {"exp_avg", "exp_avg_k10", "exp_avg_k25", "exp_avg_k50"} <= optimizer.quantized_states[0].keys()


@dataclass(frozen=True)
class Example:
    """One block: which, what is supplied, and what is checked afterwards."""

    document: str
    number: int
    claim: str
    given: Callable[[], Names]
    check: Callable[[Names], None]
    patterns: tuple[str, ...] = ()  # of what the block and its check print


EXAMPLES = [
    Example(FIRST, 0, "error compensation", tensors, check_compensation),
    Example(FIRST, 1, "decision by size", a_large_state, check_decision),
    Example(FIRST, 2, "basic use", a_model_and_data, expect(lr=1e-4, error_correction=True, block_size=256)),
    Example(FIRST, 3, "memory", an_optimizer, pass_by, (r"量化記憶體: 0\.0[1-9] MB", r"壓縮率: [1-9]\d\.\d\d%")),
    Example(FIRST, 4, "basic config", nothing, check_training, ("Epoch 0, Loss: ", r"Epoch 5, .* Memory: 0\.\d+ MB")),
    Example(
        FIRST, 5, "least memory", a_model, expect(error_correction=False, block_size=512, spatial_awareness=False)
    ),
    Example(FIRST, 6, "most exact", a_model, expect(block_size=128, edge_penalty=0.12, sync_frequency=50)),
    Example(FIRST, 7, "monitor", a_small_model_and_optimizer, check_monitor, ("Step 1000:\n  Quantized: ",)),
    Example(FIRST, 8, "out of memory", nothing, expect(error_correction=False, block_size=512)),
    Example(FIRST, 9, "unstable", nothing, expect(block_size=128, sync_frequency=50, warmup_steps=1000, lr=5e-5)),
    Example(FIRST, 10, "slow", nothing, expect(block_size=512, sync_frequency=200, edge_suppression=False)),
    Example(FIRST, 11, "leak", nothing, check_leak, (r"Optimizer Memory: 0\.\d+ MB",)),
    Example(FIRST, 12, "quality", nothing, check_quality, (r"State exp_avg: Error norm = 0\.\d*[1-9]", "State s: ")),
    Example(FIRST, 13, "rates", nothing, check_rates, (r"LR stats: min=\d\.\d\de-0\d, max=",)),
    Example(FIRST, 14, "config by GPU", nothing, check_recommendation),
    Example(FIRST, 15, "config by model", nothing, check_adjustment),
    Example(FIRST, 16, "quantise late", nothing, check_progress),
    Example(FIRST, 17, "adapt", lambda: {"np": np}, check_adaptation, ("Reducing block size to 128",)),
    Example(FIRST, 18, "dashboard", lambda: {"torch": torch}, check_dashboard),
    Example(FIRST, 19, "strategy", nothing, check_strategy),
    Example(FIRST, 20, "adaptive blocks", nothing, expect(adaptive_block_size=True, max_block_size=1024)),
    Example(
        SECOND, 0, "basic use", nothing, expect(lr=1e-3, edge_case_threshold=0.95, momentum_scales=(1, 5, 10, 25))
    ),
    Example(SECOND, 1, "training", digits, expect(), (r"Edge Case: False, LR Multiplier: \d\.\d{4}",)),
    Example(SECOND, 2, "edge case", a_spike, pass_by, ("檢測到邊緣情況",)),
    Example(SECOND, 3, "effective rate", a_context, check_effective_rate),
    Example(SECOND, 4, "consistency", a_context, check_consistency, (r"梯度一致性: -?0\.\d{4}",)),
    Example(SECOND, 5, "state", a_context, check_saved),
    Example(SECOND, 6, "short window", a_model, expect(context_window=50, lr=1e-3)),
    Example(SECOND, 7, "verbose", a_model, check_verbose),
    Example(SECOND, 8, "rates by size", a_model, expect(lr=1e-3, context_window=50, edge_case_threshold=0.95)),
    Example(SECOND, 9, "scales", nothing, check_scales),
    Example(SECOND, 10, "warmup", a_model, expect(warmup_steps=1000, lr=1e-4)),
]


def test_every_block_is_run() -> None:
    blocks = [(document, i) for document in (FIRST, SECOND) for i in range(len(read_blocks(document)))]
    assert [(e.document, e.number) for e in EXAMPLES] == blocks
    assert len(blocks) == 32


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{'AB'[e.document == SECOND]}-{e.claim}")
def test_a_block_of_the_seeds_runs(example: Example, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    needed = {"torch": torch, **the_classes(), "Automagic_CameAMP_COptim8bit": Automagic_CameAMP_COptim8bit}
    names = {**needed, **example.given()}
    exec(read_blocks(example.document)[example.number], names)
    example.check(names)
    printed = capsys.readouterr().out
    assert [pattern for pattern in example.patterns if not re.search(pattern, printed)] == [], printed
