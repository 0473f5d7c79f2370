"""Live conversion: states change their form in the middle of a run, and checkpoints load whatever wrote them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..quantization import CODECS, Codec, Log16, QuantizationStrategy, WithFeedback, make_codec
from ..quantization.blocks import block_sizes, errors_by_block, largest_fitting
from ..transforms.core import StateSpec
from .distributed import whole
from .groups import group_config
from .storage import Layout, StoredState, codecs_of_group, store_states

BLOCK_SIZES = block_sizes(32, 4096)  # all that a config allows
SAMPLE = 2**20  # elements of a matrix that adaptive_block_size looks at


def convert_entry(state: dict[str, Tensor], stored: tuple[StoredState, ...], layout: Layout) -> bool:
    """Brings one parameter's entry of `optimizer.state` into the form in which its states are stored now, in place.

    Which form it had is read off the names, shapes and dtypes of its tensors. A state without tensors is left out: it
    starts anew.

    Returns:
        Whether anything was converted.

    Raises:
        ValueError: the tensors of a state fit no known form.
    """
    converted = False
    for wanted in stored:
        forms = list(_forms(wanted.spec))
        # in the same order on every rank, as those that are sharded are then joined one by one
        possible = dict.fromkeys(name for form in forms for name in form.fields(layout.rows, layout.cols))
        found = {name: torch.as_tensor(state[name]) for name in possible if name in state}
        if not found or _fits(found, wanted, layout):
            continue
        form = next((form for form in forms if _fits(found, form, layout)), None)
        if form is None:
            shapes = ", ".join(f"{name} {list(t.shape)} of {t.dtype}" for name, t in sorted(found.items()))
            raise ValueError(
                f"the saved {wanted.spec.name} of a parameter of shape {tuple(layout.shape)} has a form that no codec "
                f"writes: {shapes}; resume with the model that was trained, register the codec that wrote it, or, of "
                "a parameter that has been resized, take its entry out of optimizer.state"
            )
        values = _read({name: whole(tensor) for name, tensor in found.items()}, form, layout)
        fields = {name: field[0] for name, field in wanted.encode(values).items()}
        for name in found:
            del state[name]
        state |= fields
        converted = True
    return converted


def _forms(spec: StateSpec) -> Iterator[StoredState]:
    """Yields every way in which a state may have been stored."""
    yield StoredState(spec, None)
    if not spec.quantizes:
        return
    if spec.shape != "matrix":
        yield StoredState(spec, Log16())
        return
    for codec in (make_codec(name, size) for name in CODECS for size in BLOCK_SIZES):
        yield StoredState(spec, codec)
        yield StoredState(spec, WithFeedback(codec, 1))


def _fits(found: dict[str, Tensor], form: StoredState, layout: Layout) -> bool:
    fields = form.fields(layout.rows, layout.cols)
    return fields.keys() == found.keys() and all(
        tuple(found[name].shape) in (shape, layout.seen(shape)) and _holds(found[name].dtype, dtype, form.codec)
        for name, (shape, dtype) in fields.items()
    )


def _holds(found: torch.dtype, dtype: torch.dtype, codec: Codec | None) -> bool:
    """Whether a tensor's dtype is that of a form; a plain state may have been cast to another floating one."""
    return found == dtype or (codec is None and found.is_floating_point == dtype.is_floating_point)


def _read(found: dict[str, Tensor], form: StoredState, layout: Layout) -> Tensor:
    """Decodes one parameter's state, with the residual of error feedback given back  # [1, ...], float32"""
    fields = form.fields(layout.rows, layout.cols)
    stacked = {name: tensor.reshape(1, *fields[name][0]) for name, tensor in found.items()}
    values = form.decode(stacked, torch.float32)
    if isinstance(form.codec, WithFeedback):
        values = values + form.codec.residual(form.own(stacked))
    return values


class LiveStorage:
    """What an Automagic can change about its states in the middle of a run."""

    param_groups: list[dict[str, Any]]
    state: Any
    config: Any
    defaults: dict[str, Any]
    quantization_strategy: QuantizationStrategy | None
    _plan: Any
    _live_plan: Any

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the strategy in copies and pickles, beside what torch keeps."""
        return {**super().__getstate__(), "quantization_strategy": self.quantization_strategy}  # type: ignore[misc]

    def set_quantization(self, enabled: bool) -> None:
        """Switches 8-bit states on or off in all groups and converts what is there.

        A run may start in fp32, while momenta change fast, and go on in 8 bits.
        """
        self._change_storage({"quantize_states": enabled})

    def requantize(self, *, block_size: int | None = None, codec: str | None = None) -> None:
        """Changes the block size or the codec of all groups and converts what is there.

        Args:
            block_size: elements of a row that share a scale, a power of two; ends what `adaptive_block_size` chose.
            codec: name of the 8-bit code.

        Raises:
            TypeError: there is no such codec; the nearest name is given.
            ValueError: the block size is not allowed.
        """
        changes = {"block_size": block_size, "codec": codec}
        self._change_storage({name: value for name, value in changes.items() if value is not None})

    def adapt_block_sizes(self) -> list[int]:
        """Gives each quantised matrix the largest block whose error is below `block_error_target`; reads the device.

        Acts on groups with `adaptive_block_size`, in which every `sync_frequency`-th step calls it. The error is
        measured on the momenta as they are.

        Returns:
            The block size of each parameter of these groups, in order.
        """
        if self.state:
            self._live_plan()
        adapted = [group for group in self.param_groups if group["adaptive_block_size"]]
        chosen = [
            self._fitting_blocks(g, g.get("block_sizes") or [g["block_size"]] * len(g["params"])) for g in adapted
        ]
        if [group.get("block_sizes") for group in adapted] != chosen:
            self._plan = None
        for group, sizes in zip(adapted, chosen, strict=True):
            group["block_sizes"] = sizes
        return [size for sizes in chosen for size in sizes]

    def _adapt_when_due(self) -> None:
        """Chooses blocks anew in the steps that `sync_frequency` names, alike on every rank and after a resume."""
        steps = self.param_groups[0]["host_steps"]
        if any(group["adaptive_block_size"] and steps % group["sync_frequency"] == 0 for group in self.param_groups):
            self.adapt_block_sizes()

    def _fitting_blocks(self, group: dict[str, Any], present: list[int]) -> list[int]:
        """Returns the block size of each parameter; those without quantised momentum or gradient keep their own."""
        config = group_config(group)
        sizes = block_sizes(config.min_block_size, config.max_block_size)
        measured: dict[int, Tensor] = {}
        all_codecs = codecs_of_group(group, self.quantization_strategy)
        for i, (param, codecs) in enumerate(zip(group["params"], all_codecs, strict=True)):
            if self.state.get(param) and codecs.matrix is not None:
                stored = store_states(config, Layout.of(param.shape), codecs, group["is_full_weight"])[1]
                measured[i] = _errors(self.state[param], stored, Layout.of(param.shape), sizes)
        if not measured:
            return present
        table = torch.stack([errors.cpu() for errors in measured.values()]).tolist()
        found = {
            i: largest_fitting(errors, sizes, config.block_error_target)
            for i, errors in zip(measured, table, strict=True)
        }
        return [found.get(i) or size for i, size in enumerate(present)]

    def _change_storage(self, changes: dict[str, Any]) -> None:
        """Changes options of all groups at once, or, where one is refused, none."""
        for group in self.param_groups:
            codecs_of_group({**group, **changes}, self.quantization_strategy)
        self.config = self.config.replace(**changes)
        self.defaults |= changes
        for group in self.param_groups:
            group |= changes
            if "block_size" in changes:
                group.pop("block_sizes", None)
        self._plan = None
        if self.state:
            self._live_plan()


def _errors(state: dict[str, Tensor], stored: tuple[StoredState, ...], layout: Layout, sizes: list[int]) -> Tensor:
    """Measures on rows of a parameter's momenta, evenly spread, about `SAMPLE` elements  # [len(sizes)]"""
    every = max(1, layout.rows * layout.cols // SAMPLE)
    errors = []
    for momentum in stored:
        if momentum.codec is not None and momentum.spec.shape == "matrix":
            fields = momentum.fields(layout.rows, layout.cols)
            rows = {name: whole(state[name]).reshape(shape)[None, ::every] for name, (shape, _) in fields.items()}
            errors.append(errors_by_block(momentum.codec, momentum.own(rows), sizes))
    return torch.stack(errors).amax(0)
