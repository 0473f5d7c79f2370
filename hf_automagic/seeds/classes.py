"""The seeds' optimizers: Automagic with each document's defaults, under its names."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..config import option_names
from ..optim.automagic import Automagic
from ..options import unknown_name_error
from ..quantization import QuantizationStrategy
from .config import Optimizer8BitConfig
from .views import QuantizedState, get_memory_stats, high_precision_states, quantized_states

logger = logging.getLogger(__name__)

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Options = Mapping[str, Any]

# What both documents agree on, and what neither has by itself: it stays, whatever becomes the default of a string.
FAMILY: Options = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "betas": (0.8, 0.99, 0.999),
    "eps": (1e-30, 1e-16, 1e-8),
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "self_tuning": True,
    "lr_granularity": "element",
    "momentum_scales": (),
    "cautious": False,
    "context": False,
    "error_correction": False,
}
_listed = dataclasses.asdict(Optimizer8BitConfig())
FIRST_SEED: Options = {
    **FAMILY,
    "allora": True,
    **{name: value for name, value in _listed.items() if name != "verbose"},
}
SECOND_SEED: Options = {**FAMILY, "context": True, "cautious": True}


class SeedOptimizer(Automagic):
    """Steps as Automagic does, with a seed's defaults, names and views; the base of the seeds' classes.

    Args:
        params: as for `Automagic`: (name, tensor) pairs tell of LoRA pairs, bare tensors need `attach(model)` to.
        lr: where `lr_search` starts; without it the rate follows from role, width and step.
        verbose: logs the table of the groups now, and a line whenever memory statistics are asked for, at INFO.
        quantization_strategy: decides what is stored in few bits; see `CustomQuantizationStrategy`.
        **options: options of the document, and all others of `AutomagicConfig`.

    Raises:
        TypeError: an option does not exist; the nearest name is given.
        ValueError: an option is outside its bounds.
    """

    defaults_of_document: ClassVar[Options] = FAMILY
    renamed: ClassVar[Mapping[str, str]] = {"blocksize": "block_size"}  # a document's name -> ours
    verbose = False

    def __init__(
        self,
        params: Params,
        lr: float = FAMILY["lr"],
        *,
        verbose: bool = False,
        quantization_strategy: QuantizationStrategy | None = None,
        **options: Any,
    ) -> None:
        """Reads the options under the document's names."""
        self.verbose = verbose
        options = {**self.defaults_of_document, "lr": lr, **self._in_our_names(options)}
        super().__init__(params, quantization_strategy=quantization_strategy, **options)
        if verbose:
            logger.info("%s", self.describe())

    def __getstate__(self) -> dict[str, Any]:
        """Keeps `verbose` in copies and pickles."""
        return {**super().__getstate__(), "verbose": self.verbose}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose own options may have the document's names too."""
        is_filled = "schema" in param_group  # by an optimizer, in our names
        super().add_param_group(param_group if is_filled else _rename(param_group, self.renamed))

    def _in_our_names(self, options: Mapping[str, Any]) -> dict[str, Any]:
        valid = {*option_names(), *self.renamed}
        for name in options:
            if name not in valid:
                raise unknown_name_error("option", name, {*valid, "verbose", "quantization_strategy"})
        return _rename(options, self.renamed)

    def get_memory_stats(self) -> dict[str, float]:
        """Returns bytes and counts under the first seed's names, see `seeds.get_memory_stats`."""
        stats = get_memory_stats(self)
        if self.verbose:
            held = stats["total_quantized_memory"] + stats["total_high_precision_memory"]
            logger.info("mean learning rate %.3g, %.2f MB of state", self.get_avg_learning_rate(), held / 2**20)
        return stats

    @property
    def quantized_states(self) -> Mapping[int, Mapping[str, QuantizedState]]:
        """The states of each parameter that is stored in few bits, see `seeds.quantized_states`."""
        return quantized_states(self)

    @property
    def high_precision_states(self) -> Mapping[int, Mapping[str, Tensor]]:
        """The states of each parameter that are kept precise, see `seeds.high_precision_states`."""
        return high_precision_states(self)


def _rename(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in options.items()}


class Automagic_CameAMP(SeedOptimizer):
    """Both seeds' plain optimizer: element rates, states in fp32, nothing else."""

    defaults_of_document: ClassVar[Options] = {**FAMILY, "quantize_states": False}


class Automagic_CameAMP8bit(SeedOptimizer):
    """Both seeds' plain optimizer with states in 8 bits, in bitsandbytes' blocks of 4096."""

    defaults_of_document: ClassVar[Options] = {**FAMILY, "block_size": 4096}


class Automagic_CameAMP_Improved(SeedOptimizer):
    """The first seed's features, that is ALLoRA, rank penalty and spatial terms, with states in fp32."""

    defaults_of_document: ClassVar[Options] = {**FIRST_SEED, "quantize_states": False}


class Automagic_CameAMP_8Bit(SeedOptimizer):
    """The first seed's optimizer, in 8 bits: `Automagic_CameAMP_8Bit(params, **config.__dict__)`."""

    defaults_of_document: ClassVar[Options] = FIRST_SEED


class Automagic_CameAMP_COptim(SeedOptimizer):
    """The second seed's features, that is the context, the cautious mask and several momenta, with states in fp32.

    Here `edge_threshold` is that document's, the instability from which on a step is an edge case, elsewhere
    `edge_case_threshold`; the roughness above which `edge_suppression` acts goes by `edge_suppression_threshold`.

    Args:
        params: as for `Automagic`.
        lr: where `lr_search` starts; without it the rate follows from role, width and step.
        betas: decay of momentum, second moment and confidence.
        eps: floors, see `AutomagicConfig`.
        weight_decay: decoupled.
        warmup_steps: the rate grows linearly over these first steps.
        context_window: losses remembered, and the horizon of the consistency, in steps.
        edge_threshold: instability in [0, 1]; smaller is more sensitive.
        adaptation_rate: share of the way that the multiplier goes to its target in a step.
        momentum_scales: horizons of the momenta, in units of the first.
        blocksize: elements of a row that share a scale; `block_size` is the same.
        verbose: logs at INFO, see `SeedOptimizer`.
        **options: all others of `AutomagicConfig`.
    """

    defaults_of_document: ClassVar[Options] = {**SECOND_SEED, "quantize_states": False}
    renamed: ClassVar[Mapping[str, str]] = {
        **SeedOptimizer.renamed,
        "edge_threshold": "edge_case_threshold",
        "edge_suppression_threshold": "edge_threshold",
    }

    def __init__(
        self,
        params: Params,
        lr: float = FAMILY["lr"],
        betas: Sequence[float] = FAMILY["betas"],
        eps: Sequence[float] = FAMILY["eps"],
        weight_decay: float = FAMILY["weight_decay"],
        warmup_steps: int = FAMILY["warmup_steps"],
        context_window: int = 100,
        edge_threshold: float = 0.95,
        adaptation_rate: float = 0.1,
        momentum_scales: Sequence[int] = (1, 5, 10, 25),
        blocksize: int = 4096,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        """Reads the options in the document's order."""
        listed = {
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "context_window": context_window,
            "edge_threshold": edge_threshold,
            "adaptation_rate": adaptation_rate,
            "momentum_scales": momentum_scales,
            "block_size": blocksize,
        }
        super().__init__(params, lr, verbose=verbose, **{**listed, **options})


class Automagic_CameAMP_COptim8bit(Automagic_CameAMP_COptim):
    """The second seed's optimizer, with states in 8 bits.

    `codec="dynamic"` stores them with bitsandbytes, as the document does; states that it cannot hold stay in fp32.
    """

    defaults_of_document: ClassVar[Options] = SECOND_SEED
