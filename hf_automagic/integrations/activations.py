"""Plays a training step on the meta device, and finds how many bytes a CUDA device would hold at the worst moment.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) add up what a transformer layer keeps for its backward pass. Here
the model's own code and autograd do the adding: tensors without data are made, kept and freed as the real ones are, so
that adapters, checkpointing, any attention and the logits in fp32 count as what they are. The kernels are those that
CUDA would take: autocast's dtypes, and fused attention, which keeps a log-sum-exp a row in place of the scores.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

# As autocast on CUDA: what computes in the lower precision, and what in fp32.
LOWERED = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
}
RAISED = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, Tensor.softmax}


def simulate_peak(
    model: nn.Module, inputs: Mapping[str, Any], compute_dtype: torch.dtype, *, checkpointing: bool = False
) -> int:
    """Returns the largest number of bytes held at once beside the model's own, gradients included.

    Args:
        model: on the meta device; its gradients are None before and after.
        inputs: of its forward, on the meta device.
        compute_dtype: of autocast; with float32 there is no autocast.
        checkpointing: whether the model's layers keep their inputs alone, and compute the rest twice.
    """
    cuda = _CudaKernels(compute_dtype)
    if checkpointing:
        recompute = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), cuda)}
        owner: Any = model
        owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
        if not all(p.requires_grad for p in model.parameters()):
            owner.enable_input_require_grads()  # as the Trainer and TRL do for adapters
    model.train()
    memory = _LiveBytes([*model.parameters(), *model.buffers()])
    with memory, _without_autocast_on_meta():
        with cuda:
            output = model(**inputs)
            loss = output["loss"] if "labels" in inputs else output[0].float().mean()
            del output
        torch.autograd.backward([loss])
    model.zero_grad(set_to_none=True)
    return memory.peak


@contextlib.contextmanager
def _without_autocast_on_meta() -> Iterator[None]:
    """Lets models switch autocast off on the meta device, which torch refuses, as it does to tell whether it is on.

    transformers does the one until 5.0, and asks the other since.
    """
    kept: tuple[Any, ...] = (torch.autocast, torch.is_autocast_enabled)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if device_type == "meta" else kept[0](device_type, *args, **kwargs)

    def is_autocast_enabled(*device_type: str) -> bool:
        return "meta" not in device_type and kept[1](*device_type)

    torch.autocast, torch.is_autocast_enabled = autocast, is_autocast_enabled  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = kept  # type: ignore[misc]


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in held:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1  # as of a batch without padding: "are all positions real?"
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


class _CudaKernels(TorchFunctionMode):
    """Makes operations on the meta device keep what autocast and fused attention on CUDA keep."""

    def __init__(self, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.compute_dtype != torch.float32 and (func in LOWERED or func in RAISED):
            dtype = self.compute_dtype if func in LOWERED else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda t: _cast(t, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Runs the kernel that `scaled_dot_product_attention` chooses on CUDA; the meta device would take the slow one."""
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
