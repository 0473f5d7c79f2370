"""Runs a script, a module or an installed command that does not import this package, with our `optim=` strings known.

```bash
python -m hf_automagic.run script.py --optim automagic_8bit
python -m hf_automagic.run -m package.module --optim automagic_8bit
python -m hf_automagic.run trl sft --config sft.yaml
accelerate launch -m hf_automagic.run script.py --optim automagic_8bit
```

The program sees the arguments, the import path, the exit status and the tracebacks that it would see without us, and
so do the Python processes that it starts: launchers start the training as one.
"""

import argparse
import difflib
import io
import os
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, TracebackType

CHILD_PROCESSES = str(Path(__file__).resolve().parent / "child_processes")
NOT_THE_PROGRAMS = {__file__, runpy.run_module.__code__.co_filename}  # whose frames open every traceback


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the arguments name as `__main__`.

    Args:
        argv: the arguments, by default the process'.
    """
    args = _parser().parse_args(argv)
    sys.argv = [args.program, *args.arguments]
    _reach_child_processes()
    _hide_our_frames()
    if args.module:
        runpy.run_module(args.program, run_name="__main__", alter_sys=True)
    elif os.path.isfile(args.program):  # a folder may have the name of a command
        _search_first(os.path.dirname(os.path.realpath(args.program)))
        _run_script(os.path.abspath(args.program))
    else:
        _run_command(args.program)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_automagic.run",
        description="Run a program with the optim= strings of hf_automagic known to transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="a script, a module after -m, or an installed command such as trl")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program gets")
    return parser


def _reach_child_processes() -> None:
    """Puts the folder with our `sitecustomize.py` on the import path of every Python process started from here."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != CHILD_PROCESSES]
    os.environ["PYTHONPATH"] = os.pathsep.join([CHILD_PROCESSES, *others])


def _hide_our_frames() -> None:
    """Lets tracebacks begin where the program does."""
    show = sys.excepthook

    def show_program(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in NOT_THE_PROGRAMS:
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = show_program


def _search_first(folder: str) -> None:
    """Puts the program's folder where `python -m` put the working directory, as Python does for a script."""
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11 and later, which then put nothing there
        sys.path[0] = folder


def _run_script(path: str) -> None:
    """Runs a file as Python does: `runpy.run_path` gives `sys.argv[0]` and `__file__` one form, Python gives two."""
    module = ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    exec(code, module.__dict__)


def _run_command(name: str) -> None:
    """Runs an installed command in this process."""
    commands = {command.name: command for command in metadata.entry_points(group="console_scripts")}
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        remedy = f"the nearest command is {near[0]!r}" if near else "a module needs -m before its name"
        sys.exit(f"python -m hf_automagic.run: {name!r} is neither a file nor an installed command; {remedy}")
    scripts = sysconfig.get_path("scripts")
    sys.argv[0] = shutil.which(name, path=scripts) or name
    _search_first(scripts)
    sys.exit(commands[name].load()())


if __name__ == "__main__":
    main()
