"""DeepSpeed ZeRO, where it is installed: refused in a sentence, or stepped as the vectors that are left, and said."""

import importlib.util

import pytest

from tests.processes import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix("T14"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

RUN = """
import logging, os
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used
import torch
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meeting", rank=0, world_size=1)
import deepspeed
from torch import nn
from hf_automagic import Automagic, create_automagic_optimizer

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("hf_automagic").addHandler(handler)
stage = int(sys.argv[1])
for made in ("model", "bare"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8))
    optimizer = create_automagic_optimizer(model) if made == "model" else Automagic(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    said.clear()
    losses, refusal = [], ""
    try:
        for _ in range(6):
            loss = engine(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    except ValueError as error:
        refusal = str(error)
    shapes = [list(t.shape) for state in optimizer.state.values() for t in state.values()]
    largest = max(map(len, shapes), default=0)
    seen[made] = {"refusal": refusal, "losses": losses, "said": list(said), "largest": largest}
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_pieces_are_refused_where_rows_are_known_and_stepped_as_vectors_where_not(stage: int, tmp_path):
    seen = report(RUN, stage, tmp_path)
    assert "DeepSpeed ZeRO replaces parameters by flat pieces" in seen["model"]["refusal"]
    assert not seen["model"]["losses"]
    assert not seen["bare"]["refusal"]
    assert seen["bare"]["losses"][-1] < seen["bare"]["losses"][0]
    assert seen["bare"]["largest"] == 1
    assert [line for line in seen["bare"]["said"] if "they step as vectors, without factors" in line]


def test_without_zero_parameters_keep_their_rows(tmp_path):
    seen = report(RUN, 0, tmp_path)
    for made in ("model", "bare"):
        assert not seen[made]["refusal"]
        assert seen[made]["losses"][-1] < seen[made]["losses"][0]
    assert seen["bare"]["largest"] == 2
    assert not [line for line in seen["bare"]["said"] if "flat pieces" in line]
