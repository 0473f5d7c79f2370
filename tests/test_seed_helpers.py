"""The first seed's helpers do what its snippets only sketched."""

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_automagic import (
    AdaptiveOptimizer,
    Automagic,
    Automagic_CameAMP_8Bit,
    CustomQuantizationStrategy,
    MemoryMonitor,
    Optimizer8BitConfig,
    TrainingDashboard,
    adjust_config_for_model_size,
    check_memory_leak,
    check_quantization_quality,
    get_recommended_config,
    monitor_learning_rates,
    progressive_quantization_training,
)
from tests.seed_cases import CONV, SHIFT, A, B, make, run

# advice


@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        (4, {"error_correction": False, "block_size": 512, "edge_suppression": False, "spatial_awareness": False}),
        (7.99, {"error_correction": False, "block_size": 512, "edge_suppression": False, "spatial_awareness": False}),
        (8, {}),
        (15.99, {}),
        (16, {"block_size": 128, "verbose": True}),
        (80, {"block_size": 128, "verbose": True}),
    ],
)
def test_the_config_follows_the_gpus_memory(memory, changes):
    assert get_recommended_config(memory) == Optimizer8BitConfig(**changes)


def model_of(elements: int) -> nn.Module:
    return nn.ParameterList([torch.empty(elements - 5, device="meta"), torch.empty(5, device="meta")])


SOURCES = {
    "model": lambda m: m,
    "list": lambda m: list(m.parameters()),
    "generator": lambda m: m.parameters(),
    "named generator": lambda m: m.named_parameters(),
    "other generator": lambda m: (p for p in m.parameters()),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("elements", "block_size", "error_correction"),
    [(9_999_999, 128, True), (10_000_000, 256, True), (99_999_999, 256, True), (100_000_000, 512, False)],
)
def test_the_config_follows_the_models_size(elements, block_size, error_correction, source):
    given = Optimizer8BitConfig(block_size=64, lr=3e-4, error_correction=not error_correction)
    before = copy.copy(given)
    adjusted = adjust_config_for_model_size(given, SOURCES[source](model_of(elements)))
    expected = Optimizer8BitConfig(block_size=block_size, lr=3e-4, error_correction=error_correction)
    assert (adjusted, given) == (expected, before)


@pytest.mark.parametrize("source", ["list", "generator", "named generator"])
def test_counting_leaves_the_parameters_to_the_optimizer(source):
    model = nn.Linear(4, 4)
    params = SOURCES[source](model)
    config = adjust_config_for_model_size(Optimizer8BitConfig(), params)
    optimizer = Automagic_CameAMP_8Bit(params, **config.__dict__)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


# training


class Regression(nn.Module):
    """Returns its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        error = (self.layer(x) - (x if y is None else y)).square().mean()
        return {"loss": error}


def batches(n: int = 2) -> list[Tensor]:
    return list(torch.randn(n, 8, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("epochs", "in_fp32"), [(8, 2), (7, 1), (3, 0)])
def test_states_are_quantized_after_a_quarter_of_the_epochs(epochs, in_fp32):
    seen = []

    def train_epoch(model: nn.Module, optimizer: Any, dataloader: list[Tensor]) -> None:
        for x in dataloader:
            model(x)["loss"].backward()
            optimizer.step()
        seen.append("exp_avg_codes" in optimizer.state[model.layer.weight])

    model = Regression()
    optimizer = progressive_quantization_training(model, batches(), epochs, train_epoch)
    assert seen == [False] * in_fp32 + [True] * (epochs - in_fp32)
    assert int(optimizer.state[model.layer.weight]["step"]) == 2 * epochs  # one optimizer all the way
    assert (optimizer.config.block_size, optimizer.config.error_correction) == (128, True)


def test_the_momentum_survives_the_change():
    momenta = []

    def train_epoch(model: nn.Module, optimizer: Any, dataloader: list[Tensor]) -> None:
        if optimizer.config.quantize_states:
            momenta.append(optimizer.quantized_states[1]["exp_avg"].dequantize())
        else:
            model(dataloader[0])["loss"].backward()
            optimizer.step()
            momenta.append(optimizer.state[model.layer.weight]["exp_avg"].clone())

    progressive_quantization_training(Regression(), batches(), 4, train_epoch)
    assert 0 < (momenta[1] - momenta[0]).norm() < 0.01 * momenta[0].norm()


@pytest.mark.parametrize(
    "form", [lambda x: {"x": x}, lambda x: (x, x), lambda x: x], ids=["mapping", "tuple", "tensor"]
)
def test_without_an_own_epoch_the_models_loss_is_stepped_on(form):
    model = Regression()
    config = Optimizer8BitConfig(lr=1e-3, warmup_steps=0)
    loss = float(model(batches()[0])["loss"].detach())
    progressive_quantization_training(model, [form(x) for x in batches()], 20, config=config)
    assert float(model(batches()[0])["loss"].detach()) < 0.9 * loss


def test_a_model_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="Linear returned no loss, got Tensor; pass your own train_epoch"):
        progressive_quantization_training(nn.Linear(64, 64), batches(), 1)


def adapted(losses: list[float], block_size: int = 512) -> AdaptiveOptimizer:
    weight = nn.Parameter(torch.ones(64, 512))
    adaptive = AdaptiveOptimizer([weight], Optimizer8BitConfig(block_size=block_size))
    for loss in losses:
        adaptive.step_with_adaptation(loss + 1e-3 * (weight - weight.detach()).sum())
    return adaptive


@pytest.mark.parametrize(
    ("losses", "block_size"),
    [
        ([1.0] * 100 + [1.2] * 99, 512),  # nothing to compare with yet
        ([1.0] * 100 + [1.2] * 100, 256),
        ([1.0] * 100 + [1.05] * 100, 512),
        ([1.2] * 100 + [1.0] * 100, 512),
        ([1.0] * 100 + [1.2] * 100 + [1.2] * 100, 256),
        ([1.0] * 100 + [1.2] * 100 + [1.5] * 100, 128),
        ([1.0] * 100 + [1.2] * 100 + [1.5] * 100 + [2.0] * 100, 128),
    ],
    ids=lambda value: len(value) if isinstance(value, list) else value,
)
def test_a_worse_loss_halves_the_live_blocks(losses, block_size):
    adaptive = adapted(losses)
    (state,) = adaptive.optimizer.state.values()
    assert adaptive.base_config.block_size == adaptive.optimizer.config.block_size == block_size
    assert state["exp_avg_scale"].shape == (64, 512 // block_size)
    assert int(state["step"]) == len(losses)
    assert adaptive.performance_history == pytest.approx(losses[-200:])


def test_adapting_leaves_the_callers_config_alone():
    config = Optimizer8BitConfig()
    AdaptiveOptimizer([nn.Parameter(torch.ones(2))], config).base_config.block_size = 64
    assert config == Optimizer8BitConfig()


def test_the_shipped_strategy_is_the_seeds_and_is_consulted():
    shapes = [torch.Size(shape) for shape in ((100, 100), (100, 101), (400, 256), (1000, 1001))]
    strategy = CustomQuantizationStrategy()
    assert [strategy.should_quantize("w", shape, "full") for shape in shapes] == [False, True, True, True]
    assert [strategy.get_block_size(shape) for shape in shapes] == [128, 128, 256, 512]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = Automagic_CameAMP_8Bit(params, quantization_strategy=strategy)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert list(optimizer.quantized_states) == [1, 2, 3]
    scales = [states["exp_avg"].fields["scale"].shape for states in optimizer.quantized_states.values()]
    assert scales == [(100, 1), (400, 1), (1000, 2)]


# monitors


def test_the_memory_monitor_steps_and_logs_now_and_then(caplog):
    model, optimizer = make()
    monitor = MemoryMonitor(optimizer, log_frequency=2)
    before = model.lora_A.weight.detach().clone()
    with caplog.at_level(logging.INFO, "hf_automagic.seeds"):
        losses = [monitor.step(lambda: model.lora_A(torch.ones(512)).square().mean()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.lora_A.weight, before)
    stats = optimizer.get_memory_stats()
    words = "{}: {:.2f} MB quantized, {:.2f} MB in high precision, {:.2f}% of the same states in fp32"
    held = stats["total_quantized_memory"] / 2**20, stats["total_high_precision_memory"] / 2**20
    expected = [words.format(f"step {n}", *held, 100 * stats["compression_ratio"]) for n in (2, 4)]
    assert caplog.messages == expected


def test_a_steady_run_leaks_nothing():
    model, optimizer = make()
    run(model, optimizer, 2)
    first = check_memory_leak(optimizer)
    run(model, optimizer, 5)
    assert check_memory_leak(optimizer) == first
    assert first["optimizer_memory"] == optimizer.memory_stats().total_bytes
    assert first["gpu_memory"] == (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)


def test_quantization_quality_tells_coarse_blocks_from_fine_ones():
    errors = {}
    for block_size in (64, 4096):
        model, optimizer = make(block_size=block_size, momentum_scales=(1, 5))
        run(model, optimizer, 3)
        errors[block_size] = check_quantization_quality(optimizer)
    assert {(number, *named) for number, named in errors[64].items()} == {
        (i, "exp_avg", "exp_avg_k5") for i in (A, B, CONV)
    }
    assert 0.002 < errors[64][A]["exp_avg"] < errors[4096][A]["exp_avg"] < 0.02


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_the_rates_of_every_parameter_are_read(granularity):
    model, optimizer = make(lr_granularity=granularity, sync_frequency=1000)
    run(model, optimizer, 20)
    rates = monitor_learning_rates(optimizer)
    assert list(rates) == [A, B, SHIFT, CONV]
    for number, group in ((A, 0), (CONV, -1)):
        applied, found = float(optimizer.param_groups[group]["effective_lr"]), rates[number]
        assert (found["min"] < applied < found["max"]) == (granularity == "element")
        assert found["min"] <= found["mean"] <= found["max"]
        if granularity == "tensor":
            assert found["mean"] == pytest.approx(applied)


def test_monitors_work_on_any_automagic():
    param = nn.Parameter(torch.ones(64, 128))
    optimizer = Automagic([param])
    param.grad = torch.randn(64, 128)
    optimizer.step()
    assert check_quantization_quality(optimizer)[0]["exp_avg"] > 0
    assert monitor_learning_rates(optimizer)[0]["mean"] == pytest.approx(optimizer.get_learning_rates()[0])
    dashboard = TrainingDashboard(optimizer)
    dashboard.update(1)
    assert dashboard.metrics["memory_usage"] == [optimizer.memory_stats().total_bytes]


# dashboard


def test_the_dashboard_fills_four_plots(tmp_path):
    model, optimizer = make()
    dashboard = TrainingDashboard(optimizer)
    for step in range(3):
        run(model, optimizer, 1, first=step)
        dashboard.update(10 * step)
    figure = dashboard.plot_metrics(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert len(figure.axes) == 4
    for axes, (name, values) in zip(figure.axes, dashboard.metrics.items(), strict=True):
        (line,) = axes.lines
        assert list(line.get_xdata()) == [0, 10, 20], name
        assert list(line.get_ydata()) == values, name
        assert axes.get_title()
    stats = optimizer.get_memory_stats()
    assert dashboard.metrics["compression_ratio"] == [stats["compression_ratio"]] * 3
    assert dashboard.metrics["learning_rates"][0] < dashboard.metrics["learning_rates"][-1]
    assert all(0.002 < error < 0.02 for error in dashboard.metrics["quantization_errors"])


def test_the_dashboard_touches_no_display(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # what would pick a display
    dashboard = TrainingDashboard(Automagic([nn.Parameter(torch.ones(3))]))
    dashboard.update(0)
    assert len(dashboard.plot_metrics().axes) == 4
