"""What ranks do in the tests of sharded training, and the same in one process."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_automagic import Automagic

# on two ranks: even, uneven, empty on the last rank, with a third axis, vectors; the first are large enough for 8 bits
SHAPES = {
    "wide": (16, 512),
    "tall": (513, 12),
    "uneven": (7, 33),
    "three": (3, 64),
    "one_row": (1, 64),
    "one_column": (5, 1),
    "kernel": (5, 3, 3, 3),
    "bias": (17,),
    "single": (1,),
}
PAIRS = {"a.lora_A.weight": (3, 40), "a.lora_B.weight": (31, 3), "b.lora_A.weight": (5, 40), "b.lora_B.weight": (9, 5)}


class Holder(nn.Module):
    """Holds parameters by name; dots in names become underscores."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        """Draws the parameters, the same everywhere."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.names = {name: name.replace(".", "_") for name in shapes}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * 0.02
            self.register_parameter(self.names[name], nn.Parameter(value.to(device, dtype)))

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the parameters under their given names."""
        return [(name, getattr(self, own)) for name, own in self.names.items()]


def build(
    options: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    is_sharded: bool,
    device: str = "cpu",
) -> tuple[Holder, Automagic]:
    """Builds a model and its optimizer; the optimizer is built from the sharded parameters."""
    model = Holder(shapes, dtype, device)
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh(device.split(":")[0], (dist.get_world_size(),)))
    return model, Automagic(model.named(), lr=1e-3, **options)


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor that may be sharded, on the CPU."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu().clone()


def like(param: Tensor, value: Tensor) -> Tensor:
    """Places a whole tensor like a parameter."""
    from torch.distributed.tensor import DTensor

    value = value.to(param.device, param.dtype)
    if not isinstance(param, DTensor):
        return value
    mesh = param.device_mesh
    height = -(-value.shape[0] // mesh.size())
    own = value[height * mesh.get_local_rank() :][:height]
    return DTensor.from_local(own, mesh, param.placements, run_check=False, shape=value.shape, stride=value.stride())


def set_grads(model: Holder, step: int) -> None:
    """Gives every parameter noise around a steady gradient, the same in every world."""
    steady, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + step)
    for _, p in model.named():
        grad = torch.randn(p.shape, generator=steady) * 0.5 + torch.randn(p.shape, generator=noise)
        p.grad = like(p, grad * 1e-3)


def train(model: Holder, optimizer: Automagic, steps: range) -> None:
    """Takes some steps, each with a loss that differs between ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0.5
    for step in steps:
        set_grads(model, step)
        optimizer.step(loss=1.0 / (1 + step) + rank if optimizer.config.context else None)


def report(model: Holder, optimizer: Automagic) -> dict[str, Any]:
    """Returns whole parameters and states, and what the groups hold."""
    named = model.named()
    shared = {
        f"{i} {key} {inner}": value.cpu()
        for i, group in enumerate(optimizer.param_groups)
        for key, held in group.items()
        if key != "params"
        for inner, value in (held.items() if isinstance(held, dict) else [("", held)])
        if isinstance(value, Tensor)
    }
    return {
        "params": {name: whole(p) for name, p in named},
        "states": {name: {key: whole(t) for key, t in optimizer.state[p].items()} for name, p in named},
        "shared": shared,
    }


def run(
    options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], steps: int, is_sharded: bool, **kind: Any
) -> dict[str, Any]:
    """Trains from the start and reports."""
    model, optimizer = build(options, shapes, is_sharded=is_sharded, **kind)
    train(model, optimizer, range(steps))
    return report(model, optimizer)
