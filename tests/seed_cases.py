"""The seeds' defaults as data, and a small model whose parts every feature of theirs acts on."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_automagic import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    Automagic_CameAMP_Improved,
    param_groups,
)

CONFIG_DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "warmup_steps": 500,
    "weight_decay": 5e-4,
    "quantize_states": True,
    "error_correction": True,
    "block_size": 256,
    "mixed_precision": True,
    "sync_frequency": 100,
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "background_regularization": True,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "verbose": False,
    "adaptive_block_size": False,
    "min_block_size": 64,
    "max_block_size": 1024,
}
FAMILY = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "betas": (0.8, 0.99, 0.999),
    "eps": (1e-30, 1e-16, 1e-8),
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "self_tuning": True,
    "lr_granularity": "element",
}
FIRST = {
    **FAMILY,
    **{name: value for name, value in CONFIG_DEFAULTS.items() if name != "verbose"},
    "allora": True,
    "cautious": False,
    "context": False,
    "momentum_scales": (),
}
SECOND = {
    **FAMILY,
    "cautious": True,
    "context": True,
    "context_window": 100,
    "edge_case_threshold": 0.95,
    "adaptation_rate": 0.1,
    "momentum_scales": (1, 5, 10, 25),
    "error_correction": False,
    "block_size": 4096,
    "allora": False,
    "lora_rank_penalty": False,
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "background_regularization": False,
    "spatial_awareness": False,
}
CLASSES = {
    Automagic_CameAMP_8Bit: {**FIRST, "quantize_states": True},
    Automagic_CameAMP_Improved: {**FIRST, "quantize_states": False},
    Automagic_CameAMP_COptim8bit: {**SECOND, "quantize_states": True},
    Automagic_CameAMP_COptim: {**SECOND, "quantize_states": False},
    Automagic_CameAMP: {**FAMILY, "quantize_states": False, "allora": False, "context": False, "cautious": False},
    Automagic_CameAMP8bit: {**FAMILY, "quantize_states": True, "block_size": 4096, "error_correction": False},
}


class Pair(nn.Module):
    """A convolution, a hand-written LoRA pair and a small vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, bias=False)
        self.lora_A = nn.Linear(512, 16, bias=False)
        self.lora_B = nn.Linear(16, 512, bias=False)
        self.shift = nn.Parameter(torch.zeros(7))
        self.scaling = 0.5


def make(cls: type = Automagic_CameAMP_8Bit, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Pair()
    nn.init.normal_(model.lora_B.weight)
    return model, cls(param_groups(model), **{"lr": 1e-4, "warmup_steps": 0, **options})


def run(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed)
        for i, param in enumerate(model.parameters()):
            steady = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 + i))
            param.grad = 1e-3 * (steady + torch.randn(param.shape, generator=generator))
        optimizer.step(loss=1.0 / (1 + seed))


def states_of(optimizer: Any, module: nn.Module) -> dict[str, Tensor]:
    return optimizer.state[module.weight]


# places of the parameters among the optimizer's, in the order of param_groups(model)
A, B, SHIFT, CONV = 0, 1, 2, 3
