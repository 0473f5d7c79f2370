"""Compares what `hf-automagic estimate` promises with the peak that a CUDA device measures, for model_cards/memory.md.

    python scripts/benchmark_memory.py              # on a GPU: three runs of four steps, weights at random
    python scripts/benchmark_memory.py --redraw     # the table again, from the lines that are there

Models are made from configs, so that nothing is downloaded. The step is that of a Trainer with `bf16=True`.
"""

import argparse
import dataclasses
import gc
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_automagic import create_automagic_optimizer
from hf_automagic.estimator import TrainingPlan, estimate_memory

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
STEPS = 4  # the optimizer's state is there from the second on
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16}
HEAD = """# What the estimate promises and what a GPU measures

`python scripts/benchmark_memory.py`: Llama-like models with random weights, bf16 autocast, {optim}. The peak is
`torch.cuda.max_memory_allocated()` over {steps} steps; the estimate's rows for weights, gradients and optimizer state
are exact, the one for activations is simulated. CUDA itself is what the device holds beyond PyTorch's memory.
The optimizer held what was promised, to the byte, in {exact} of {runs} runs.

| run | weights | gradients | state | activations | promised peak | measured peak | difference | CUDA itself | run on |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---|
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One configuration: sizes of the model, and the plan beside it."""

    name: str
    sizes: Mapping[str, int]
    plan: Mapping[str, Any]

    def config(self) -> LlamaConfig:
        """Returns the model's config."""
        heads = self.sizes["num_attention_heads"]
        return LlamaConfig(
            vocab_size=32000, **self.sizes, num_key_value_heads=heads // 2, architectures=["LlamaForCausalLM"]
        )


LORA = {"rank": 16, "batch": 4, "sequence_length": 1024}
RUNS = [
    Run("0.3B, LoRA r=16, batch 4 x 1024", MEDIUM, LORA),
    Run("0.3B, LoRA r=16, batch 4 x 1024, checkpointing", MEDIUM, {**LORA, "checkpointing": True}),
    Run("0.1B, every weight, batch 8 x 512", SMALL, {"batch": 8, "sequence_length": 512}),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every run, writes the lines and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--redraw", action="store_true", help="write the table from the lines that are there")
    parser.add_argument("--optim", default="automagic_8bit", help="a registered optimizer")
    parser.add_argument("--output_dir", type=Path, default=CARDS, help="where lines and table go")
    options = parser.parse_args(arguments)
    lines = options.output_dir / "memory.jsonl"
    if not options.redraw:
        if not torch.cuda.is_available():
            parser.error("a CUDA device has to measure the peak, and torch finds none; --redraw needs none")
        options.output_dir.mkdir(parents=True, exist_ok=True)
        lines.write_text("")
        for run in RUNS:
            record = measure(run, options.optim)
            with lines.open("a") as file:  # one by one: what was measured stays where a later run fails
                file.write(f"{json.dumps(record)}\n")
    card = render([json.loads(line) for line in lines.read_text().splitlines()])
    lines.with_suffix(".md").write_text(card)
    print(card)


def measure(run: Run, optim: str) -> dict[str, Any]:
    """Trains a few steps, and returns the promised and the measured bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run.config().save_pretrained(folder)
        plan = TrainingPlan(folder, **run.plan)
        promise = estimate_memory(plan, [optim])
    gc.collect()  # the run before is tied to itself by hooks, and would count
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(run, plan)
    optimizer = create_automagic_optimizer(model, optim)
    tokens = torch.randint(0, 32000, (plan.batch, plan.sequence_length), device="cuda")
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    free, total = torch.cuda.mem_get_info()
    return {
        "name": run.name,
        "optim": optim,
        "steps": STEPS,
        "weights": promise.frozen_bytes + promise.trained_bytes,
        "gradients": promise.gradient_bytes,
        "state": promise.optimizer_bytes[optim],
        "activations": promise.activation_bytes,
        "promised": promise.allocated_bytes(optim),
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "measured_state": optimizer.memory_stats().total_bytes,
        "cuda": total - free - torch.cuda.memory_reserved(),
        **provenance(),
    }


def build(run: Run, plan: TrainingPlan) -> nn.Module:
    """Returns the model of a run on the GPU, as `from_pretrained(dtype=torch.bfloat16)` and PEFT would."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(run.config())
    torch.set_default_dtype(torch.float32)
    if plan.rank is not None:
        adapters = LoraConfig(r=plan.rank, target_modules=plan.target, task_type="CAUSAL_LM")  # type: ignore[arg-type]
        model = get_peft_model(model, adapters)
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """Lays the runs out as a table."""
    parts = ("weights", "gradients", "state", "activations", "promised", "measured")
    rows = [
        f"| {record['name']} | {' | '.join(mebibytes(record[part]) for part in parts)} "
        f"| {100 * (record['promised'] / record['measured'] - 1):+.1f}% | {mebibytes(record['cuda'])} "
        f"| {record['device']}, torch {record['torch']}, commit {record['commit']} |"
        for record in records
    ]
    first = records[0]
    exact = sum(record["measured_state"] == record["state"] for record in records)
    head = HEAD.format(optim=first["optim"], steps=first["steps"], exact=exact, runs=len(records))
    return head + "\n".join(rows) + "\n"


def mebibytes(size: int) -> str:
    """Writes a number of bytes."""
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
