"""A kernel of one line, which tells whether triton finds what it needs: a driver and a C compiler."""

import torch
import triton
import triton.language as tl

from .support import is_interpreted


@triton.jit
def _double(x):
    tl.store(x, tl.load(x) * 2)


def run_trial() -> None:
    """Runs it; raises what triton raises where it cannot."""
    _double[(1,)](torch.ones((), device="cpu" if is_interpreted() else "cuda"))
