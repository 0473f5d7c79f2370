"""What the reference is told: switches of the chain, options of a group, pairs; and what it keeps of a parameter."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceConfig:
    """Every switch of the chain; the defaults are bare CAME with bias correction at a constant rate."""

    # stages 0 to 3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float, float] = (1e-30, 1e-16, 1e-8)  # e1: paper mode, e2: instability, e3: order "before"
    clip_threshold: float = 1.0
    max_grad_norm: float | None = None
    came_mode: Literal["fixed", "paper"] = "fixed"
    momentum_order: Literal["after", "before"] = "after"
    factored: bool = True
    confidence: bool = True
    momentum_scales: tuple[float, ...] = (1,)
    # stage 4
    edge_suppression: bool = False
    edge_penalty: float = 0.1
    edge_threshold: float = 0.6
    frequency_penalty: float = 0.0
    background_regularization: bool = False
    spatial_awareness: bool = False
    detail_preservation: float = 0.0
    # stages 5 and 6
    allora: bool = False
    allora_eta: float = 2.0
    cautious: bool = False
    cautious_scale: Literal["share", "paper"] = "share"
    # stages 7 and 8
    self_tuning: bool = False
    search: bool = True  # off, the rate stands at its upper rail
    rail_steps: int = 0
    lr_pool: Literal["global", "group"] = "global"
    kappa: float = 0.1
    drift: float = 0.0
    granularity: Literal["tensor", "element"] = "tensor"
    mask_band: float = 4.0
    sync_frequency: int = 100
    adapt_steps: int | None = None  # K and the mask stand still after so many applied steps
    context: bool = False
    context_window: int = 100
    edge_case_threshold: float = 0.95
    adaptation_rate: float = 0.1
    # stages 9, 11 and 12
    weight_decay_mode: Literal["decoupled", "cautious", "selective"] = "decoupled"
    rank_penalty: bool = False
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    rank_penalty_every: int = 10
    block_size: int = 128
    error_correction: bool = False
    codec_dtype: torch.dtype = torch.float32  # arithmetic of the round trip through the codes

    def __post_init__(self) -> None:
        """Refuses combinations that the canon does not define."""
        if self.momentum_order == "before" and (self.self_tuning or self.context):
            raise ValueError('momentum_order="before" has no normalised gradient: turn self_tuning and context off')
        if 1 not in self.momentum_scales:
            raise ValueError(f"momentum_scales must contain 1, whose momentum is exp_avg, got {self.momentum_scales}")


@dataclass(frozen=True)
class ParamOptions:
    """What a parameter group decides; all rates are absolute numbers, rails by role are the caller's business.

    lr: the starting rate lr0. origin: the true W0 of selective decay, None for zero. quantized: the momenta pass
    through softsign codes after each step. log16: the row and column vectors pass through 16-bit log codes.
    """

    lr: float = 1e-3
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    weight_decay: float = 0.0
    group: str = "default"
    spatial_axes: tuple[int, ...] | None = None
    origin: Tensor | None = None
    quantized: bool = False
    log16: bool = False


@dataclass(frozen=True)
class Pair:
    """Names the two halves of an adapter and its alpha / r (or alpha / sqrt r)."""

    a: str
    b: str
    scaling: float = 1.0


@dataclass
class ReferenceParam:
    """A parameter as a matrix, its own count of applied steps and its state, all float64 (codes apart)."""

    name: str
    matrix: Tensor  # [rows, cols]
    shape: tuple[int, ...]
    role: str
    options: ParamOptions
    t: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)  # u, m_prev and d of the last step, for tests
    lr: float = 0.0  # effective_lr of the last step

    @property
    def value(self) -> Tensor:
        """The parameter in its own shape."""
        return self.matrix.reshape(self.shape)

    def read(self, name: str, *shape: int) -> Tensor:
        """Reads a state tensor; zeros before the first step."""
        return self.state.setdefault(name, torch.zeros(shape, dtype=torch.float64))
