"""A kernel of one line, which tells whether triton finds what it needs: a driver and a C compiler."""

import torch
import triton
import triton.language as tl

from .launch import Launch, Series
from .support import is_interpreted


@triton.jit
def _double(x):
    tl.store(x, tl.load(x) * 2)


def run_trial() -> None:
    """Runs it the way a step does; raises what triton raises where it cannot."""
    device = torch.device("cpu" if is_interpreted() else "cuda")
    number = torch.ones((), device=device)
    Series([Launch(_double, 1, (number,))], number).run()
