"""The benchmark arm does what its ancestor does."""

import math

import pytest
import torch

from .ancestor import AncestorAutomagic


def test_one_element_follows_the_rule_by_hand():
    """One element: u = g / sqrt(v) clipped to 1; the first vote compares with False, so a positive u bumps down."""
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AncestorAutomagic([p], lr=1e-5, lr_bump=1e-6, beta2=0.0)
    expected, rate = 1.0, 1e-5
    for g, bump in [(2.0, -1e-6), (3.0, 1e-6), (0.5, 1e-6), (-1.0, -1e-6), (-1.0, 1e-6)]:
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        rate += bump
        expected -= rate * math.copysign(1.0, g)
    assert p.item() == pytest.approx(expected, abs=1e-12)


def test_matrices_are_normalised_by_factors_and_a_high_rate_falls_back():
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = AncestorAutomagic([p], lr=1.0, beta2=0.0)
    p.grad = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0, 3.0, 4.0]).double()
    optimizer.step()
    assert (p + p.grad.sign() * optimizer.state[p]["lr_mask"]).abs().max() < 1e-12  # rank one: u = sign(g)
    assert optimizer.state[p]["lr_mask"].unique().tolist() == pytest.approx([1e-7, 2e-6], rel=1e-12)
