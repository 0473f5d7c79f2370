"""The command `hf-automagic`."""

import argparse
import sys
from collections.abc import Sequence

from .checkpoint_report import diagnose
from .registry import get_optimizer_info, list_optimizers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="hf-automagic", description="Self-tuning, 8-bit, LoRA-aware optimizers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    lister = commands.add_parser("list", help="show the optimizers and the options that make them")
    lister.add_argument("pattern", nargs="?", default="*", help="names with wildcards, such as 'automagic*'")
    lister.set_defaults(run=show_optimizers)
    doctor = commands.add_parser("doctor", help="look at a checkpoint: is it whole, would it resume exactly")
    doctor.add_argument("checkpoint", help="a folder checkpoint-N, or an output folder, whose newest one is taken")
    doctor.set_defaults(run=show_diagnosis)
    args = parser.parse_args(argv)
    return args.run(args)


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


def show_diagnosis(args: argparse.Namespace) -> int:
    """Writes what a checkpoint holds; the status is 1 where it would not resume exactly."""
    try:
        diagnosis = diagnose(args.checkpoint)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(diagnosis.lines()) + "\n")
    return 0 if diagnosis.resumes_exactly else 1
