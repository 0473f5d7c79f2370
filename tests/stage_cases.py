"""Runs the engine and the reference side by side on the same gradients; what the tests of single stages share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_automagic.optim.automagic import Automagic
from hf_automagic.transforms.core import Measured, State, StepContext, Transform
from tests.reference import Pair, ParamOptions, ReferenceConfig, ReferenceOptimizer

Shapes = dict[str, tuple[int, ...]]

BETAS = (0.9, 0.999, 0.9999)
PLAIN: dict[str, Any] = {"self_tuning": False, "quantize_states": False, "lr": 1e-2, "betas": BETAS}
# pairs by the shapes of their factors
LORA = {"a": (4, 30), "b": (20, 4), "w": (7, 33)}
CONV = {"a": (4, 6, 3, 3), "b": (20, 4, 1, 1)}
WIDE = {"a": (8, 5), "b": (6, 8)}  # a rank above what the product can have
ALLORA = {"allora": True, "eta": 2.0}
PENALTY = {"lora_rank_penalty": True, "rank_penalty_strength": 5.0, "rank_penalty_every": 3}
ROLES = {"a": "lora_A", "b": "lora_B"}  # of parameters by name; all others are full weights


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draws standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(n: int = 3, out: int = 20, r: int = 4, into: int = 30) -> tuple[Tensor, Tensor]:
    """Draws stacks of A [n, r, in] and B [n, out, r]."""
    return noise(n, r, into, seed=1), noise(n, out, r, seed=2)


# single transforms


def context(grad: Tensor, param: Tensor | None = None, step: int = 1, lr: float = 1e-2, **fields: Any) -> StepContext:
    """Builds what transforms may read of a step, for a stack of whole matrices [n, rows, cols]."""
    own = {
        "grad": grad,
        "param": torch.zeros_like(grad) if param is None else param,
        "step": torch.full((len(grad),), float(step), dtype=grad.dtype),
        "lr": torch.tensor(lr, dtype=grad.dtype),
        "rows": grad.shape[1],
        "cols": grad.shape[2],
    }
    return StepContext(**{**own, **fields})


def run_one(transform: Transform, update: Tensor, state: State, seen: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs one transform on whole matrices."""
    return transform.apply(update, state, transform.measure(update, state, seen), seen)


def run_in_pieces(
    transform: Transform, update: Tensor, state: dict[str, Tensor], seen: StepContext, height: int
) -> Tensor:
    """Runs one transform on slices of the rows, with the sums of all slices; states are sliced along."""
    kinds = {spec.name: spec.shape for spec in transform.states()}
    pieces = []
    for first in range(0, update.shape[1], height):
        rows = slice(first, first + height)
        part = {
            name: t[:, rows] if kinds.get(name, "matrix") in ("rows", "matrix") else t for name, t in state.items()
        }
        own = context(
            seen.grad[:, rows],
            seen.param[:, rows],
            lr=float(seen.lr),
            step=int(seen.step[0]),
            rows=seen.rows,
            first_row=first,
        )
        pieces.append((update[:, rows], part, own, transform.measure(update[:, rows], part, own) or Measured()))
    totals = {name: sum(measured.matrix[name] for *_, measured in pieces) for name in pieces[0][3].matrix}
    return torch.cat([transform.apply(u, s, Measured(totals, m.rows, m.pool), c)[0] for u, s, c, m in pieces], 1)


# whole optimizers


def start(shapes: Shapes) -> dict[str, Tensor]:
    """Draws the first weights of named parameters, float64."""
    return {name: noise(*shape, seed=7 + i) for i, (name, shape) in enumerate(shapes.items())}


def gradients(shapes: Shapes, steps: int) -> Iterator[dict[str, Tensor]]:
    """Draws gradients of named parameters, a steady half in unit noise, rows of different size."""
    sizes = {name: 4.0 ** noise(shape[0], *[1] * (len(shape) - 1), seed=3) for name, shape in shapes.items()}
    steady = {name: 0.5 * noise(*shape, seed=31 + i) for i, (name, shape) in enumerate(shapes.items())}
    for t in range(steps):
        yield {name: (steady[name] + noise(*shape, seed=1000 + t)) * sizes[name] for name, shape in shapes.items()}


def engine(weights: dict[str, Tensor], scaling: float = 1.0, **options: Any) -> tuple[Automagic, dict[str, Tensor]]:
    """Builds an optimizer with a group for each parameter; `a` and `b` are the factors of one pair."""
    params: dict[str, Tensor] = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    has_pair = params.keys() >= ROLES.keys()
    groups = []
    for name, param in params.items():
        pair = 0 if has_pair and name in ROLES else -1
        groups.append({"params": [param], "role": ROLES.get(name, "full"), "pairs": [pair], "scalings": [scaling]})
    return Automagic(groups, **{**PLAIN, **options}), params


def make_pairs(
    shapes: list[tuple[int, int, int]], **options
) -> tuple[Automagic, dict[str, Tensor], dict[str, Tensor]]:
    """Builds two groups of several pairs, listed in different orders."""
    weights: dict[str, Tensor] = {}
    for i, (out, r, into) in enumerate(shapes):
        weights |= {f"a{i}": noise(r, into, seed=i), f"b{i}": noise(out, r, seed=50 + i)}
    params: dict[str, Tensor] = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    order = list(range(len(shapes)))
    groups = [
        {"params": [params[f"b{i}"] for i in order[::-1]], "role": "lora_B", "pairs": order[::-1]},
        {"params": [params[f"a{i}"] for i in order], "role": "lora_A", "pairs": order},
    ]
    for group in groups:
        group["scalings"] = [1.0 + pair for pair in group["pairs"]]
    return Automagic(groups, **{**PLAIN, **options}), params, weights


def take_step(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Takes one step with these gradients."""
    for name, param in params.items():
        param.grad = grads[name].to(param.dtype)
    optimizer.step()


def run_engine(
    shapes: Shapes, steps: int = 12, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """Returns the weights after some steps."""
    optimizer, params = engine({name: weight.to(dtype) for name, weight in start(shapes).items()}, **options)
    for grads in gradients(shapes, steps):
        take_step(optimizer, params, grads)
    return {name: param.detach() for name, param in params.items()}


def distance(some: dict[str, Tensor], other: dict[str, Tensor], shapes: Shapes) -> float:
    """Returns the largest difference of a weight, relative to the largest distance that one moved."""
    moved = max(
        (some[name] - weight.to(some[name].dtype)).abs().max().item() for name, weight in start(shapes).items()
    )
    return max((some[name] - other[name]).abs().max().item() for name in shapes) / moved


def check_against_reference(
    shapes: Shapes, options: dict[str, Any], reference: dict[str, Any] | None = None, weight_decay: float = 0.0
) -> None:
    """Asserts that the engine ends where the reference ends, and elsewhere without the options.

    float32 states leave about 1e-7 between them.

    Args:
        shapes: the parameters by name.
        options: of the engine, `scaling` of the pair among them.
        reference: the same in the reference's words, where they differ.
        weight_decay: of both.
    """
    words = {key: value for key, value in options.items() if key not in ("scaling", "spatial_axes")}
    config = ReferenceConfig(betas=BETAS, **(words if reference is None else reference))
    weights = start(shapes)
    listed = [
        (name, weight, ROLES.get(name, "full"), ParamOptions(
            lr=PLAIN["lr"],
            weight_decay=weight_decay,
            spatial_axes=options.get("spatial_axes"),
            origin=None if name in ROLES else weight,
        ))
        for name, weight in weights.items()
    ]  # fmt: skip
    pairs = [Pair("a", "b", options.get("scaling", 1.0))] if weights.keys() >= ROLES.keys() else []
    slow = ReferenceOptimizer(listed, config, pairs)
    for grads in gradients(shapes, 12):
        slow.step(grads)
    fast = run_engine(shapes, weight_decay=weight_decay, **options)
    assert distance(fast, {name: p.value for name, p in slow.params.items()}, shapes) < 1e-6
    assert distance(fast, run_engine(shapes), shapes) > 1e-3


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every other operation."""
        assert "_local_scalar_dense" not in str(func), f"{func} reads the device"
        return func(*args, **(kwargs or {}))
