"""Launches whose arguments stay the same from step to step: looked up once, then handed straight to the driver.

Between steps the scratch belongs to others, and may lie elsewhere in the next one. Where it has lain before, all
launches of a series are handed over at once, as a CUDA graph: on the host that takes a third of the time.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import IS_NVIDIA, VERSION
from .support import is_interpreted

logger = logging.getLogger(__name__)
# before, a compiled kernel took other arguments; triton's own call finds them out anew each time, 20 us a launch
IS_DIRECT = VERSION >= (3, 3) and not is_interpreted()
REMEMBERED = 16  # places of the scratch for which graphs are kept
_refusals: list[RuntimeError] = []  # why no graph can be recorded


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
    _addresses: list[Any] = dataclasses.field(default_factory=list)
    _in_scratch: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # argument, bytes from its start

    def prepare(self, scratch: Tensor) -> None:
        """Compiles the kernel and loads it, which may fail, before anything is launched.

        Args:
            scratch: what some of the arguments are cut from.
        """
        if IS_DIRECT and self._run is None:
            compiled = self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.work.options())
            self._run = compiled[(self.programs, 1, 1)]
            self._addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in self.arguments]
            self._in_scratch = [
                (i, a.data_ptr() - scratch.data_ptr())
                for i, a in enumerate(self.arguments)
                if isinstance(a, Tensor) and a.numel() and _storage(a) == _storage(scratch)
            ]
            self.arguments = ()  # scratch is not to be kept between steps

    def follow(self, place: int) -> None:
        """Takes the addresses in the scratch from where it lies."""
        for i, offset in self._in_scratch:
            self._addresses[i] = place + offset

    def __call__(self, stream: int) -> None:
        """Launches."""
        if self._run is not None:
            self._run(*self._addresses, stream=stream)
        else:
            self.kernel[(self.programs,)](*self.arguments, **self.work.options())


class Series:
    """Launches that follow one another.

    Args:
        launches: in order.
        scratch: what some of their arguments are cut from.
    """

    def __init__(self, launches: Sequence[Launch], scratch: Tensor) -> None:
        """Compiles the kernels, which may fail."""
        self.launches, self.device, self.place = list(launches), scratch.device, scratch.data_ptr()
        self.done = 0
        self.replayed: list[None] = []
        self.graphs: dict[int, Any] = {}  # the latest last
        with _on(self.device):
            for launch in launches:
                launch.prepare(scratch)

    def begin(self, scratch: Tensor) -> None:
        """Begins anew, with scratch that lies there."""
        place, self.done = scratch.data_ptr(), 0
        self.replayed.clear()
        if place != self.place:
            self.place = 0  # until all have followed
            for launch in self.launches:
                launch.follow(place)
            self.place = place

    def run(self) -> None:
        """Launches what is left, from where an interrupted call got to."""
        with _on(self.device):
            graph = None if self.done or self.replayed else self._find_graph()
            if graph is not None:  # without a line of Python between the replay and its note, where Ctrl-C would raise
                replay: Any = super(type(graph), graph)
                self.replayed.extend(itertools.starmap(replay.replay, [()]))
            if self.replayed:
                return
            stream = _current_stream(self.device)
            for launch in self.launches[self.done :]:
                launch(stream)
                self.done += 1

    def _find_graph(self) -> Any:
        """Returns the graph for where the scratch lies, made when it lies there again; None where there is none."""
        if _refusals or not (IS_DIRECT and IS_NVIDIA.value) or torch.cuda.is_current_stream_capturing():
            return None
        is_known = self.place in self.graphs
        graph = self.graphs.pop(self.place, None)
        if len(self.graphs) >= REMEMBERED:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[self.place] = graph if graph is not None or not is_known else self._capture()
        return self.graphs[self.place]

    def _capture(self) -> Any:
        """Records the launches as a graph, which launches nothing; None where that fails, which is said once."""
        try:
            graph, side = torch.cuda.CUDAGraph(), _side_stream(self.device)
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="relaxed")  # whatever other threads do meanwhile
                try:
                    for launch in self.launches:
                        launch(side.cuda_stream)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):  # there may be some in the next step
                _refusals.append(error)
                logger.warning("kernels are launched one by one, as torch cannot record a CUDA graph: %s", error)
            return None
        return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, as what compiles and launches has to find it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _current_stream(device: torch.device) -> int:
    """Returns the handle of the stream that torch launches on, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
