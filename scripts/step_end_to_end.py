"""Whole training steps of a PEFT model, for benchmark_step.py: what share of them is the optimizer's."""

import argparse
import statistics
import time
from typing import Any

import torch
from step_rows import ROWS

ARMS = ("triton", "compile", "eager", "adamw_fused", "bnb_adamw8bit")
BATCH, LENGTH, WARM_UP = 4, 512, 3


def measure_training(options: argparse.Namespace, row: str) -> dict[str, Any]:
    """Trains a LoRA of rank 16 on random tokens; returns milliseconds a step and the memory at its peak."""
    torch.manual_seed(0)
    device = options.device
    model = build_model(options.end_to_end, device).to(device)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = ROWS[row].make(params)
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    tokens = torch.randint(5, min(1000, model.config.vocab_size), (BATCH, length), device=device)
    is_causal = "CausalLM" in type(model.get_base_model()).__name__
    labels = tokens if is_causal else torch.arange(BATCH, device=device) % model.config.num_labels
    totals, own = [], []
    for step in range(WARM_UP + options.steps):
        if device == "cuda" and step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        start = _now(device)
        model(input_ids=tokens, labels=labels).loss.backward()
        middle = _now(device)
        optimizer.step()
        end = _now(device)
        optimizer.zero_grad()
        if step >= WARM_UP:
            totals.append(end - start)
            own.append(end - middle)
    figures = {
        "wall_ms": 1e3 * statistics.median(own),
        "step_ms": 1e3 * statistics.median(totals),
        "share": 100 * statistics.median(o / t for o, t in zip(own, totals, strict=True)),
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
    }
    if device == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def build_model(name: str, device: str) -> Any:
    """Loads a folder's encoder, or makes a Llama of 1.1B parameters with random weights; adds adapters everywhere."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    if name == "llama-1b":
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
        )  # fmt: skip
        with torch.device(device):
            model, task = LlamaForCausalLM(config).to(torch.bfloat16), "CAUSAL_LM"
    else:
        model, task = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), "SEQ_CLS"
    return get_peft_model(model, LoraConfig(task_type=task, r=16, lora_alpha=32, target_modules="all-linear"))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
