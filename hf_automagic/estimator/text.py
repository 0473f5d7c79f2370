"""Writes an estimate as plain text."""

from collections.abc import Sequence

from .estimate import CONTEXT_BYTES, Estimate, estimate_memory
from .plan import TrainingPlan, smaller_plans

EXACT, ABOUT = "exact", "estimate"


def describe_estimate(plan: TrainingPlan, optimizers: Sequence[str], device_gib: float | None = None) -> str:
    """Estimates a plan with some optimizers side by side, and says what the first one would need in order to fit.

    Args:
        plan: what is to be trained.
        optimizers: names; the first one is the user's choice.
        device_gib: size of the GPU; without it there is no verdict.

    Raises:
        TypeError: there is no optimizer of a name.
        ValueError: there is no such model, or it cannot be trained this way.
    """
    estimate = estimate_memory(plan, optimizers)
    lines = [_title(plan), "", *_shared(estimate), "", *_optimizers(estimate, device_gib)]
    if device_gib is not None and estimate.verdict(optimizers[0], _bytes(device_gib)) == "NO":
        lines += ["", _remedy(plan, optimizers[0], device_gib)]
    return "\n".join(lines) + "\n"


def _title(plan: TrainingPlan) -> str:
    what = "every weight" if plan.rank is None else f"LoRA of rank {plan.rank} on {plan.target}"
    checkpointing = "with" if plan.checkpointing else "without"
    return (
        f"{plan.model}: {what}, base in {plan.base}, batch {plan.batch} x {plan.sequence_length}, "
        f"{checkpointing} gradient checkpointing"
    )


def _shared(estimate: Estimate) -> list[str]:
    rows = [
        ("frozen weights", estimate.frozen_bytes, EXACT),
        (f"trained weights ({estimate.trained:,})", estimate.trained_bytes, EXACT),
        ("gradients", estimate.gradient_bytes, EXACT),
        ("activations", estimate.activation_bytes, ABOUT),
        ("CUDA itself", CONTEXT_BYTES, ABOUT),
    ]
    width = max(len(name) for name, *_ in rows)
    return [f"{name.ljust(width)}  {_gib(size):>12}  {size:>18,} bytes  {kind}" for name, size, kind in rows]


def _optimizers(estimate: Estimate, device_gib: float | None) -> list[str]:
    width = max(len(name) for name in (*estimate.optimizer_bytes, "optimizer"))
    fit = "" if device_gib is None else f"  {device_gib:g} GiB"
    lines = [f"{'optimizer'.ljust(width)}  {'state':>12}  {'exact bytes':>18}  {'total, about':>12}{fit}"]
    for name, size in estimate.optimizer_bytes.items():
        verdict = "" if device_gib is None else f"  {estimate.verdict(name, _bytes(device_gib))}"
        lines.append(
            f"{name.ljust(width)}  {_gib(size):>12}  {size:>18,}  {_gib(estimate.total_bytes(name)):>12}{verdict}"
        )
    return lines


def _remedy(plan: TrainingPlan, optimizer: str, device_gib: float) -> str:
    for options, smaller in smaller_plans(plan):
        estimate = estimate_memory(smaller, [optimizer])
        if estimate.verdict(optimizer, _bytes(device_gib)) == "FITS":
            return f"It fits with {options}: about {_gib(estimate.total_bytes(optimizer))}."
    return (
        f"No change known here makes it fit {device_gib:g} GiB; take a smaller model, shorter sequences or more GPUs."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _bytes(gib: float) -> int:
    return int(gib * 2**30)
