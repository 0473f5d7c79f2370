"""Buckets that step whole chunks through one compiled graph each."""

from collections.abc import Callable
from typing import Any

from ..kernels.compile_backend import StackedStep, compile_step, is_of_compiler, stack_of, tell_refusal
from .bucket import Bucket
from .sweep import StepInputs, Sweep, Writes, carry_out


class CompiledBucket(Bucket):
    """A bucket for which torch.compile runs; chunks of another height than most go through the chain uncompiled."""

    graph: Callable[..., Any] | None  # the chain as one function
    heights: set[int]  # of the stacks that it is compiled for

    @classmethod
    def of(cls, bucket: Bucket) -> "CompiledBucket":
        """Makes a compiled one of a plain one that has stepped nothing yet."""
        made = cls(bucket.params, bucket.positions, bucket.config, bucket.codecs, bucket.is_full_weight)
        layout, config = made.layout, made.config
        plan = (made.chain, made.stored, layout.rows, layout.cols, made.dtype, made.work_dtype)
        numbers = tuple(stored.number for stored in made.stored)
        step = StackedStep(*plan, config.seed, config.stochastic_rounding, numbers)
        made.graph = compile_step(step, made.device)
        chunks = made._chunks(0, len(made.params)) if layout.shape.numel() else ()
        made.heights = {last - first for first, last, pieces in chunks if len(pieces) == 1}
        return made

    def _step_chunk(self, chunk: slice, pieces: list[slice], inputs: StepInputs, sweep: Sweep) -> None:
        if self.graph is None or len(pieces) > 1 or chunk.stop - chunk.start not in self.heights:
            super()._step_chunk(chunk, pieces, inputs, sweep)
            return
        params, cols = self.params[chunk], self.layout.cols
        grads = stack_of([p.grad for p in params if p.grad is not None], cols)
        fields = {name: stack[chunk] for name, stack in self.stacks.items()}
        gain = None if inputs.row_gain is None else inputs.row_gain[chunk]
        told = (self.keys[chunk], inputs.lr, inputs.finite, inputs.clip, gain)
        try:
            written, new, sweep.pool, sweep.squares, _ = self.graph(grads, stack_of(params, cols), fields, *told)
        except RuntimeError as error:  # while compiling, before anything was computed
            if not is_of_compiler(error):
                raise
            self.graph, self.refusal = None, f"torch.compile cannot run: {type(error).__name__}"
            tell_refusal(str(error).strip().splitlines()[0])
            super()._step_chunk(chunk, pieces, inputs, sweep)
            return
        writes: Writes = [(fields[name], value) for name, value in new.items()]
        writes += zip(params, written.view(len(params), *self.layout.shape).unbind(), strict=True)
        carry_out(writes)
        sweep.is_over = True
