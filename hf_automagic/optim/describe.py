"""The start banner: what the optimizer found and what each group really gets."""

from collections.abc import Mapping
from typing import Any

from .groups import is_stepped, searches


def describe(optimizer: Any) -> str:
    """Returns an Automagic's groups as a table of plain text: role, shapes, rails, current rate, decay."""
    memory = optimizer.memory_stats()
    stepped = [[p for p in group["params"] if is_stepped(p)] for group in optimizer.param_groups]
    head = (
        f"{type(optimizer).__name__}: {memory.parameters:,} trainable elements in {sum(map(len, stepped))} "
        f"parameters, {memory.total_bytes / 2**20:.2f} MB of state "
        f"({memory.bytes_per_parameter:.2f} bytes an element, Adam 8)"
    )
    rows = [("role", "params", "elements", "shapes", "rate now", "rails", "decay")]
    for group, params, rate in zip(optimizer.param_groups, stepped, optimizer.get_learning_rates(), strict=True):
        shapes = sorted({"x".join(map(str, p.shape)) or "scalar" for p in params})
        shown = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        rails = _rails(group)
        elements = sum(p.numel() for p in params)
        decay = f"{group['weight_decay']:g}"
        role = f"{group['role']}, fresh" if group.get("is_fresh") else group["role"]
        rows.append((role, str(len(params)), f"{elements:,}", shown, f"{rate:.3g}", rails, decay))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *table, _policy(optimizer), *_backends(optimizer.backends())])


def _backends(counts: Mapping[tuple[str, str], int]) -> list[str]:
    """Says what computes the steps, and why not the same everywhere."""
    return [
        f"{count} parameters step in {name if name != 'eager' else 'eager stacks'}{f': {why}' if why else ''}."
        for (name, why), count in counts.items()
    ]


def _rails(group: Mapping[str, Any]) -> str:
    if not group["self_tuning"]:
        return "off, the rate is yours"
    return f"{group['min_lr']:.3g} to {group['max_lr']:.3g}" if searches(group) else f"{group['max_lr']:.3g}"


def _policy(optimizer: Any) -> str:
    if not any(group["self_tuning"] for group in optimizer.param_groups):
        return "The learning rate is yours; schedulers act on it as usual."
    if not any(searches(group) for group in optimizer.param_groups):
        return "The learning rate follows from role, width and step, whatever lr is; a scheduler multiplies it."
    pool = "all groups together" if optimizer.param_groups[0]["lr_pool"] == "global" else "each group for itself"
    return f"The learning rate is searched for from lr, {pool}; a scheduler multiplies it."
