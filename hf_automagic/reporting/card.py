"""The optimizer's section of a model card: what really stepped the model, at which rates, with which memory."""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import torch

from ..config import AutomagicConfig
from ..optim.automagic import Automagic
from ..registry import OptimizerInfo
from .plots import KINDS, PLOTS
from .snapshot import role_key
from .stats import FOLDER, RunRecord, write_atomically

START, END = "<!-- hf_automagic:start -->", "<!-- hf_automagic:end -->"
TAG = "hf_automagic"
PLOT_TITLES = {
    "learning_rates": "Learning rates by kind of parameter, with the rails and the schedule",
    "memory": "Memory of the optimizer state, beside Adam's",
    "events": "Multiplier of the context controller, and events",
    "effective_rank": "Effective rank of the adapters",
}


def update_card(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Writes the section into a model card in place of an older one, and adds the tags.

    `library_name`, `model-index` and all other metadata stay as they are. Where the card names the optimizer of the
    TrainingArguments, which a class handed to the Trainer overrides, the line is put right. Writing twice changes
    nothing.

    Args:
        path: the card, `README.md`.
        record: the run.
    """
    from huggingface_hub import RepoCard  # ModelCard would read model-index into its own form and write that

    path = Path(path)
    name = record.config["optimizer"]
    card = RepoCard(path.read_text(encoding="utf-8"))
    card.data["tags"] = _tags(card.data.get("tags"), name)
    card.text = insert_section(_name_optimizer(card.text, name), render_section(record, _drawn(path.parent)))
    write_atomically(path, str(card))  # a push in the background reads the old card or the new one


def start_card(path: str | os.PathLike[str], title: str) -> None:
    """Writes a card with a title alone, to which the section is then added.

    Args:
        path: the card, `README.md`.
        title: the model's name.
    """
    Path(path).write_text(f"# {title}\n", encoding="utf-8")


def insert_section(text: str, section: str) -> str:
    """Puts a section between the markers: where the older one stood, or at the end."""
    block = f"{START}\n{section.strip()}\n{END}"
    older = re.compile(rf"{START}.*?{END}", re.DOTALL)
    if older.search(text) is None:
        return f"{_without_markers(text).rstrip()}\n\n{block}\n"
    before, after = older.split(text, maxsplit=1)
    return _without_markers(before) + block + _without_markers(older.sub("", after))


def _without_markers(text: str) -> str:
    """Removes a marker that lost its partner."""
    return text.replace(f"{START}\n", "").replace(f"{END}\n", "").replace(START, "").replace(END, "")


def render_section(record: RunRecord, plots: Sequence[str] = ()) -> str:
    """Fills in the template `card_section.md`.

    Args:
        record: the run of an Automagic.
        plots: names of the plots that lie in `optimizer_stats/`.
    """
    last = record.rows[-1] if record.rows else {}
    # The light plots alone: they bring their own background, and a hub need not resolve the sources of a <picture>.
    images = [f"![{PLOT_TITLES[plot]}](./{FOLDER}/{plot}.png)" for plot in plots]
    filled = _template("card_section.md").substitute(
        name=record.config["optimizer"],
        sentence=_sentence(record.config),
        rates="\n".join(_rate_lines(record)),
        memory=_memory(record.config["memory"]),
        steps=_steps(last),
        events=_events(record.events),
        options=_options(record.config["options"]),
        plots="\n\n".join(images),
    )
    return re.sub(r"\n{3,}", "\n\n", filled)


def render_optimizer_card(info: OptimizerInfo, measured: Sequence[str] = ()) -> str:
    """Fills in the template `optimizer_card.md`: what a registered optimizer is, and what was measured of it.

    Args:
        info: its record.
        measured: sections in Markdown, each with its heading.
    """
    papers = [f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in info.papers]
    return _template("optimizer_card.md").substitute(
        name=info.name,
        description=info.description,
        options=_options(dict(info.options)),
        papers=", ".join(papers) or "none",
        state=_state_of_examples(info),
        measured="\n\n".join(section.strip() for section in measured) or "Nothing was measured by this name yet.",
    )


def _state_of_examples(info: OptimizerInfo) -> str:
    """Says the bytes an element of an adapter and of a full weight, as the optimizer itself predicts them."""
    examples = {"a LoRA of rank 16 on a": ("lora_A", (16, 4096)), "a full": ("full", (4096, 4096))}
    told = []
    for name, (role, shape) in examples.items():
        param = torch.nn.Parameter(torch.empty(shape, device="meta"))
        size = Automagic([{"params": [param], "role": role}], **info.options).memory_stats().bytes_per_parameter
        told.append(f"{size:.2f} bytes an element of {name} 4096 x 4096 weight")
    return f"{' and '.join(told)} (Adam in fp32: 8)"


def _template(name: str) -> Template:
    return Template(resources.files("hf_automagic.reporting").joinpath(name).read_text(encoding="utf-8"))


def _drawn(output_dir: Path) -> list[str]:
    return [name for name in PLOTS if (output_dir / FOLDER / f"{name}.png").is_file()]


def _tags(tags: str | Iterable[str] | None, name: str) -> list[str]:
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    kept = [tag for tag in tags if tag != TAG and not tag.startswith("optimizer:")]
    return [*kept, TAG, f"optimizer:{name}"]


def _name_optimizer(text: str, name: str) -> str:
    """Replaces what the Trainer's card says about the optimizer, a line or two after `- optimizer: Use`."""
    stock = re.compile(r"^- optimizer: Use .*(?:\n(?![-#\n]).*)*", re.MULTILINE)
    return stock.sub(f"- optimizer: {name}, see below", text)


def _sentence(config: dict[str, Any]) -> str:
    if not any(group["self_tuning"] for group in config["groups"]):
        return "The learning rate was the user's; the schedule acted on it as usual."
    searched = any(group["lr_search"] for group in config["groups"])
    schedule = config["training"].get("lr_scheduler_type")
    factor = f"the `{schedule}` schedule multiplied it" if schedule else "a schedule multiplies it"
    law = "was searched for between the rails" if searched else "followed from role, width and step below its rail"
    return f"The learning rate {law}; {factor}. In the logs, `learning_rate` is the schedule."


def _rails(group: dict[str, Any]) -> str:
    if not group["self_tuning"]:
        return "none"
    return f"{group['min_lr']:.3g} to {group['max_lr']:.3g}" if group["lr_search"] else f"{group['max_lr']:.3g}"


def _rate_lines(record: RunRecord) -> list[str]:
    """Writes a table line for each kind of parameter."""
    lines = []
    for kind, title in KINDS.items():
        groups = [
            g for g in record.config["groups"] if role_key(g["role"], g["is_full_weight"]) == kind and g["elements"]
        ]
        if groups:
            rails = sorted({_rails(group) for group in groups})
            rates = record.series(f"optim/lr_{kind}")[1]
            largest, last = (f"{max(rates):.3g}", f"{rates[-1]:.3g}") if rates else ("", "")
            elements = sum(g["elements"] for g in groups)
            lines.append(f"| {title} | {elements:,} | {', '.join(rails)} | {largest} | {last} |")
    return lines


def _memory(memory: dict[str, Any]) -> str:
    total = memory["total_bytes"]
    size = f"{total / 2**20:.2f} MB" if total >= 2**18 else f"{total / 2**10:.2f} KB"
    return (
        f"{size}, {memory['bytes_per_parameter']:.2f} bytes for each of {memory['parameters']:,} trained elements "
        f"(Adam in fp32: 8)"
    )


def _steps(last: dict[str, Any]) -> str:
    done, skipped = last.get("step"), last.get("optim/skipped_steps")
    if done is None:
        return "none logged"
    left_out = f", {skipped:.0f} of them left out because a gradient was not finite" if skipped else ", none left out"
    return f"{done:,}{left_out}"


def _events(events: list[dict[str, Any]]) -> str:
    counts = Counter(event["code"].lower().replace("_", " ") for event in events)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def _options(options: dict[str, Any]) -> str:
    """Lists what differs from the defaults of `optim="automagic_8bit"`."""
    changed = []
    for field in dataclasses.fields(AutomagicConfig):
        value = options.get(field.name, field.default)
        if not _equal(value, field.default):
            changed.append(f"`{field.name}={':'.join(map(str, value)) if isinstance(value, list | tuple) else value}`")
    return ", ".join(changed) or "the defaults"


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, float) and isinstance(default, int | float):
        return math.isclose(value, default)
    return (tuple(value) if isinstance(value, list) else value) == default
