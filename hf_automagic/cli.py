"""The command `hf-automagic`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .checkpoint_report import diagnose
from .registry import get_optimizer_info, list_optimizers

COMPARED = ("automagic_8bit", "adamw_torch_fused", "adamw_8bit")
LENGTH = 1024  # of the sequences of an estimate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; what the user can mend is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="hf-automagic", description="Self-tuning, 8-bit, LoRA-aware optimizers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (FileNotFoundError, ImportError, TypeError, ValueError) as error:
        sys.stderr.write(f"hf-automagic: {error}\n")
        return 1


def add_list(commands: Any) -> None:
    """Adds `list`."""
    command = commands.add_parser("list", help="show the optimizers and the options that make them")
    command.add_argument("pattern", nargs="?", default="*", help="names with wildcards, such as 'automagic*'")
    command.set_defaults(run=show_optimizers)


def show_optimizers(args: argparse.Namespace) -> int:
    """Writes one line per optimizer; the status is 1 where no name matches."""
    names = list_optimizers(args.pattern)
    width = max(map(len, names), default=0)
    for name in names:
        info = get_optimizer_info(name)
        options = ", ".join(f"{option}={value}" for option, value in info.options.items()) or "the defaults"
        sys.stdout.write(f"{name.ljust(width)}  {info.description} ({options})\n")
    if not names:
        sys.stderr.write(f"no optimizer matches {args.pattern!r}; the names are: {', '.join(list_optimizers())}\n")
    return 0 if names else 1


def add_doctor(commands: Any) -> None:
    """Adds `doctor`."""
    command = commands.add_parser("doctor", help="look at a checkpoint: is it whole, would it resume exactly")
    command.add_argument("checkpoint", help="a folder checkpoint-N, or an output folder, whose newest one is taken")
    command.set_defaults(run=show_diagnosis)


def show_diagnosis(args: argparse.Namespace) -> int:
    """Writes what a checkpoint holds; the status is 1 where it would not resume exactly."""
    diagnosis = diagnose(args.checkpoint)
    sys.stdout.write("\n".join(diagnosis.lines()) + "\n")
    return 0 if diagnosis.resumes_exactly else 1


def add_plot(commands: Any) -> None:
    """Adds `plot`."""
    command = commands.add_parser("plot", help="draw the plots of a run anew from its optimizer_stats/")
    command.add_argument("folder", metavar="RUN", help="the run's output folder, or the optimizer_stats/ in it")
    command.set_defaults(run=redraw)


def redraw(args: argparse.Namespace) -> int:
    """Draws the plots into the folder of statistics, and writes their paths."""
    from .reporting.plots import draw_plots
    from .reporting.stats import RunRecord, stats_folder

    folder = stats_folder(args.folder)
    for path in draw_plots(RunRecord.read(folder), folder):
        sys.stdout.write(f"{path}\n")
    return 0


def add_estimate(commands: Any) -> None:
    """Adds `estimate`."""
    command = commands.add_parser("estimate", help="say before a run whether it fits the GPU, and what would")
    add = command.add_argument
    add("model", help="a model id, a folder with a config.json, or a config file; no weight is loaded")
    add("--peft", choices=["lora"], help="train adapters; without it, every weight")
    add("--r", type=int, default=16, help="rank of the adapters (%(default)s)")
    add("--target", default="all-linear", help="modules with adapters, with commas between (%(default)s)")
    add(
        "--base",
        default="bf16",
        choices=["fp32", "bf16", "8bit", "4bit"],
        help="how the weights are held (%(default)s)",
    )
    add("--optim", nargs="+", default=COMPARED, metavar="NAME", help=f"compared; yours first ({' '.join(COMPARED)})")
    add("--batch", type=int, default=1, help="sequences on a GPU at once (%(default)s)")
    add("--sequence-length", type=int, help=f"tokens of a sequence ({LENGTH}, or as many as the model reads)")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to hold few of them")
    add(
        "--gpu",
        type=float,
        default=_gpu_gib(),
        metavar="GIB",
        help="memory of the GPU (this machine's, if it has one)",
    )
    command.set_defaults(run=show_estimate)


def show_estimate(args: argparse.Namespace) -> int:
    """Writes what a run needs; the status is 0 whatever the verdict, as the question was answered."""
    from .estimator import TrainingPlan, describe_estimate
    from .estimator.meta_model import load_config, longest_sequence

    length: int | None = args.sequence_length
    plan = TrainingPlan(
        model=args.model,
        base=args.base,
        rank=args.r if args.peft else None,
        target=args.target,
        batch=args.batch,
        sequence_length=int(min(LENGTH, longest_sequence(load_config(args.model)))) if length is None else length,
        checkpointing=args.gradient_checkpointing,
    )
    sys.stdout.write(describe_estimate(plan, args.optim, args.gpu))
    return 0


def _gpu_gib() -> float | None:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


COMMANDS = (add_list, add_doctor, add_plot, add_estimate)
