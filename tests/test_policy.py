"""What is stored in few bits is decided by the whole parameter's size, its role, its name, and the user's strategy."""

import builtins
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_automagic import Automagic, AutomagicConfig
from hf_automagic.quantization import (
    Affine,
    Codec,
    Dynamic,
    Log16,
    ParamInfo,
    Softsign,
    StateCodecs,
    WithFeedback,
    choose_codecs,
    dynamic,
    policy,
)
from hf_automagic.quantization.blocks import relative_error, unrounded


def chosen(shape: tuple[int, ...], role: str = "adapter", name: str = "layer.weight", **options: Any) -> StateCodecs:
    info = ParamInfo(name, torch.Size(shape), role, torch.device("cpu"))
    return choose_codecs(info, AutomagicConfig(**options))


@dataclasses.dataclass(frozen=True)
class Case:
    """A parameter, the options, and how its matrix and its vectors are stored."""

    name: str
    shape: tuple[int, ...]
    matrix: Codec | None
    vector: Codec | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    role: str = "adapter"


CASES = [
    Case("a large matrix", (64, 64), Softsign(128)),
    Case("one element too few", (63, 65), None),
    Case("a larger bound", (64, 64), None, options={"min_8bit_size": 4097}),
    Case("small, but asked for", (2, 3), Softsign(128), Log16(), options={"mixed_precision": False}),
    Case("a long vector", (100_000,), None, options={"mixed_precision": False}),
    Case("a column", (100_000, 1), None, options={"mixed_precision": False}),
    Case("a scalar", (), None, options={"mixed_precision": False}),
    Case("nothing at all", (0, 5000), None, options={"mixed_precision": False}),
    Case("fp32 states", (64, 64), None, options={"quantize_states": False}),
    Case("a conv kernel", (64, 32, 3, 3), Softsign(128)),
    Case("rank 8", (8, 4096), Softsign(128), Log16()),
    Case("rank 8, the other factor", (4096, 8), Softsign(128), Log16()),
    Case("rank 16", (16, 4096), Softsign(128)),
    Case("rank 8, vectors in fp32", (8, 4096), Softsign(128), options={"vector_precision": "fp32"}),
    Case("vectors in 16 bits", (64, 64), Softsign(128), Log16(), options={"vector_precision": "log16"}),
    Case("an embedding", (1000, 64), Softsign(128), role="embedding", options={"vector_precision": "log16"}),
    Case(
        "an embedding as bitsandbytes has it", (1000, 64), None, role="embedding", options={"embeddings_in_fp32": True}
    ),
    Case("no embedding", (1000, 64), Softsign(128), options={"embeddings_in_fp32": True}),
    Case("the seed's code", (64, 64), Affine(256), options={"codec": "affine", "block_size": 256}),
    Case("bitsandbytes' code", (64, 64), Dynamic(4096), options={"codec": "dynamic", "block_size": 4096}),
    Case(
        "feedback", (64, 64), WithFeedback(Softsign(128), 7), options={"error_correction": True, "sync_frequency": 7}
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_storage_follows_size_role_and_options(case: Case):
    assert chosen(case.shape, case.role, **case.options) == StateCodecs(case.matrix, case.vector)


def test_overrides_act_on_the_names_that_they_match():
    options = {"storage_overrides": {"*.lm_head.*": {"quantize_states": False}, "layers.0.*": {"block_size": 64}}}
    assert chosen((64, 64), name="model.lm_head.weight", **options) == StateCodecs()
    assert chosen((64, 64), name="layers.0.q_proj.weight", **options).matrix == Softsign(64)
    assert chosen((64, 64), name="layers.10.q_proj.weight", **options).matrix == Softsign(128)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"*": {"block_sise": 64}}, TypeError, "there is no storage option 'block_sise'; did you mean 'block_size'"),
        ({"*": {"lr": 1e-3}}, TypeError, "there is no storage option 'lr'"),
        ("*=fp32", ValueError, "storage_overrides must map name patterns to storage options, got '\\*=fp32'"),
        ({"*": {"block_size": 48}}, ValueError, "block_size must be a power of two from 32 to 4096, got 48"),
    ],
)
def test_a_bad_override_is_refused_at_the_door(overrides: Any, error: type[Exception], message: str):
    param = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(error, match=message):
        Automagic([("layer.weight", param)], storage_overrides=overrides)


def test_overrides_without_names_are_refused():
    with pytest.raises(
        ValueError, match=r"storage_overrides need the parameters' names; .* model.named_parameters\(\)"
    ):
        Automagic([torch.nn.Parameter(torch.zeros(64, 64))], storage_overrides={"*": {"block_size": 64}})


def test_an_unknown_codec_is_refused_at_the_door():
    with pytest.raises(TypeError, match="there is no codec 'afine'; did you mean 'affine'"):
        Automagic([torch.nn.Parameter(torch.zeros(64, 64))], codec="afine")


class SeedStrategy:
    """The first seed's example, with what it was asked."""

    def __init__(self, block_size: int = 512) -> None:
        self.asked: list[tuple[str, torch.Size, str]] = []
        self.block_size = block_size

    def should_quantize(self, param_name: str, param_shape: torch.Size, param_type: str) -> bool:
        self.asked.append((param_name, param_shape, param_type))
        return param_shape.numel() > 10_000

    def get_block_size(self, param_shape: torch.Size) -> int:
        return self.block_size if param_shape.numel() > 100_000 else 128


def stepped(params: list[torch.nn.Parameter], **options: Any) -> Automagic:
    optimizer = Automagic([(f"weight{i}", p) for i, p in enumerate(params)], **options)
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    return optimizer


def test_a_strategy_decides_for_each_parameter():
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(200, 1024), (200, 100), (100, 100)]]
    strategy = SeedStrategy()
    optimizer = stepped(params, quantization_strategy=strategy, min_8bit_size=1_000_000)
    scales = [optimizer.state[p]["exp_avg_scale"].shape for p in params[:2]]
    assert scales == [(200, 2), (200, 1)]
    assert "exp_avg" in optimizer.state[params[2]]
    assert ("weight1", torch.Size((200, 100)), "adapter") in strategy.asked


def test_a_strategys_block_size_is_checked():
    with pytest.raises(ValueError, match="block_size must be a power of two from 32 to 4096, got 100"):
        Automagic([torch.nn.Parameter(torch.zeros(500, 500))], quantization_strategy=SeedStrategy(100))


def test_groups_may_differ():
    params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    groups = [
        {"params": params[:1], "codec": "affine"},
        {"params": params[1:2], "quantize_states": False},
        {"params": params[2:]},
    ]
    optimizer = Automagic(groups)
    for param in params:
        param.grad = torch.randn(64, 64)
    optimizer.step()
    kinds = [{key.removeprefix("exp_avg_") for key in optimizer.state[p] if key.startswith("exp_avg")} for p in params]
    vectors = {"sq_row", "sq_col", "res_row", "res_col"}
    assert kinds == [{"codes", "scale", "zero"} | vectors, {"exp_avg"} | vectors, {"codes", "scale"} | vectors]


# adaptive block sizes

TARGET = 0.0065


def smooth_and_spiky() -> list[torch.nn.Parameter]:
    """Two matrices whose gradients are alike everywhere, and alike but for one element in a hundred."""
    return [torch.nn.Parameter(torch.zeros(16, 2048)) for _ in range(2)]


def feed(optimizer: Automagic, params: list[torch.nn.Parameter], steps: int) -> None:
    spikes = torch.where(torch.arange(16 * 2048).view(16, 2048) * 7919 % 100 == 0, 30.0, 1.0)
    for _ in range(steps):
        for param, spread in zip(params, (1.0, spikes), strict=True):
            param.grad = torch.randn(16, 2048) * spread
        optimizer.step()


def test_each_matrix_gets_the_largest_block_that_meets_the_target():
    params = smooth_and_spiky()
    options = {
        "betas": (0.9, 0.999, 0.9999),
        "adaptive_block_size": True,
        "sync_frequency": 10,
        "lr": 0.0,
        "min_lr": 0.0,
    }
    optimizer = Automagic(params, **options, max_block_size=512, block_error_target=TARGET, clip_threshold=100.0)
    torch.manual_seed(0)
    feed(optimizer, params, 9)
    assert [optimizer.state[p]["exp_avg_scale"].shape[1] for p in params] == [16, 16]
    feed(optimizer, params, 2)
    chosen_sizes = optimizer.param_groups[0]["block_sizes"]
    assert [optimizer.state[p]["exp_avg_scale"].shape[1] for p in params] == [2048 // size for size in chosen_sizes]
    assert chosen_sizes == [expected_size(momentum) for momentum in true_momenta()]
    assert len(set(chosen_sizes)) == 2


def true_momenta() -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = smooth_and_spiky()
    options = {"betas": (0.9, 0.999, 0.9999), "lr": 0.0, "min_lr": 0.0, "clip_threshold": 100.0}
    optimizer = Automagic(params, **options, quantize_states=False)
    feed(optimizer, params, 10)
    return [optimizer.state[p]["exp_avg"][None] for p in params]


def expected_size(momentum: torch.Tensor) -> int:
    fitting = [size for size in (64, 128, 256, 512) if relative_error(Softsign(size), momentum) <= TARGET]
    return max(fitting, default=64)


@pytest.mark.parametrize("codec", [Softsign, Affine, Dynamic])
@pytest.mark.parametrize("size", [64, 128, 512])
def test_the_error_found_on_rounded_values_is_the_true_one(codec: Any, size: int):
    values = torch.randn(1, 64, 1024).pow(3)
    rounded = codec(128).encode(values)
    true = float(relative_error(codec(size), values))
    assert float(relative_error(codec(size), unrounded(codec(128), rounded))) == pytest.approx(true, rel=0.1)


def test_what_has_no_gradient_yet_keeps_its_blocks():
    params = smooth_and_spiky()
    optimizer = Automagic(params, adaptive_block_size=True, sync_frequency=1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.param_groups[0]["block_sizes"] == [128, 128]


# bitsandbytes missing


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (dynamic.dynamic_table, dynamic._kernel, dynamic._midpoints, dynamic._gaps, policy.find_problem)
    true_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return true_import(name, *args, **kwargs)

    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("without_bitsandbytes")
def test_without_bitsandbytes_its_states_are_fp32_said_once_and_counted(caplog: pytest.LogCaptureFixture):
    params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)] + [torch.nn.Parameter(torch.zeros(7))]
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        optimizer = stepped(params, codec="dynamic")
    said = [r.getMessage() for r in caplog.records if "codec 'dynamic' cannot run on cpu" in r.getMessage()]
    assert len(said) == 1
    assert "pip install bitsandbytes" in said[0]
    assert optimizer.memory_stats().fallbacks == 3
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


def test_vectors_stay_in_fp32_where_their_code_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policy, "find_problem", lambda codec, device: "no frexp" if codec == "log16" else None)
    assert chosen((8, 1024)) == StateCodecs(Softsign(128), None, fell_back=True)
    with pytest.raises(RuntimeError, match="codec 'log16' cannot run on cpu: no frexp"):
        chosen((8, 1024), strict=True)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_strict_raises_where_a_codec_cannot_run():
    with pytest.raises(RuntimeError, match=r"codec 'dynamic' cannot run on cpu: .*pip install bitsandbytes"):
        Automagic([torch.nn.Parameter(torch.zeros(64, 64))], codec="dynamic", strict=True)


def test_nothing_falls_back_where_the_codec_runs():
    params = [torch.nn.Parameter(torch.zeros(64, 64))]
    optimizer = stepped(params, codec="dynamic", strict=True)
    assert optimizer.memory_stats().fallbacks == 0
    assert optimizer.state[params[0]]["exp_avg_codes"].dtype == torch.uint8
