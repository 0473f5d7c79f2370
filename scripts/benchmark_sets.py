"""The sets of shapes that benchmark_step.py times."""

import torch

LLAMA = {"d": 4096, "kv": 1024, "ffn": 14336, "layers": 32}


def lora(rank: int, targets: str = "qkvogud") -> list[tuple[int, ...]]:
    """Llama-3-8B's adapters: A [rank, in] and B [out, rank] of the projections named by letter."""
    d, kv, ffn = LLAMA["d"], LLAMA["kv"], LLAMA["ffn"]
    sizes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "g": (d, ffn), "u": (d, ffn), "d": (ffn, d)}
    layer = [shape for t in targets for shape in ((rank, sizes[t][0]), (sizes[t][1], rank))]
    return layer * LLAMA["layers"]


def full_1b() -> list[tuple[int, ...]]:
    """TinyLlama-1.1B's weights."""
    d, kv, ffn, vocabulary = 2048, 256, 5632, 32000
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(vocabulary, d), *layer * 22, (d,), (vocabulary, d)]


def cpu_pairs() -> list[tuple[int, ...]]:
    """96 pairs of a small model's adapters."""
    return [shape for _ in range(96) for shape in ((16, 1024), (1024, 16))]


SETS = {
    "LORA": lambda: lora(16),
    "FULL1B": full_1b,
    "QV16": lambda: lora(16, "qv"),
    "LORA4": lambda: lora(4),
    "LORA64": lambda: lora(64),
    "CPU96": cpu_pairs,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_parameters(name: str, dtype: str, device: str) -> list[torch.nn.Parameter]:
    """Builds a set with gradients, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in SETS[name]():
        value = torch.randn(shape, generator=generator, device=device) * 0.02
        param = torch.nn.Parameter(value.to(DTYPES[dtype]))
        param.grad = (torch.randn(shape, generator=generator, device=device) * 1e-3).to(DTYPES[dtype])
        params.append(param)
    return params
