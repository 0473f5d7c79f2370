"""The compile backend: the chain on a stack as one graph a bucket, for devices without triton.

Rates, steps and the guard's flag are tensors: when they change, nothing is compiled anew. Shapes are constants; stacks
of another height than the usual two, the whole chunk and the last one, go through the eager chain.
"""

import dataclasses
import functools
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantization import EncodeContext, keys_for, random_bits, random_halves, round_stochastically, step_keys
from ..transforms.core import ChainResult, StepContext, Transform, run_chain
from .choice import bit_mask, choose
from .support import Stacked

logger = logging.getLogger(__name__)
FEW_BITS = (torch.bfloat16, torch.float16)
# a scale of 16 bits is rounded before it divides, as it is stored
EXACT_CASTS: dict[str, Any] = {"emulate_precision_casts": True}


@dataclasses.dataclass(frozen=True)
class StackedStep:
    """A chain on whole matrices, as a pure function of tensors.

    Args:
        chain: the transforms.
        stored: how each state is stored, see `optim.storage.StoredState`.
        rows: of each matrix.
        cols: of each matrix.
        dtype: of the weights.
        work_dtype: of the arithmetic.
        seed: of the rounding.
        rounds: whether weights in few bits are rounded at random.
        numbers: of the states, for their draws.
    """

    chain: tuple[Transform, ...]
    stored: tuple[Any, ...]
    rows: int
    cols: int
    dtype: torch.dtype
    work_dtype: torch.dtype
    seed: int
    rounds: bool
    numbers: tuple[int, ...]

    def __call__(
        self,
        grad: Tensor,
        param: Tensor,
        fields: dict[str, Tensor],
        keys: Tensor,
        lr: Tensor,
        finite: Tensor,
        clip: Tensor | None,
        gain: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor, list[Tensor]]:
        """Returns the new weights [n, rows, cols], the new stored tensors, the pooled sums and the sum of update^2.

        And what is to be computed once: a graph's compiler keeps in memory what the graph returns, while all else is
        computed anew in each loop that reads it.

        Args:
            grad: [n, rows, cols], in the dtype of the weights, as `param` is.
            param: the weights.
            fields: stored tensors of these parameters.
            keys: stable numbers of the parameters  # [n], int64
            lr: the rate really applied  # []
            finite: whether the step may change anything  # []
            clip: factor for the gradients  # []
            gain: ALLoRA's gains  # [n, rows] or [n, 1]
        """
        grad, param = grad.to(self.work_dtype), param.to(self.work_dtype)
        grad = grad if clip is None else grad * clip
        step = fields["step"] + finite
        kept: list[Tensor] = []
        context = StepContext(grad, param, step, lr, self.rows, self.cols, 0, gain, kept)
        state = {s.spec.name: s.decode(self._of(s, fields), self.work_dtype) for s in self.stored}
        result = run_chain(self.chain, grad, state, context)
        assert isinstance(result, ChainResult)  # not sums alone: these are whole matrices
        drawn, mask = step_keys(self.seed, keys, step), bit_mask(finite)
        new = {"step": step}
        for stored, number in zip(self.stored, self.numbers, strict=True):
            if stored.spec.name in result.state and stored.spec.name != "step":
                draw = functools.partial(random_bits, keys_for(drawn, number), 0)
                encoded = stored.encode(
                    result.state[stored.spec.name], EncodeContext(self._of(stored, fields), step, draw)
                )
                new |= {name: choose(mask, value, fields[name]) for name, value in encoded.items()}
        written = param - torch.where(finite, result.update, 0.0)
        if self.rounds and self.dtype in FEW_BITS:
            bits = random_halves(drawn, 0, self.rows * self.cols)
            written = round_stochastically(written, self.dtype, bits.view(written.shape))
        return written.to(self.dtype), new, result.pool, result.update.square().sum(), kept

    def _of(self, stored: Any, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: fields[name] for name in stored.fields(self.rows, self.cols)}


def compile_step(step: StackedStep, device: torch.device) -> Callable[..., Any] | None:
    """Compiles a step to a graph of its own; None where that cannot be done, which is said once.

    Each gets its own code object: torch counts how often a code object was compiled, and buckets are many.
    """
    if find_compile_problem(device.type) is not None:
        return None
    call = StackedStep.__call__
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__)
    options = dict(EXACT_CASTS)
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # with it came the option
        options["guard_filter_fn"] = _guards_of_inputs
    return functools.partial(torch.compile(own, dynamic=False, fullgraph=True, options=options), step)


def _guards_of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Keeps the checks of tensors before each call; those of the step, which is frozen, cost a tenth of the call."""
    return [not guard.is_global and guard.name.split(".")[0] != "self" for guard in guards]


def is_of_compiler(error: RuntimeError) -> bool:
    """Whether an error is torch's, which cannot compile a step; older versions know less of Python."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


@functools.cache
def tell_refusal(reason: str) -> None:
    """Says in the log, once, why steps that were to be compiled run in eager stacks."""
    logger.warning(
        "torch %s cannot compile the step, the optimizer steps in eager stacks: %s", torch.__version__, reason
    )


def find_compile_obstacle(bucket: Stacked) -> str | None:
    """Returns why a bucket is not compiled, in a few words; None where it can be."""
    return find_compile_problem(bucket.device.type)


@functools.cache
def find_compile_problem(device_type: str) -> str | None:
    """Compiles one line on a device, once; returns why that fails, and says so in the log. None where it works."""
    try:
        torch.compile(_halve, dynamic=False)(torch.ones(4, device=device_type))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("torch.compile cannot run on %s, the optimizer steps in eager stacks: %s", device_type, reason)
        return f"torch.compile cannot run: {reason}"
    return None


def _halve(x: Tensor) -> Tensor:
    return x / 2


def stack_of(tensors: Sequence[Tensor], cols: int) -> Tensor:
    """Stacks parameters or gradients as matrices  # [n, rows, cols]"""
    return torch.stack([*tensors]).reshape(len(tensors), -1, cols)
