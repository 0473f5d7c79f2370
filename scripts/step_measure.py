"""What benchmark_step.py measures of one optimizer, in a process of its own."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmark_sets import make_parameters
from step_rows import Row
from torch import Tensor

WARM_UP = 5
PROFILED = 3
CHECKED = 4  # steps of the check, on the first tensors of the set
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def check_way(row: Row, name: str, dtype: str, device: str) -> float:
    """Steps the optimizer beside its reference; returns the distance of their ways relative to the reference's.

    Raises:
        SystemExit: they went different ways: its time would mean nothing.
    """
    ways = []
    for make in (row.make, row.reference):
        params = _sample(make_parameters(name, dtype, device))
        starts = [p.detach().clone() for p in params]
        optimizer = make(params)
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(CHECKED):
            for p in params:
                noise = torch.randn(p.shape, generator=generator, device=device)
                p.grad = (1e-3 * noise).to(p.dtype) + p.grad
            optimizer.step()
        ways.append([(p.detach().float() - s.float()) for p, s in zip(params, starts, strict=True)])
    apart = sum(float((a - b).square().sum()) for a, b in zip(*ways, strict=True))
    far = sum(float(b.square().sum()) for b in ways[1])
    error = (apart / far) ** 0.5 if far else float("inf")
    allowed = row.tolerance if dtype == "fp32" else max(row.tolerance, 0.3)  # a rounded weight jumps by its spacing
    if not error <= allowed:
        raise SystemExit(f"{row.label} went another way than its reference: {error:.3g}, allowed {allowed:.3g}")
    return error


def _sample(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Takes the first tensor of each shape, the smallest three of them."""
    by_shape = {p.shape: p for p in reversed(params)}
    return sorted(by_shape.values(), key=torch.Tensor.numel)[:3]


def measure(row: Row, name: str, dtype: str, device: str, steps: int) -> dict[str, Any]:
    """Times steps; returns figures in milliseconds, bytes and counts a step."""
    error = check_way(row, name, dtype, device)
    params = make_parameters(name, dtype, device)
    numel = sum(p.numel() for p in params)
    start = time.perf_counter()
    optimizer = row.make(params)
    optimizer.step()
    _wait(device)
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        optimizer.step()
    walls, hosts, cpus = [], [], []
    for _ in range(steps):
        _wait(device)
        before, cpu = time.perf_counter(), time.process_time()
        optimizer.step()
        hosts.append(time.perf_counter() - before)
        _wait(device)
        walls.append(time.perf_counter() - before)
        cpus.append(time.process_time() - cpu)
    state = _state_bytes(optimizer)
    figures = {
        "way": error,
        "first_ms": 1e3 * first,
        "wall_ms": 1e3 * statistics.median(walls),
        "host_ms": 1e3 * statistics.median(hosts),
        "cpu_ms": 1e3 * statistics.median(cpus),
        "state_bytes": state / numel,
        "tensors": len(params),
        "elements": numel,
    }
    if device == "cuda":
        figures |= _on_gpu(optimizer)
        needed = 2 * (params[0].element_size() + state / numel) + params[0].element_size()  # bytes an element
        figures["bandwidth"] = needed * numel / figures["gpu_ms"] / 1e9
        figures["copy_bandwidth"] = _copy_bandwidth()
    return figures


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes of all tensors of the states and groups, each storage's part once."""
    found: dict[tuple[int, int], int] = {}
    given = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    values = [list(optimizer.state.values()), [{**g, "params": None} for g in optimizer.param_groups]]
    for tensor in _tensors(values):
        if tensor.data_ptr() not in given:
            found[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (t for item in value for t in _tensors(item))


def _on_gpu(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Profiles a few steps: time and number of kernels, waits of the host; and the memory that one step needs."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    extra = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            optimizer.step()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if "#" not in e.name]  # torch marks the span of a whole step as Optimizer.step#...
    waits = [e for e in recorded.events() if e.name in SYNCHRONISING]
    by_name: dict[str, float] = {}
    for kernel in kernels:
        by_name[kernel.name] = by_name.get(kernel.name, 0.0) + kernel.device_time / 1e3 / PROFILED
    slowest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {
        "gpu_ms": sum(by_name.values()),
        "launches": len(kernels) / PROFILED,
        "syncs": max(0, len(waits) - 1) / PROFILED,  # the profiler's own end is one
        "extra_mib": extra / 2**20,
        "kernels": {kernel[:60]: round(ms, 4) for kernel, ms in slowest},
    }


def _copy_bandwidth() -> float:
    """Returns what a copy on the device reaches, bytes read and written, in TB/s."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() * 4 / min(times) / 1e9
