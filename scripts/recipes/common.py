"""What the recipes share: random models, small enough for a minute of a laptop, and their data."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "old", "small", "young"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def causal_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of 0.2M weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def texts(count: int) -> list[str]:
    """Sentences of a toy language: article, adjective, noun, verb, article, noun."""
    generator = torch.Generator().manual_seed(0)
    choices = [WORDS[:2], WORDS[8:11], WORDS[2:5], WORDS[5:8], WORDS[:2], WORDS[2:5]]
    picks = torch.randint(6, (count, len(choices)), generator=generator).tolist()
    return [" ".join(words[i % len(words)] for words, i in zip(choices, row, strict=True)) for row in picks]


def rows(count: int) -> list[dict[str, list[int]]]:
    """The sentences as token ids, each its own label."""
    encode = tokenizer()
    return [{"input_ids": ids, "labels": ids} for ids in (encode(text)["input_ids"] for text in texts(count))]


def show(name: str, losses: list[float], optimizer: object) -> None:
    """Prints the losses and the rate really used, and fails where nothing was learnt."""
    head, tail = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    print(f"{name}: loss {head:.3f} -> {tail:.3f} in {len(losses)} steps; {optimizer.describe().splitlines()[0]}")
    if tail >= head:
        raise SystemExit(f"{name}: the loss did not fall")
