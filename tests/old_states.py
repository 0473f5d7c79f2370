"""Files of states that later versions must keep loading, one for each schema.

    python tests/old_states.py     writes the file of the present schema, once; an existing one is never written again

A file holds, for each case, the optimizer's state_dict, the weights then, and the weights two steps later. Gradients
are a formula, so that they do not depend on anybody's random numbers.
"""

from pathlib import Path
from typing import Any

import torch

from hf_automagic import Automagic
from hf_automagic.optim.automagic import SCHEMA

FOLDER = Path(__file__).parent / "fixtures"
SHAPES = {"A": ("lora_A", (4, 48)), "B": ("lora_B", (40, 4)), "W": ("full", (6, 40)), "b": ("bias", (6,))}
SMALL = {"min_8bit_size": 0, "block_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "default": SMALL,
    "fp32": {"quantize_states": False},
    "affine": {**SMALL, "codec": "affine"},
    "everything": {
        **SMALL,
        "allora": True,
        "cautious": True,
        "context": True,
        "error_correction": True,
        "lora_rank_penalty": True,
        "lr_granularity": "element",
        "momentum_scales": (1, 5),
        "vector_precision": "log16",
        "weight_decay": 0.1,
        "weight_decay_mode": "selective",
    },
}
BEFORE, AFTER = 5, 2  # steps to the save, and from it on


def build(case: str) -> tuple[list[torch.nn.Parameter], Automagic]:
    """Creates weights and optimizer of a case."""
    params, groups = [], []
    for number, (role, shape) in enumerate(SHAPES.values()):
        param = torch.nn.Parameter(0.1 * wave(shape, number))
        pair = {"pairs": [0], "scalings": [2.0]} if role.startswith("lora") else {}
        groups.append({"params": [param], "role": role, **pair})
        params.append(param)
    return params, Automagic(groups, lr=1e-3, **CASES[case])


def wave(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    """Fills a shape with a formula."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * numbers + phase).mul(1 + 0.3 * torch.cos(numbers)).view(shape).float()


def run(params: list[torch.nn.Parameter], optimizer: Automagic, steps: range) -> None:
    """Steps with the formula's gradients, one of them not a number."""
    for step in steps:
        for i, param in enumerate(params):
            param.grad = 1e-3 * (wave(tuple(param.shape), i) + wave(tuple(param.shape), 10.0 * step + i))
        if step == 3:
            params[0].grad[0, 0] = torch.nan
        optimizer.step(loss=1.0 / (1 + step))


def write() -> Path:
    """Writes the file of the present schema."""
    path = FOLDER / f"states_of_schema_{SCHEMA}.pt"
    if path.exists():
        raise FileExistsError(f"{path.name} is there, and stays as it is: that is its purpose")
    content = {}
    for case in CASES:
        params, optimizer = build(case)
        run(params, optimizer, range(BEFORE))
        kept = {"state_dict": optimizer.state_dict(), "weights": [p.detach().clone() for p in params]}
        run(params, optimizer, range(BEFORE, BEFORE + AFTER))
        content[case] = {**kept, "later": [p.detach().clone() for p in params]}
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


if __name__ == "__main__":
    print(write().name)
