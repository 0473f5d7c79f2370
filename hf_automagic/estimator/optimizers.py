"""The bytes of an optimizer's state on a model without data."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from ..factory import create_automagic_optimizer
from ..options import unknown_name_error
from ..registry import list_optimizers


def state_bytes(name: str, model: nn.Module) -> int:
    """Returns what an optimizer holds once it has stepped, to the byte.

    Ours derive it from their declared states. Any other `optim=` string of transformers builds its class and makes
    one step on the meta device; its tensors are counted.

    Args:
        name: a registered name, or one of transformers'.
        model: on the meta device.

    Raises:
        TypeError: nobody has an optimizer of this name; the nearest one is given.
    """
    if name in list_optimizers():
        return create_automagic_optimizer(model, name).memory_stats().total_bytes
    optimizer = _foreign_optimizer(name, model)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty_like(param)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _foreign_optimizer(name: str, model: nn.Module) -> Any:
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    names = [str(member.value) for member in OptimizerNames]
    if name not in names:
        raise unknown_name_error("optimizer", name, names)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, optim=name, report_to="none", use_cpu=True)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    options.pop("fused", None)  # the states are the same, and the meta device has no fused kernel
    return cls([p for p in model.parameters() if p.requires_grad], **options)
