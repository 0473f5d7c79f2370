"""One step from top to bottom, parameter by parameter, in float64: the order of the stages and little else."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import came, cautious, codecs, decay, lora, self_tuning, spatial
from .config import Pair, ParamOptions, ReferenceConfig, ReferenceParam
from .context import ReferenceContext
from .direction import advance_direction

Gradients = list[tuple[ReferenceParam, Tensor]]  # each gradient as a matrix


class ReferenceOptimizer:
    """Runs the whole chain on float64 copies of the parameters; gradients come in by name."""

    def __init__(
        self,
        params: Sequence[tuple[str, Tensor, str, ParamOptions]],
        config: ReferenceConfig | None = None,
        pairs: Sequence[Pair] = (),
    ) -> None:
        """params: (name, tensor, role, options). pairs: which of them are the halves of one adapter."""
        self.config = config or ReferenceConfig()
        self.params = {
            name: ReferenceParam(
                name, came.as_matrix(tensor.detach().double().clone()), tuple(tensor.shape), role, options
            )
            for name, tensor, role, options in params
        }
        self.pairs = pairs
        self.context = ReferenceContext(
            self.config.context_window, self.config.edge_case_threshold, self.config.adaptation_rate
        )
        self.log_rates: dict[str, float] = {}  # K of each pool
        self.step_count = self.skipped = self.consecutive = 0
        self.first_offender: str | None = None

    def step(self, grads: Mapping[str, Tensor | None], sched: float = 1.0, loss: float | None = None) -> bool:
        """Applies one step, or nothing if a gradient is not finite. sched = group["lr"] / group["initial_lr"]."""
        active = self._gather(grads)
        if not self._guard(active):
            return False
        active = self._clip_grad_norm(active)
        gains = self._allora_gains()  # from the factors as they are before this step
        multiplier = self.context.multiplier if self.config.context else 1.0

        self.step_count += 1
        for p, g in active:
            p.t += 1
            m_prev = p.read("exp_avg", *g.shape)
            u, d = advance_direction(p, g, self.config)
            self._vote(p, u, m_prev)
            d = self._apply_spatial(p, g, d)
            d = d * gains.get(p.name, 1.0)
            if self.config.cautious:
                d = cautious.mask_cautiously(d, g, self.config.cautious_scale)
            p.lr = self._effective_lr(p, sched, multiplier)
            self._write(p, g, d)
            p.trace = {"u": u, "m_prev": m_prev, "d": d}

        self._penalise_rank(active)
        for p, _ in active:
            self._encode(p)
        self._observe(active, loss)
        return True

    # stage 0: gradients

    def _gather(self, grads: Mapping[str, Tensor | None]) -> Gradients:
        """Pairs each parameter with its gradient; those without one, or without elements, sit this step out."""
        present = [(p, grads.get(p.name)) for p in self.params.values()]
        return [(p, came.as_matrix(g.double())) for p, g in present if g is not None and g.numel() > 0]

    def _guard(self, active: Gradients) -> bool:
        """Counts a step with a non-finite gradient anywhere, and refuses it as a whole."""
        offender = next((p.name for p, g in active if not g.isfinite().all()), None)
        if offender is None:
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        self.first_offender = offender
        self.context.note_skipped_step()
        return False

    def _clip_grad_norm(self, active: Gradients) -> Gradients:
        """Scales all gradients alike: g <- g * min(1, max_grad_norm / norm of all gradients together)."""
        norm = math.sqrt(sum(g.square().sum().item() for _, g in active))
        if self.config.max_grad_norm is None or norm <= self.config.max_grad_norm:
            return active
        return [(p, g * (self.config.max_grad_norm / norm)) for p, g in active]

    # stages 4 and 5

    def _apply_spatial(self, p: ReferenceParam, g: Tensor, d: Tensor) -> Tensor:
        """Stage 4, in the parameter's own shape; untouched where no axis has neighbours."""
        c, axes = self.config, spatial.spatial_axes(p.shape, p.options.spatial_axes)
        if not axes:
            return d
        d = d.reshape(p.shape)
        if c.edge_suppression:
            d = spatial.suppress_edges(d, axes, c.edge_penalty, c.edge_threshold)
        if c.frequency_penalty > 0:
            d = spatial.penalise_frequencies(d, axes, c.frequency_penalty)
        d = came.as_matrix(d)
        if c.background_regularization:
            d = d * spatial.background_weights(p.state["exp_avg"])[:, None]
        if c.spatial_awareness:
            variance = came.ema(p.read("spatial_variance", g.shape[0]), spatial.row_variance(g), c.betas[1])
            p.state["spatial_variance"] = variance
            d = d * spatial.awareness_weights(variance, c.detail_preservation)[:, None]
        return d

    def _allora_gains(self) -> dict[str, Tensor | float]:
        """Stage 5: what multiplies d of each half, row by row for B and as a whole for A."""
        gains: dict[str, Tensor | float] = {}
        for pair in self.pairs if self.config.allora else ():
            a, b = self.params[pair.a].matrix, self.params[pair.b].matrix
            rows, gains[pair.a] = lora.allora_gains(a, b, pair.scaling, self.config.allora_eta)
            gains[pair.b] = rows[:, None]
        return gains

    # stage 7: the rate

    def _pool(self, p: ReferenceParam) -> str:
        """Names the pool whose K this parameter uses."""
        return "global" if self.config.lr_pool == "global" else p.options.group

    def _adapts(self) -> bool:
        """Says whether K and the masks may still move in the step under way."""
        within = self.config.adapt_steps is None or self.step_count <= self.config.adapt_steps
        return self.config.self_tuning and within

    def _effective_lr(self, p: ReferenceParam, sched: float, multiplier: float) -> float:
        """The rate of this step, from what the last step saw; without self-tuning the schedule times M."""
        o = p.options
        if o.lr == 0 or not self.config.self_tuning:
            return sched * o.lr * multiplier
        log_rate = self.log_rates.get(self._pool(p), 0.0) if self.config.search else math.log(o.max_lr / o.lr)
        tuned = self_tuning.effective_lr(o.lr, log_rate, sched, multiplier, o.min_lr, o.max_lr)
        return tuned * self_tuning.fall(self.step_count, self.config.rail_steps)

    def _vote(self, p: ReferenceParam, u: Tensor, m_prev: Tensor) -> None:
        """Element mask: the codes move by this step's votes; every `sync_frequency` steps they are recentred."""
        if self.config.granularity == "tensor" or not self.config.self_tuning:
            return
        limit = self_tuning.mask_limit(self.config.mask_band)
        codes = p.state.get("lr_mask", torch.full(u.shape, self_tuning.CENTRE, dtype=torch.uint8))
        if self._adapts():
            codes = self_tuning.advance_mask(codes, self_tuning.vote(u, m_prev, self.config.betas[0]), limit)
            if p.t % self.config.sync_frequency == 0:
                codes = self_tuning.recentre_mask(codes, limit)
        p.state["lr_mask"] = codes

    def _observe(self, active: Gradients, loss: float | None) -> None:
        """Moves K of every pool and the context by what this step saw; the next step uses them."""
        if self.config.context:
            self.context.advance(self_tuning.pooled_cosine([seen(p) for p, _ in active]), loss)
        if self._adapts():
            for pool in sorted({self._pool(p) for p, _ in active}):
                self._advance_log_rate(pool, [p for p, _ in active if self._pool(p) == pool])

    def _advance_log_rate(self, pool: str, active: list[ReferenceParam]) -> None:
        """Moves K of one pool, kept within the widest rails of all its parameters."""
        rails = [p.options for p in self.params.values() if self._pool(p) == pool and p.options.lr > 0]
        if not rails:
            return
        self.log_rates[pool] = self_tuning.advance_log_rate(
            self.log_rates.get(pool, 0.0),
            self_tuning.pooled_cosine([seen(p) for p in active]),
            sum(p.matrix.numel() for p in active),
            self.config.kappa,
            low=min(math.log(o.min_lr / o.lr) for o in rails),
            high=max(math.log(o.max_lr / o.lr) for o in rails),
            drift=self.config.drift if any(p.trace["u"].any() for p in active) else 0.0,
        )

    # stages 9 to 12

    def _write(self, p: ReferenceParam, g: Tensor, d: Tensor) -> None:
        """Decays and moves the parameter: W <- W - effective_lr * rho^k * d."""
        weight_decay = 0.0 if p.role in decay.UNDECAYED_ROLES else p.options.weight_decay
        mask = self_tuning.mask_factor(p.state["lr_mask"]) if "lr_mask" in p.state else 1.0
        change = p.lr * mask * d
        if self.config.weight_decay_mode == "selective":
            origin = torch.zeros(p.shape) if p.options.origin is None else p.options.origin
            p.matrix = decay.write_selectively(p.matrix, change, g, came.as_matrix(origin.double()), weight_decay)
        elif self.config.weight_decay_mode == "cautious":
            p.matrix = decay.decay_cautiously(p.matrix, d, p.lr, weight_decay) - change
        else:
            p.matrix = decay.decay(p.matrix, p.lr, weight_decay) - change

    def _penalise_rank(self, active: Gradients) -> None:
        """Stage 11: every `rank_penalty_every` steps, at the rate of A in this step."""
        c, stepped = self.config, {p.name for p, _ in active}
        if not c.rank_penalty or self.step_count % c.rank_penalty_every != 0:
            return
        for pair in self.pairs:
            if {pair.a, pair.b} <= stepped:
                a, b = self.params[pair.a], self.params[pair.b]
                a.matrix, b.matrix = lora.shrink_spectrum(
                    a.matrix, b.matrix, a.lr, c.rank_penalty_strength, c.low_rank_emphasis, c.rank_penalty_every
                )

    def _encode(self, p: ReferenceParam) -> None:
        """Stage 12: replaces state by what the engine would read back from its codes."""
        for name in [name for name in p.state if p.options.quantized and is_momentum(name)]:
            x = p.state[name].to(self.config.codec_dtype)
            error = p.read(f"{name}_residual", *x.shape).to(self.config.codec_dtype)
            decoded, error = codecs.encode_with_feedback(x, error, self.config.block_size)
            flushed = not self.config.error_correction or p.t % self.config.sync_frequency == 0
            p.state[name] = decoded.double()
            p.state[f"{name}_residual"] = torch.zeros_like(p.state[name]) if flushed else error.double()
        for name in [name for name in p.state if p.options.log16 and name.endswith(("_row", "_col"))]:
            p.state[name] = codecs.decode_log16(*codecs.encode_log16(p.state[name]))


def is_momentum(name: str) -> bool:
    """Tells exp_avg and exp_avg_k from the second moments, the residual vectors and the feedback errors."""
    return name == "exp_avg" or name.removeprefix("exp_avg_").replace(".", "").isdigit()


def seen(p: ReferenceParam) -> tuple[Tensor, Tensor]:
    """What this step shows to the controllers: the clipped u and the previous uncorrected momentum."""
    return p.trace["u"], p.trace["m_prev"]
