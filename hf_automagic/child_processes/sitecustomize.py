"""Imports hf_automagic in a child process of `python -m hf_automagic.run`, as soon as it imports transformers.

Python imports a module of this name when it starts. Nothing but transformers brings us in, so that other children
start as fast as ever; a sitecustomize of the user's own runs as it would without this one.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE_PARENT = os.path.dirname(os.path.dirname(HERE))


class BeforeTransformers(importlib.abc.MetaPathFinder):
    """Finds nothing, but imports hf_automagic when it is asked for transformers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Leaves every module to the other finders."""
        if fullname == "transformers":
            sys.meta_path.remove(self)
            import_package()
        return None


def import_package() -> None:
    """Imports hf_automagic, from where the parent did unless this process finds one; without torch nothing trains."""
    if importlib.util.find_spec("torch") is None:
        return
    is_found = importlib.util.find_spec("hf_automagic") is not None
    if not is_found:
        sys.path.append(PACKAGE_PARENT)
    importlib.import_module("hf_automagic")
    if not is_found:
        sys.path.remove(PACKAGE_PARENT)


def run_other_sitecustomize() -> None:
    """Runs the sitecustomize that this one stands in front of, if there is any."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]
sys.meta_path.insert(0, BeforeTransformers())
run_other_sitecustomize()
