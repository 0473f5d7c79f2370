"""The optimizers that benchmark_step.py times, each with the reference whose way its weights have to go."""

import dataclasses
import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

RATE = 1e-3
Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer.

    Args:
        label: in the table.
        make: builds it.
        reference: builds what it has to equal, on the same device.
        tolerance: of the distance between both ways in fp32, relative to the reference's.
        needs: a module that has to be there.
        devices: where it runs.
    """

    label: str
    make: Maker
    reference: Maker
    tolerance: float
    needs: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def is_there(self, device: str) -> bool:
        """Whether it can run."""
        return device in self.devices and find_spec(self.needs) is not None


def _adamw(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, weight_decay=0.0, **options)


def _ours(params: list[torch.nn.Parameter], backend: str = "eager", **options: Any) -> torch.optim.Optimizer:
    from hf_automagic import Automagic

    return Automagic(params, backend=backend, **options)


def _bnb(params: list[torch.nn.Parameter], name: str = "AdamW8bit") -> torch.optim.Optimizer:
    import bitsandbytes.optim

    return getattr(bitsandbytes.optim, name)(params, lr=RATE, weight_decay=0.0)


def _torchao(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=RATE, weight_decay=0.0)


def _came(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from came_pytorch import CAME

    return CAME(params, lr=RATE)


def _adafactor(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=RATE, relative_step=False, scale_parameter=False)


def _prodigy(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params, lr=1.0)


def _flash(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(params, lr=RATE, weight_decay=0.0)


def _loop(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return _adamw(params, foreach=False, fused=False)


def _backend(name: str, **options: Any) -> Maker:
    return functools.partial(_ours, backend=name, **options)


_ELEMENT = {"lr_granularity": "element"}
_LOG16 = {"vector_precision": "log16"}
_EXACT, _CODED = 1e-3, 0.1  # of backends of one algorithm; of 8 bits against 32

ROWS = {
    "triton": Row("automagic_8bit, triton", _backend("triton"), _backend("eager"), _EXACT, "triton", ("cuda",)),
    "triton_balanced": Row(
        "balanced, triton", _backend("triton", **_ELEMENT), _backend("eager", **_ELEMENT), _EXACT, "triton", ("cuda",)
    ),
    "triton_aggressive": Row(
        "aggressive, triton", _backend("triton", **_LOG16), _backend("eager", **_LOG16), _EXACT, "triton", ("cuda",)
    ),
    "triton_norm": Row(
        "automagic_8bit with max_grad_norm, triton",
        _backend("triton", max_grad_norm=1.0),
        _backend("eager", max_grad_norm=1.0),
        _EXACT,
        "triton",
        ("cuda",),
    ),
    "compile": Row("automagic_8bit, compile", _backend("compile"), _backend("eager"), _EXACT),
    "eager": Row("automagic_8bit, eager", _backend("eager"), _backend("eager", quantize_states=False), _CODED),
    "adamw_fused": Row("torch AdamW fused", functools.partial(_adamw, fused=True), _loop, _EXACT),
    "adamw_foreach": Row("torch AdamW foreach", functools.partial(_adamw, foreach=True), _loop, _EXACT),
    "bnb_adamw8bit": Row("bitsandbytes AdamW8bit", _bnb, _loop, _CODED, "bitsandbytes"),
    "bnb_lion8bit": Row(
        "bitsandbytes Lion8bit", functools.partial(_bnb, name="Lion8bit"), functools.partial(_bnb, name="Lion"),
        _CODED, "bitsandbytes",
    ),
    "torchao_adamw8bit": Row("torchao AdamW8bit", _torchao, _loop, _CODED, "torchao"),
    "flash_adamw": Row("FlashAdamW", _flash, _loop, _CODED, "flashoptim", ("cuda",)),
    "came": Row("came-pytorch CAME", _came, _came, _EXACT, "came_pytorch"),
    "adafactor": Row("transformers Adafactor", _adafactor, _adafactor, _EXACT, "transformers"),
    "prodigy": Row("Prodigy", _prodigy, _prodigy, _EXACT, "prodigyopt"),
}  # fmt: skip
