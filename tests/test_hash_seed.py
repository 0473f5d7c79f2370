"""The order of groups and parameters, and with it every bit of a run, does not depend on how Python hashes."""

import pytest

from tests.processes import report

pytest.importorskip("peft")

RUN = """
import hashlib
import torch
from hf_automagic import create_automagic_optimizer
from tests.peft_cases import adapt, tuner_named

for name in ("saved", "two_adapters", "AdaLora".lower(), "conv"):
    tuner = tuner_named(name)
    model = adapt(tuner)
    optimizer = create_automagic_optimizer(
        model, lr=1e-3, context=True, allora=True, lora_rank_penalty=True, min_8bit_size=32, momentum_scales=(1, 5)
    )
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.requires_grad and name != "conv" else p.data
    for step in range(3):
        for i, (_, p) in enumerate(model.named_parameters()):
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * step + i)).to(p.dtype)
        optimizer.step()
    bits = hashlib.sha256()
    packed = optimizer.state_dict()
    for state in packed["state"].values():
        for key, tensor in state.items():
            bits.update(key.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for _, p in model.named_parameters():
        bits.update(p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = [[*group["names"], group["role"], *map(str, group["pairs"])] for group in packed["param_groups"]]
    keys = [list(group) for group in packed["param_groups"]]
    seen[name] = {"names": names, "keys": keys, "bits": bits.hexdigest()}
seen["hash"] = hash("lora_A")
"""


@pytest.mark.matrix("T17")
def test_the_seed_of_pythons_hashes_changes_no_name_and_no_bit(monkeypatch):
    runs = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        runs.append(report(RUN))
    first, second = runs
    assert first.pop("hash") != second.pop("hash")
    assert len(first["two_adapters"]["names"]) >= 4
    assert first == second
