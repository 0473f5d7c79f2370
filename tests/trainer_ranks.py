"""What ranks do in the tests of Trainers that shard their model by FSDP2."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.sharded_runs import whole


def train(folder: str, kind: str, steps: int, resume_from: str | None, is_sharded: bool, **changes: Any) -> Any:
    """Trains a tiny LoRA on two ranks, or on one with both batches; returns weights, states, rates and losses."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    from hf_automagic.trainer import AutomagicTrainer
    from tests.tiny_runs import arguments, inner, sentences, tiny_adapter, training_logs

    size = dist.get_world_size() if dist.is_initialized() else 1
    on_cpu = not torch.cuda.is_available()
    fsdp: dict[str, Any] = {}
    if dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used: a group is there
    if is_sharded:
        fsdp = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "state_dict_type": kind,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "cpu_ram_efficient_loading": False,
            },
        }
    torch.manual_seed(0)
    args = arguments(
        Path(folder),
        max_steps=steps,
        per_device_train_batch_size=4 // size,
        optim="automagic_8bit",
        optim_args="context=true,allora=true,min_8bit_size=32",
        save_strategy="steps",
        save_steps=3,
        use_cpu=on_cpu,
        **fsdp,
        **changes,
    )
    if is_sharded and on_cpu:  # accelerate shards on accelerators alone; to it, these ranks are some
        PartialState().distributed_type = DistributedType.MULTI_XPU
    trainer = AutomagicTrainer(model=tiny_adapter(), args=args, train_dataset=sentences(64))
    trainer.train(resume_from_checkpoint=resume_from)
    optimizer = inner(trainer)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    return {
        "params": {name: whole(p) for name, p in named},
        "states": {name: {key: whole(t) for key, t in optimizer.state[p].items()} for name, p in named},
        "placed": [hasattr(p, "placements") for _, p in named],
        "rates": optimizer.get_learning_rates(),
        "history": optimizer.c_optim.history().losses,
        "logged": [log["loss"] for log in training_logs(trainer)],
        "pairs": sorted(pair for group in optimizer.param_groups for pair in group.get("pairs", ())),
    }


def start() -> dict[str, torch.Tensor]:
    """Returns the weights that every run starts from."""
    from tests.tiny_runs import tiny_adapter, weights

    return weights(tiny_adapter())
