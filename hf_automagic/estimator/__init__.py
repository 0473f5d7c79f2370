"""Will it fit? The bytes of a training run before it starts: weights, gradients, optimizer, activations.

Everything is built on the meta device from a config: no weight is loaded and no GPU needed. Weights, gradients and the
optimizer's state are exact; activations are simulated, see `integrations.activations`.
"""

from .estimate import CONTEXT_BYTES, Estimate, Verdict, estimate_memory
from .plan import TrainingPlan, smaller_plans
from .text import describe_estimate

__all__ = [
    "CONTEXT_BYTES",
    "Estimate",
    "TrainingPlan",
    "Verdict",
    "describe_estimate",
    "estimate_memory",
    "smaller_plans",
]
