"""Stages 1 to 3 on one parameter: reads its moments, calls the equations of `came.py`, stores what they return."""

from torch import Tensor

from . import came
from .config import ReferenceConfig, ReferenceParam


def advance_direction(p: ReferenceParam, g: Tensor, config: ReferenceConfig) -> tuple[Tensor, Tensor]:
    """Advances all moments by a gradient, p.t counting this step already; returns the clipped u and the direction."""
    if config.momentum_order == "before":
        return g, _adam(p, g, config)
    u = came.clip_by_rms(_normalise(p, g, config), config.clip_threshold)
    m_hat = _average(p, u, config)
    return u, _divide_by_instability(p, u, m_hat, config)


def _normalise(p: ReferenceParam, g: Tensor, config: ReferenceConfig) -> Tensor:
    """Stage 1: u before its clip."""
    paper, beta2, eps1 = config.came_mode == "paper", config.betas[1], config.eps[0]
    rows, cols = g.shape
    if not (config.factored and came.is_factored(g)):
        v = p.read("exp_avg_sq", rows, cols)
        if paper:
            u, v = came.paper_full_second_moment(g, v, beta2, eps1)
        else:
            u, v = came.full_second_moment(g, v, beta2, p.t)
        p.state["exp_avg_sq"] = v
        return u
    row, col = p.read("exp_avg_sq_row", rows), p.read("exp_avg_sq_col", cols)
    if paper:
        u, row, col = came.paper_second_moment(g, row, col, beta2, eps1)
    else:
        u, row, col = came.factored_second_moment(g, row, col, beta2, p.t)
    p.state["exp_avg_sq_row"], p.state["exp_avg_sq_col"] = row, col
    return u


def _average(p: ReferenceParam, u: Tensor, config: ReferenceConfig) -> Tensor:
    """Stage 2: every momentum scale, combined into m_hat. Scale 1 is `exp_avg`, scale k `exp_avg_k`."""
    momenta: dict[float, Tensor] = {}
    for k in config.momentum_scales:
        name = "exp_avg" if k == 1 else f"exp_avg_{k:g}"
        momenta[k] = came.ema(p.read(name, *u.shape), u, came.scale_beta(config.betas[0], k))
        p.state[name] = momenta[k]
    return came.combine_scales(momenta, config.betas[0], p.t)


def _divide_by_instability(p: ReferenceParam, u: Tensor, m_hat: Tensor, config: ReferenceConfig) -> Tensor:
    """Stage 3 for matrices; a single row or column, or a chain without confidence, moves by its momentum."""
    paper, m = config.came_mode == "paper", p.state["exp_avg"]
    if not (config.confidence and came.is_factored(u)):
        return m if paper else m_hat
    row, col = p.read("exp_avg_res_row", u.shape[0]), p.read("exp_avg_res_col", u.shape[1])
    beta3, eps2 = config.betas[2], config.eps[1]
    if paper:
        d, row, col = came.paper_confidence(u, m, row, col, beta3, eps2)
    else:
        d, row, col = came.confidence(u, m, m_hat, row, col, beta3, eps2, p.t)
    p.state["exp_avg_res_row"], p.state["exp_avg_res_col"] = row, col
    return d


def _adam(p: ReferenceParam, g: Tensor, config: ReferenceConfig) -> Tensor:
    """Order "before": momentum of the raw gradient over the root of a second moment that is always full."""
    m_hat = _average(p, g, config)
    p.state["exp_avg_sq"] = came.ema(p.read("exp_avg_sq", *g.shape), g.square(), config.betas[1])
    return came.adam_direction(m_hat, p.state["exp_avg_sq"], config.betas[1], config.eps[2], p.t)
