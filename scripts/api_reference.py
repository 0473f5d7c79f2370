"""Builds the API reference from the docstrings into a folder; a warning of pdoc's is an error.

python scripts/api_reference.py FOLDER
"""

import argparse
import pkgutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import pdoc

import hf_automagic

# two plugins import the tools that they are for, and pdoc would import them with their folder
LEFT_OUT = {f"hf_automagic.integrations{module}" for module in ("", ".axolotl", ".swift")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes one page a module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pages are written")
    folder = parser.parse_args(arguments).folder
    for name in hf_automagic.__all__:  # pdoc sees a name only once it is there, some come when they are asked for
        setattr(hf_automagic, name, getattr(hf_automagic, name))
    modules = {module.name for module in pkgutil.walk_packages(hf_automagic.__path__, "hf_automagic.")} - LEFT_OUT
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pdoc's
        # where a package lists its public names pdoc leaves its modules out, elsewhere it finds them by itself
        warnings.filterwarnings("ignore", "The module specification .* adds a module named")
        pdoc.pdoc("hf_automagic", *sorted(modules), output_directory=folder)
    print(f"{len(list(folder.rglob('*.html')))} pages in {folder}")


if __name__ == "__main__":
    main()
