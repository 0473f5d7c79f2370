"""A few steps of the fused kernels over all sorts of shapes, as a program of its own for compute-sanitizer."""

import sys

import torch

from hf_automagic import Automagic

SHAPES = [(16, 512), (300, 16), (34, 130), (17,), (4, 3, 3, 3), (257, 1031), (64, 300), ()]
OPTIONS = [{}, {"lr_granularity": "element", "max_grad_norm": 1.0}, {"vector_precision": "log16", "cautious": True}]
CASES = [(dtype, options) for dtype in (torch.float32, torch.bfloat16) for options in OPTIONS]


def main(case: int) -> None:
    """Takes four steps: in each of them another gradient is missing, and in one of them an element is NaN."""
    dtype, options = CASES[case]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in SHAPES]
    optimizer = Automagic(params, **options)
    for step in range(4):
        for i, param in enumerate(params):
            param.grad = None if i == step else torch.randn_like(param)
        if step == 2:
            params[1].grad[5, 5] = float("nan")
        optimizer.step()
    assert optimizer.backends() == {("triton", ""): len(SHAPES)}
    counters = optimizer.param_groups[0]["counters"]
    assert (int(counters["applied"]), int(counters["skipped"])) == (3, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
