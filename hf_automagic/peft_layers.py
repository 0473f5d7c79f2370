"""What the layers of a model say about its parameters: PEFT's tuners, hand-written LoRA, plain modules."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .optim.roles import Role

LORA_FACTORS = {
    "lora_A": Role.LORA_A,
    "lora_B": Role.LORA_B,
    "lora_embedding_A": Role.EMBEDDING_A,
    "lora_embedding_B": Role.EMBEDDING_B,
}
MAGNITUDE = "lora_magnitude_vector"
# Factors that start at one (IA3 2205.05638, BOFT 2311.06243, RoAd 2409.00119, PEFT's PSOFT): decay fades the model.
SCALES_FROM_ONE = frozenset({"ia3_l", "boft_s", "road_alpha", "vector_a", "vector_b"})
# The children through which PEFT's classes hold the model that they adapt; all other children are the adapter's own.
WRAPPED = frozenset({"base_model", "model", "base_layer", "original_module", "token_adapter", "word_embeddings"})


@dataclasses.dataclass(frozen=True, eq=False)
class NamedRole:
    """What is known of one trainable parameter.

    Args:
        name: as in `model.named_parameters()`, without the parts that torch.compile, FSDP, DDP and checkpointing add.
        param: the parameter.
        role: what it is to the model.
        adapter: the adapter's name, empty outside PEFT.
        module: path of the layer that it belongs to.
        rank: of a LoRA factor, 0 elsewhere.
        scaling: what the adapter's forward multiplies BA with, alpha / r or alpha / sqrt(r); 0.0 elsewhere.
        pair: number shared by A and B of one product BA; -1 where there is no such product of trainable factors.
        is_full_weight: whether it steps at a pretrained weight's rate; a bias or norm does as its module.
        decays: whether weight decay makes sense.
    """

    name: str
    param: nn.Parameter
    role: Role
    adapter: str = ""
    module: str = ""
    rank: int = 0
    scaling: float = 0.0
    pair: int = -1
    is_full_weight: bool = False
    decays: bool = True


Modules = list[tuple[str, nn.Module]]
Claims = Iterator[tuple[NamedRole, str]]


def claim_parameters(modules: Modules) -> Claims:
    """Yields what each layer knows of a parameter, and the product BA that it is a factor of (empty without one).

    Several layers may speak of one parameter; the first knows best. A claim has neither name nor pair number yet.

    Args:
        modules: (path, module) of the whole model.
    """
    if sys.modules.get("peft"):  # else nobody built a tuner layer, and its import's seconds are spared
        yield from _tuner_layers(modules)
        yield from _saved_modules(modules)
        yield from _beside_the_model(modules)
    yield from _written_pairs(modules)
    for path, module in modules:
        for leaf, param in module.named_parameters(recurse=False):
            yield NamedRole("", param, _kind(module, leaf, param), module=path, is_full_weight=True), ""


def _tuner_layers(modules: Modules) -> Claims:
    """What PEFT's tuner layers declare as theirs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in modules:
        if isinstance(layer, BaseTunerLayer):
            for name in dict.fromkeys(layer.adapter_layer_names):
                for adapter, item in _adapters(getattr(layer, name, None)):
                    yield from _adapter_item(path, layer, name, adapter, item)


def _adapter_item(path: str, layer: nn.Module, name: str, adapter: str, item: Any) -> Claims:
    """What one adapter keeps under one name of a tuner layer: a parameter or a module."""
    for owner, leaf, param in _owned_parameters(item):
        if leaf in ("", "weight") and name in LORA_FACTORS:
            yield _lora_factor(path, layer, name, adapter, item, param)
        elif leaf in ("", "weight") and name == MAGNITUDE:
            yield NamedRole("", param, Role.MAGNITUDE, adapter, path), ""
        else:
            role = _adapter_role(owner, leaf or name, param)
            yield NamedRole("", param, role, adapter, path, decays=not {name, leaf} & SCALES_FROM_ONE), ""


def _lora_factor(
    path: str, layer: nn.Module, name: str, adapter: str, item: Any, param: nn.Parameter
) -> tuple[NamedRole, str]:
    role, rank, scaling = LORA_FACTORS[name], int(_of(layer, "r", adapter)), float(_of(layer, "scaling", adapter))
    # The product of the factors is not the update in block-diagonal variants, grouped convolutions, stacks of experts.
    is_plain = isinstance(item, (nn.Parameter, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    is_plain = is_plain and param.shape[1 if role.is_lora_B else 0] == rank
    if hasattr(layer, "lora_E"):  # AdaLoRA, 2303.10512: B diag(E) A, and what it calls scaling is alpha
        is_plain, scaling = False, scaling / max(rank, 1)
    product = f"{path} {adapter} {name[:-1]}" if is_plain else ""
    return NamedRole("", param, role, adapter, path, rank, scaling), product


def _saved_modules(modules: Modules) -> Claims:
    """The copies that modules_to_save trains: a head counts as new, an embedding or a norm as pretrained."""
    from peft.utils import ModulesToSaveWrapper

    for path, wrapper in modules:
        if isinstance(wrapper, ModulesToSaveWrapper):
            for adapter, copy in wrapper.modules_to_save.items():
                is_pretrained = isinstance(copy, nn.Embedding) or _is_norm(copy)
                for owner, leaf, param in _owned_parameters(copy):
                    kind = _kind(owner, leaf, param)
                    role = Role.NEW if kind is Role.FULL else kind
                    yield NamedRole("", param, role, adapter, path, is_full_weight=is_pretrained), ""


def _beside_the_model(modules: Modules) -> Claims:
    """What PEFT's classes own beside the model they wrap: prompt encoders, adaption prompts, X-LoRA's classifier."""
    for path, module in modules:
        if type(module).__module__.partition(".")[0] != "peft":
            continue
        for leaf, param in module.named_parameters(recurse=False):
            yield NamedRole("", param, _adapter_role(module, leaf, param), module=path), ""
        for name, child in module.named_children():
            for adapter, item in _adapters(child) if name not in WRAPPED else ():
                for owner, leaf, param in _owned_parameters(item):
                    yield NamedRole("", param, _adapter_role(owner, leaf, param), adapter, path), ""


def _written_pairs(modules: Modules) -> Claims:
    """Hand-written siblings `lora_A` and `lora_B`, modules with a weight or bare parameters, and their `scaling`."""
    for path, module in modules:
        own = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
        factors = own.get("lora_A"), own.get("lora_B")
        weights = [getattr(factor, "weight", factor) for factor in factors]
        shapes = [weight.shape for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim >= 2]
        if len(shapes) != 2:
            continue
        rank, scaling = shapes[0][0], getattr(module, "scaling", 1.0)
        product = f"{path} lora_" if shapes[1][1] == rank else ""
        for factor, role in zip(factors, (Role.LORA_A, Role.LORA_B), strict=True):
            for owner, leaf, param in _owned_parameters(factor):
                if leaf in ("", "weight"):
                    yield NamedRole("", param, role, "", path, rank, float(scaling)), product
                else:
                    yield NamedRole("", param, _adapter_role(owner, leaf, param), "", path), ""


def _kind(owner: nn.Module | None, leaf: str, param: nn.Parameter) -> Role:
    """Tells a pretrained parameter's role from the module that owns it and its name there."""
    if _is_norm(owner) and param.ndim <= 1:
        return Role.NORM
    if leaf.endswith("bias") and param.ndim <= 1:
        return Role.BIAS
    return Role.EMBEDDING if isinstance(owner, nn.Embedding) else Role.FULL


def _adapter_role(owner: nn.Module | None, leaf: str, param: nn.Parameter) -> Role:
    kind = _kind(owner, leaf, param)
    return kind if kind in (Role.BIAS, Role.NORM) else Role.ADAPTER


def _is_norm(module: nn.Module | None) -> bool:
    return "Norm" in type(module).__name__  # LayerNorm, LlamaRMSNorm, GroupNorm, BatchNorm2d, MambaRMSNormGated


def _adapters(container: Any) -> Iterator[tuple[str, Any]]:
    """Yields (adapter, item) of a tuner's dict of adapters, or ("", item) where there is no dict."""
    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
        yield from container.items()
    elif container is not None:
        yield "", container


def _owned_parameters(item: Any) -> Iterator[tuple[nn.Module | None, str, nn.Parameter]]:
    """Yields (owner, name at the owner, parameter) of a module; a bare parameter has no owner and no name."""
    if isinstance(item, nn.Parameter):
        yield None, "", item
    elif isinstance(item, nn.Module):
        for module in item.modules():
            for leaf, param in module.named_parameters(recurse=False):
                yield module, leaf, param


def _of(layer: nn.Module, table: str, adapter: str) -> float:
    """Returns an adapter's number from a tuner layer's table, 0 without one."""
    values = getattr(layer, table, None)
    return values.get(adapter, 0) if isinstance(values, Mapping) else 0
