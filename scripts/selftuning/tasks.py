"""The tasks: a model, what of it is trained, batches that lie on the device, a held-out loss.

Batches have one shape all through a run, so that a whole step can be recorded.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to learn.

    Args:
        name: in tables and keys.
        build: makes the model of a seed, with what is trained requiring gradients  # (folder, seed)
        data: reads (train, held out), each a tuple of tensors with the same first axis  # (folder)
        loss: mean loss of a batch and, per example, whether the prediction is right  # (model, batch)
        new_modules: freshly initialised modules of a full fine-tune.
        batch_size: examples of a step.
    """

    name: str
    build: Callable[[Path, int], nn.Module]
    data: Callable[[Path], tuple[Batch, Batch]]
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    new_modules: tuple[str, ...] = ()
    batch_size: int = 32


# sentences


def _encoder(folder: Path, seed: int, labels: int, lora: bool) -> nn.Module:
    """MiniLM with a fresh head, whole or with adapters on every linear layer but the pooler."""
    model = copy.deepcopy(_bare_encoder(folder, labels))
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight, std=0.02)
    if not lora:
        return model
    return _with_lora(model, task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=["pooler.dense"])


@functools.cache
def _bare_encoder(folder: Path, labels: int) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder / "encoder")
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config).float()
    weights = torch.load(folder / "encoder.pt", weights_only=True)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, strict=False)
    nn.init.zeros_(model.classifier.bias)
    return model


def _with_lora(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **options))  # pyright: ignore[reportArgumentType]


def _sentences(folder: Path, name: str) -> tuple[Batch, Batch]:
    with np.load(folder / "arrays.npz") as arrays:
        parts = [[arrays[f"{name}_{part}_{field}"] for field in ("ids", "len", "y")] for part in ("train", "test")]
    train, test = (tuple(torch.from_numpy(array.astype(np.int64)) for array in part) for part in parts)
    return train, test


def _sentence_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, length, label = batch
    mask = (torch.arange(ids.shape[1], device=ids.device) < length[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits, label), logits.argmax(-1) == label


# bytes of a text


def _language_model(folder: Path, seed: int, base: str | None, lora: bool) -> nn.Module:
    """A Llama of four layers over bytes, fresh or from a base, whole or with adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **shape))
    if base is not None:
        model.load_state_dict(torch.load(folder / base, weights_only=True))
    return _with_lora(model, task_type="CAUSAL_LM", target_modules="all-linear") if lora else model


def _windows(folder: Path, text: str, width: int = 97, stride: int = 48) -> tuple[Batch, Batch]:
    """Cuts a text into windows; the last tenth is held out."""
    with np.load(folder / "arrays.npz") as arrays:
        stream = torch.from_numpy(arrays[text].astype(np.int64))
    cut = len(stream) * 9 // 10
    train, test = stream[:cut].unfold(0, width, stride), stream[cut:].unfold(0, width, width)
    return (train.contiguous(),), (test[:500].contiguous(),)


def _next_byte_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    (ids,) = batch
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), (logits.argmax(-1) == ids[:, 1:]).float()


# digits


class ConvNet(nn.Module):
    """Three convolutions over 8 x 8 images, and a linear head."""

    def __init__(self) -> None:
        """Initialises as torch does."""
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.third, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits  # [n, 10]"""
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(images))))))
        return self.head(x.flatten(1))


def _conv_net(folder: Path, seed: int, base: str | None, lora: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = ConvNet()
    if base is not None:
        model.load_state_dict(torch.load(folder / base, weights_only=True))
    if not lora:
        return model
    return _with_lora(model, target_modules=["second", "third"], modules_to_save=["head"])


def _digits(folder: Path, turned: bool) -> tuple[Batch, Batch]:
    """Digits under noise that is drawn once; turned and inverted they are a second task."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    draw = np.random.default_rng(0)
    order = draw.permutation(len(digits.target))
    images = digits.images[order] + draw.normal(0, 6, digits.images.shape)
    images = 16 - np.rot90(images, axes=(1, 2)) if turned else images
    x = torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1) / 8 - 1
    y = torch.from_numpy(digits.target[order]).long()
    return (x[500:], y[500:]), (x[:500], y[:500])


def _digit_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    images, label = batch
    logits = model(images)
    return F.cross_entropy(logits, label), logits.argmax(-1) == label


def _sentence_task(name: str, data: str, labels: int, lora: bool) -> Task:
    build = functools.partial(_encoder, labels=labels, lora=lora)
    new = () if lora else ("classifier",)
    return Task(name, build, functools.partial(_sentences, name=data), _sentence_loss, new)


def _text_task(name: str, text: str, base: str | None, lora: bool) -> Task:
    build = functools.partial(_language_model, base=base, lora=lora)
    return Task(name, build, functools.partial(_windows, text=text), _next_byte_loss)


def _digit_task(name: str, turned: bool, base: str | None, lora: bool) -> Task:
    build = functools.partial(_conv_net, base=base, lora=lora)
    return Task(name, build, functools.partial(_digits, turned=turned), _digit_loss)


TASKS = {
    task.name: task
    for task in (
        _sentence_task("movie-lora", "movie", 2, lora=True),
        _sentence_task("movie-full", "movie", 2, lora=False),
        _sentence_task("source-lora", "source", 4, lora=True),
        _sentence_task("topics-lora", "topics", 20, lora=True),
        _text_task("text-scratch", "reviews", None, lora=False),
        _text_task("text-full", "editorials", "text.pt", lora=False),
        _text_task("text-lora", "editorials", "text.pt", lora=True),
        _digit_task("conv-scratch", False, None, lora=False),
        _digit_task("conv-lora", True, "conv.pt", lora=True),
    )
}
