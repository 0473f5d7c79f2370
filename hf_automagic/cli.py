"""The command `hf-automagic`."""

import argparse
import sys
from collections.abc import Sequence

from .registry import get_optimizer_info, list_optimizers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="hf-automagic", description="Self-tuning, 8-bit, LoRA-aware optimizers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    lister = commands.add_parser("list", help="show the optimizers and the options that make them")
    lister.add_argument("pattern", nargs="?", default="*", help="names with wildcards, such as 'automagic*'")
    lister.set_defaults(run=show_optimizers)
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
