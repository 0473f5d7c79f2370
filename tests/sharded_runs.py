"""What ranks do in the tests of sharded training, and the same in one process."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_automagic import Automagic
from hf_automagic.reporting.snapshot import OptimizerSnapshot

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
SHARDED, ALONE = {"is_sharded": True}, {"is_sharded": False}
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
    is_sharded: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    copies: int = 1,
) -> tuple[Holder, Automagic]:
    """Builds a model and its optimizer from the parameters, sharded or not; `copies` groups of ranks hold all rows."""
    model = Holder(shapes, dtype, device)
    if is_sharded:
        size = dist.get_world_size() // copies
        lies = ((size,), ("shard",)) if copies == 1 else ((copies, size), ("replicate", "shard"))
        fully_shard(model, mesh=init_device_mesh(device, lies[0], mesh_dim_names=lies[1]))
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
    mesh, axis = param.device_mesh, param.device_mesh.ndim - 1
    height = -(-value.shape[0] // mesh.size(axis))
    own = value[height * mesh.get_local_rank(axis) :][:height]
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
        "bytes": optimizer.memory_stats().total_bytes,
        "blocks": [group.get("block_sizes") for group in optimizer.param_groups],
    }


def run(
    options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], steps: int, kind: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains from the start and reports; `kind` is what `build` takes beside options and shapes."""
    model, optimizer = build(options, shapes, **kind)
    train(model, optimizer, range(steps))
    return report(model, optimizer)


def describe_states(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Says of each state whether it is sharded, its whole shape and dtype, and how many rows lie here."""
    model, optimizer = build(options, shapes, is_sharded=dist.is_initialized())
    train(model, optimizer, range(1))
    return {
        f"{name} {key}": (
            hasattr(held, "placements") and held.placements == p.placements,
            tuple(held.shape),
            held.dtype,
            held.to_local().shape[0] if hasattr(held, "placements") else None,
        )
        for name, p in model.named()
        for key, held in optimizer.state[p].items()
    }


def spoil_one_rank(options: Mapping[str, Any], spoiled: str) -> dict[str, Any]:
    """Takes a step, then one in which only the last rank's rows of one gradient are not finite, then one more."""
    model, optimizer = build(options, SHAPES, is_sharded=True)
    train(model, optimizer, range(1))
    before = report(model, optimizer)
    set_grads(model, 1)
    if dist.get_rank() == dist.get_world_size() - 1:
        dict(model.named())[spoiled].grad.to_local()[-1].fill_(torch.nan)
    optimizer.step()
    return {"before": before, "after": report(model, optimizer), "events": optimizer.events()}


def save(
    folder: str, options: Mapping[str, Any], steps: range, kind: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """Trains, from a checkpoint where there is one, saves with torch's distributed checkpoints, and reports."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model, optimizer = load(source, options, kind) if source else build(options, ALL, **kind)
    train(model, optimizer, steps)
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return report(model, optimizer)


def load(folder: str, options: Mapping[str, Any], kind: Mapping[str, Any]) -> tuple[Holder, Automagic]:
    """Loads a distributed checkpoint into a new model and a new optimizer."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    model, optimizer = build(options, ALL, **kind)
    states = {"model": sd.get_model_state_dict(model), "optimizer": sd.get_optimizer_state_dict(model, optimizer)}
    dcp.load(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    sd.set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return model, optimizer


def load_and_train(folder: str, options: Mapping[str, Any], steps: range, kind: Mapping[str, Any]) -> dict[str, Any]:
    """Goes on from a distributed checkpoint and reports."""
    model, optimizer = load(folder, options, kind)
    train(model, optimizer, steps)
    return report(model, optimizer)


def pass_through_one_file(options: Mapping[str, Any], file: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    """Saves whole states on the first rank and loads them from there on all, as accelerate's FULL_STATE_DICT does."""
    from torch.distributed.checkpoint import state_dict as sd

    model, optimizer = build(options, ALL, **kind)
    train(model, optimizer, range(3))
    all_in_one = sd.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = sd.get_optimizer_state_dict(model, optimizer, options=all_in_one)
    if dist.get_rank() == 0:
        torch.save(saved, file)
    fresh, resumed = build(options, ALL, **kind)
    with torch.no_grad():
        for (_, p), (_, trained) in zip(fresh.named(), model.named(), strict=True):
            p.copy_(trained)
    saved = torch.load(file, weights_only=True) if dist.get_rank() == 0 else {}
    sd.set_optimizer_state_dict(fresh, resumed, saved, options=all_in_one)
    train(fresh, resumed, range(3, 6))
    train(model, optimizer, range(3, 6))
    return {"whole": report(model, optimizer), "resumed": report(fresh, resumed)}


def change_storage(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Loads one process's plain state_dict into shards, changes codec and block size in the run, and goes on."""
    model, optimizer = build({}, ALL, is_sharded=dist.is_initialized())
    optimizer.load_state_dict(state_dict)
    train(model, optimizer, range(3, 4))
    optimizer.requantize(block_size=32, codec="affine")
    train(model, optimizer, range(4, 5))
    optimizer.set_quantization(False)
    train(model, optimizer, range(5, 6))
    return report(model, optimizer)


ALL = SHAPES | PAIRS


class Layers(nn.Module):
    """A network of odd widths, whose data differs between ranks."""

    def __init__(self) -> None:
        """Draws the weights, the same everywhere."""
        super().__init__()
        torch.manual_seed(0)
        widths = (24, 65, 65, 3)
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in itertools.pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the loss of a batch."""
        for layer in self.layers:
            x = layer(x).tanh()
        return (x - 0.5).square().mean()


def train_layers(steps: int, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """Trains a model that is sharded layer by layer, or whole on the batches of both ranks."""
    model, (rank, size) = Layers().to(device), (dist.get_rank(), dist.get_world_size()) if _joined() else (0, 1)
    if _joined():
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = Automagic(model.named_parameters(), lr=1e-3, context=True, **options)
    for step in range(steps):
        batch = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).to(device)
        loss = model(batch.chunk(size)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    return {
        "params": {name: whole(p) for name, p in model.named_parameters()},
        "history": optimizer.c_optim.history().losses,
    }


def _joined() -> bool:
    return dist.is_initialized()


def count_reductions(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Counts the all-reduces of one step."""
    model, optimizer = build(options, shapes, is_sharded=True)
    train(model, optimizer, range(1))
    set_grads(model, 1)
    calls, all_reduce = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return len(calls)


def run_in_pieces(options: Mapping[str, Any]) -> dict[str, Any]:
    """Trains with chunks so small that matrices are swept in pieces of their rows."""
    from hf_automagic.optim import bucket

    limits = dict(bucket.CHUNK_BYTES)
    bucket.CHUNK_BYTES["cpu"] = 1024
    try:
        return run(options, ALL, 4, SHARDED)
    finally:
        bucket.CHUNK_BYTES |= limits


def refusal(kind: str) -> str:
    """Returns what is said where a parameter cannot be stepped as it lies."""
    from torch.distributed.tensor import Shard

    options = {"spatial_axes": (0,), "edge_suppression": True} if kind == "axis" else {}
    model = Holder({"p": (6, 4)}, torch.float32, "cpu")
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(nn.Linear(6, 4), use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = Automagic(model.parameters())
        model(torch.ones(1, 6)).sum().backward()
    else:
        columns = {"shard_placement_fn": lambda p: Shard(1)} if kind == "columns" else {}
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **columns)
        optimizer = Automagic(model.named(), **options)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing"


def ranks_of_pairs() -> tuple[bool, int]:
    """Says whether a snapshot is silent about sharded pairs, and how many pairs there are."""
    model, optimizer = build({"allora": True}, PAIRS, is_sharded=True)
    train(model, optimizer, range(1))
    if dist.get_rank():
        return True, 2  # takes no part: nothing may wait for it
    pairs = {pair for group in optimizer.param_groups for pair in group["pairs"]}
    return OptimizerSnapshot.take(optimizer).effective_rank is None, len(pairs)


def step_without_questions(options: Mapping[str, Any]) -> bool:
    """Takes steps on GPUs in which nothing may wait for the device."""
    model, optimizer = build(options, ALL, is_sharded=True, device="cuda")
    loss = torch.ones((), device="cuda")
    for step in range(2):
        set_grads(model, step)
        optimizer.step(loss=loss)
    set_grads(model, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True
