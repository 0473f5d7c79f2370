"""DDP: ranks that see other data take the same steps, to the bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_automagic import Automagic
from tests.ranks import Ranks
from tests.sharded_runs import report

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {
    "context": True,
    "cautious": True,
    "lr_granularity": "element",
    "sync_frequency": 5,
    "allora": True,
    "lora_rank_penalty": True,
    "max_grad_norm": 1.0,
    "vector_precision": "log16",
}
NAN_AT, SILENT_FROM = 20, 40


class Adapter(nn.Module):
    """A frozen layer with a LoRA beside it and a head; large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(96, 64, generator=generator)
        self.shapes = {"lora_A.weight": (64, 64), "lora_B.weight": (96, 64), "head.weight": (3, 96), "head.bias": (3,)}
        self.names = {name: name.replace(".", "_") for name in self.shapes}
        for name, shape in self.shapes.items():
            start = torch.zeros(shape) if "B" in name else torch.randn(shape, generator=generator) * 0.1
            self.register_parameter(self.names[name], nn.Parameter(start.bfloat16()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.base.to(x).T + x @ self.lora_A_weight.T @ self.lora_B_weight.T
        return hidden.tanh() @ self.head_weight.T + self.head_bias

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the parameters under names that tell their roles."""
        return [(name, getattr(self, own)) for name, own in self.names.items()]


def train(device: str) -> dict[str, Any]:
    """Takes 50 steps on this rank's own data: one gradient is not finite on one rank, and one rank falls silent."""
    rank = dist.get_rank()
    device = f"{device}:{rank}" if device == "cuda" else device
    model = Adapter().to(device)
    model.base = model.base.to(device)
    parallel = DistributedDataParallel(model, device_ids=[rank] if "cuda" in device else None)
    optimizer = Automagic(model.named(), lr=1e-3, max_lr=1e-2, **EVERYTHING)
    data, losses = torch.Generator().manual_seed(rank), []
    for step in range(50):
        x = torch.randn(8, 64, generator=data).to(device, torch.bfloat16)
        loss = parallel(x).float().square().mean()
        optimizer.zero_grad()
        (loss * (torch.nan if (step, rank) == (NAN_AT, 1) else 1.0)).backward()
        losses.append(float(loss))
        optimizer.step(loss=None if step >= SILENT_FROM and rank == 1 else loss)
    told = {"losses": losses, "history": optimizer.c_optim.history().losses, "backends": optimizer.backends()}
    return report(model, optimizer) | told


def agree(device: str, backend: str) -> dict[str, Any]:
    """Checks that two ranks are one optimizer; returns what the first told."""
    ranks = Ranks(2, backend)
    try:
        first, second = ranks.run(train, device)
    finally:
        ranks.stop()
    assert first["losses"] != second["losses"]
    for part in (first["params"], first["shared"], *first["states"].values()):
        assert part
    for mine, theirs in [
        (first["params"], second["params"]),
        (first["shared"], second["shared"]),
        *((first["states"][name], second["states"][name]) for name in first["states"]),
    ]:
        assert all(torch.equal(torch.nan_to_num(t), torch.nan_to_num(theirs[key])) for key, t in mine.items())
    moved = [not torch.equal(p.cpu(), first["params"][name]) for name, p in Adapter().named()]
    assert all(moved)
    assert first["shared"]["0 counters skipped"] == 1
    both = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    expected = both[:SILENT_FROM] + first["losses"][SILENT_FROM:]
    del expected[NAN_AT]
    assert first["history"] == pytest.approx(expected, rel=1e-5)
    return first


@pytest.mark.matrix("T13")
def test_two_ranks_stay_identical_to_the_bit():
    agree("cpu", "gloo")


@pytest.mark.gpu
@pytest.mark.matrix("T13")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_stay_identical_to_the_bit_in_the_fused_kernels():
    assert agree("cuda", "nccl")["backends"] == {("triton", ""): 4}


@pytest.mark.gpu
@pytest.mark.matrix("T13")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_accelerate_launches_two_processes_that_end_with_the_same_weights():
    """The recipe compares the weights of all processes itself, and fails where the loss did not fall."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    recipe = str(ROOT / "scripts" / "recipes" / "two_processes.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *plain, recipe], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes: loss" in done.stdout
