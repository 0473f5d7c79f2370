"""A kernel of one line, which tells whether triton finds what it needs: a driver and a C compiler."""

import torch
import triton
import triton.language as tl

from .launch import Launch, current_stream
from .support import is_interpreted


@triton.jit
def _double(x):
    tl.store(x, tl.load(x) * 2)


def run_trial() -> None:
    """Runs it the way a step does; raises what triton raises where it cannot."""
    device = torch.device("cpu" if is_interpreted() else "cuda")
    launch = Launch(_double, 1, (torch.ones((), device=device),))
    launch.prepare()
    launch(current_stream(device))
