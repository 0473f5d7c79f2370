"""The seeds' views of the states: by parameter and by the documents' names, decoded when they are read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..optim.automagic import Automagic
from ..optim.groups import is_stepped
from ..optim.storage import Layout, StoredState
from ..quantization import WithFeedback
from ..transforms.core import bias_correction
from ..transforms.self_tuning import element_factor

# What the first seed keeps precise; everything else is in few bits where the parameter is large enough.
PRECISE = ("lr_mask", "last_polarity", "spatial_variance", "row_scaling")


def get_memory_stats(optimizer: Automagic) -> dict[str, float]:
    """Returns exact bytes under the first seed's names; before the first step, what will be held.

    `total_quantized_memory` and `total_high_precision_memory` together are all that the optimizer holds, scales and
    residuals counted; `compression_ratio` is their sum over the same states in fp32; `adam_equivalent` is what Adam
    would hold; `quantized_params` and `high_precision_params` count parameters.
    """
    stats = optimizer.memory_stats()
    params = sum(is_stepped(p) for group in optimizer.param_groups for p in group["params"])
    return {
        "total_quantized_memory": stats.quantized_bytes,
        "total_high_precision_memory": stats.total_bytes - stats.quantized_bytes,
        "compression_ratio": stats.compression_ratio,
        "quantized_params": params - len(stats.kept_in_fp32),
        "high_precision_params": len(stats.kept_in_fp32),
        "adam_equivalent": stats.adam_bytes,
    }


def quantized_states(optimizer: Automagic) -> "Mapping[int, Mapping[str, QuantizedState]]":
    """Returns {number of the parameter: {name: state}} for what is stored in few bits; empty before the first step.

    `exp_avg` and the longer momenta `exp_avg_k5`, ... are stored as codes. The others are derived from what is stored:
    `exp_avg_sq` and `exp_avg_res` are the products of their row and column averages; `s`, which the seed names without
    a formula, is the confidence that the momentum is multiplied with; `edge_history` is the last direction's roughness
    while `edge_suppression` is on, 0 where a parameter has no spatial axes.

    The number is the parameter's place among all of the optimizer's, as in `state_dict()`.
    """
    return _views(optimizer, StateView.of_quantized)


def high_precision_states(optimizer: Automagic) -> Mapping[int, Mapping[str, Tensor]]:
    """Returns {number of the parameter: {name: tensor}} for what is kept precise; empty before the first step.

    `lr_mask` is each element's learning rate in the last step and `last_polarity` whether its momentum is positive,
    where each element has its rate; `spatial_variance` belongs to the rows, while `spatial_awareness` is on;
    `row_scaling` is ALLoRA's gain of the rows for the next step, while it is on. Where these two have nothing to act
    on they are 0 and 1. Parameters too small for codes have all names of `quantized_states` here.
    """
    return _views(optimizer, StateView.of_precise)


def _views(optimizer: Automagic, look: "Callable[[ParameterStates], StateView]") -> Mapping[int, "StateView"]:
    views: dict[int, StateView] = {}
    # for all pairs at once, and only if somebody reads
    gains = functools.cache(lambda: optimizer._current_plan().pairs.row_gains())
    for number, (index, bucket) in enumerate(optimizer._live_plan().buckets if optimizer.state else ()):
        stored = {state.spec.name: state for state in bucket.stored}
        for i, (param, position) in enumerate(zip(bucket.params, bucket.positions, strict=True)):
            own = functools.partial(_gain_of, gains, number, i)
            group = optimizer.param_groups[index]
            views[position] = look(ParameterStates(optimizer.state[param], stored, bucket.layout, group, own))
    return MappingProxyType({position: views[position] for position in sorted(views) if views[position]})


def _gain_of(gains: Callable[[], Mapping[int, Tensor]], number: int, i: int) -> Tensor | None:
    gain = gains().get(number)
    return None if gain is None else gain[i]


@dataclasses.dataclass(frozen=True)
class ParameterStates:
    """One parameter's states as they lie in `optimizer.state`, and how to read them.

    Args:
        state: the parameter's entry.
        stored: how each declared state is stored, by name.
        layout: the parameter's shape.
        group: its param group.
        row_gain: computes ALLoRA's gains of its rows, None without a partner.
    """

    state: Mapping[str, Tensor]
    stored: Mapping[str, StoredState]
    layout: Layout
    group: Mapping[str, Any]
    row_gain: Callable[[], Tensor | None]

    @property
    def quantizes(self) -> bool:
        """Whether a code holds the momentum."""
        return self.stored["exp_avg"].codec is not None

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """Names the states that the features of the group bring, with what reads each."""
        momenta = [name for name in self.stored if name == "exp_avg" or name.startswith("exp_avg_k")]
        return {
            **{name: functools.partial(self._read, name) for name in momenta},
            "exp_avg_sq": self._second_moment,
            **({"exp_avg_res": self._residual, "s": self._confidence} if "exp_avg_res_row" in self.stored else {}),
            **({"edge_history": self._roughness} if self.group["edge_suppression"] else {}),
            **({"lr_mask": self._rates, "last_polarity": self._polarity} if "lr_mask" in self.stored else {}),
            **({"spatial_variance": self._variance} if self.group["spatial_awareness"] else {}),
            **({"row_scaling": self._row_scaling} if self.group["allora"] else {}),
        }

    def fields(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of a state's code, none where no code holds it  # [1, ...]"""
        stored = self.stored.get(name)
        if stored is None or stored.codec is None:
            return {}
        return {key.removeprefix(f"{name}_"): value for key, value in self._stack(stored).items()}

    def _stack(self, stored: StoredState) -> dict[str, Tensor]:
        fields = stored.fields(self.layout.rows, self.layout.cols)
        return {key: self.state[key].reshape(1, *shape) for key, (shape, _) in fields.items()}

    def _read(self, name: str) -> Tensor:
        """Decodes a declared state; of the parameter's shape where it has as many elements."""
        stored = self.stored[name]
        value = stored.decode(self._stack(stored), torch.float32)[0]
        return value.view(self.layout.shape) if stored.spec.shape == "matrix" else value

    def _second_moment(self) -> Tensor:
        return self._read("exp_avg_sq") if "exp_avg_sq" in self.stored else self._product("exp_avg_sq")

    def _residual(self) -> Tensor:
        return self._product("exp_avg_res")

    def _product(self, name: str) -> Tensor:
        """Rebuilds R_i C_j / mean(R), 0 before a gradient came."""
        row, col = self._read(f"{name}_row"), self._read(f"{name}_col")
        mean = row.mean()
        share = row / torch.where(mean > 0, mean, 1.0)
        return (share[:, None] * col).view(self.layout.shape)

    def _confidence(self) -> Tensor:
        """Computes 1 / sqrt(R'_i C'_j / mean(R') / (1 - beta3^t)), which the momentum is multiplied with."""
        beta3 = self.group["betas"][2] if self.group["came_mode"] == "stable" else 0.0
        residual = self._residual() / bias_correction(beta3, self.state["step"].reshape(1)).view(())
        return torch.where(residual > 0, residual, 1.0).rsqrt()

    def _roughness(self) -> Tensor:
        return self._read("edge_roughness") if "edge_roughness" in self.stored else self._constant(0.0, ())

    def _rates(self) -> Tensor:
        mask = self._read("lr_mask")
        return self.group["effective_lr"].to(mask.device) * element_factor(mask)

    def _polarity(self) -> Tensor:
        return self._read("exp_avg") > 0

    def _variance(self) -> Tensor:
        known = "spatial_variance" in self.stored
        return self._read("spatial_variance") if known else self._constant(0.0, (self.layout.rows,))

    def _row_scaling(self) -> Tensor:
        gain, rows = self.row_gain(), self.layout.rows
        return self._constant(1.0, (rows,)) if gain is None else gain.expand(rows)

    def _constant(self, value: float, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor of equal elements that takes no memory."""
        return torch.full((), value, device=self.state["step"].device).expand(shape)


@dataclasses.dataclass(frozen=True)
class QuantizedState:
    """One state of a parameter that is stored in few bits.

    Args:
        name: the seed's name.
        states: all states of the parameter.
    """

    name: str
    states: ParameterStates

    def dequantize(self) -> Tensor:
        """Returns the state in float32; of the parameter's shape where it has an entry for each element."""
        return self.states.readers()[self.name]()

    @property
    def fields(self) -> dict[str, Tensor]:
        """The tensors of its code, such as codes and scale; none for a derived state."""
        return {name: field[0] for name, field in self.states.fields(self.name).items()}

    @property
    def error_accumulator(self) -> Tensor:
        """What rounding still owes the state; zeros that take no memory where `error_correction` is off."""
        fields, shape = self.states.fields(self.name), self.states.layout.shape
        codec = self.states.stored[self.name].codec if fields else None
        if isinstance(codec, WithFeedback):
            return codec.residual(fields)[0].view(shape)
        return torch.zeros((), device=self.states.state["step"].device).expand(shape)

    @property
    def relative_error(self) -> Tensor:
        """Expected relative L2 error of storing it once, NaN for a derived state  # []

        sqrt(mean(spacing^2) / 12) over the state's RMS: a rounding error is uniform between neighbouring codes.
        """
        codec = self.states.stored[self.name].codec if self.fields else None
        if codec is None:
            return torch.full((), torch.nan, device=self.states.state["step"].device)
        return codec.spacing(self.states.fields(self.name)).norm() / 12**0.5 / self.dequantize().norm()


class StateView(Mapping[str, Any]):
    """Maps the names of one parameter's states to what they hold; read-only, decoded when it is read."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        """Takes what reads each state."""
        self._readers = readers

    @classmethod
    def of_quantized(cls, states: ParameterStates) -> "StateView":
        """Shows what is stored in few bits."""
        names = [name for name in states.readers() if states.quantizes and name not in PRECISE]
        return cls({name: functools.partial(QuantizedState, name, states) for name in names})

    @classmethod
    def of_precise(cls, states: ParameterStates) -> "StateView":
        """Shows everything else."""
        return cls({n: read for n, read in states.readers().items() if n in PRECISE or not states.quantizes})

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
