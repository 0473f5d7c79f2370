"""Launches whose arguments stay the same from step to step: looked up once, then handed straight to the driver."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .arithmetic import IS_NVIDIA, VERSION
from .support import is_interpreted

# before, a compiled kernel took other arguments; triton's own call finds them out anew each time, 20 us a launch
IS_DIRECT = VERSION >= (3, 3) and not is_interpreted()


@dataclasses.dataclass(frozen=True)
class Work:
    """How the threads of a program share its elements.

    Args:
        elements: that a program holds at a time.
        warps: of 32 threads.
        registers: that a thread may take, so that more programs run at once; None for as many as it likes.
    """

    elements: int = 1024
    warps: int = 4
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Returns what triton's launch takes."""
        cap = {} if self.registers is None or not IS_NVIDIA.value else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **cap}


@dataclasses.dataclass
class Launch:
    """One kernel with its grid and all its arguments.

    Args:
        kernel: of `triton.jit`.
        programs: how many.
        arguments: all of them in order, tensors and constants; where the tensors lie is noted by `prepare`.
        work: how a program's threads share its elements.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    work: Work = Work()
    _run: Any = None
    _addresses: tuple[Any, ...] = ()

    def prepare(self) -> None:
        """Compiles the kernel and loads it, which may fail, before anything is launched."""
        if IS_DIRECT and self._run is None:
            compiled = self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.work.options())
            self._run = compiled[(self.programs, 1, 1)]
            self._addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in self.arguments)
            self.arguments = ()  # scratch is not to be kept between steps

    def __call__(self, stream: int) -> None:
        """Launches."""
        if self._run is not None:
            self._run(*self._addresses, stream=stream)
        else:
            self.kernel[(self.programs,)](*self.arguments, **self.work.options())


def current_stream(device: torch.device) -> int:
    """Returns the handle of the stream that torch launches on, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
