"""The imports of every module obey the house: only downwards, others' private names only in integrations/."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_automagic"

# first name below hf_automagic -> layer; a module may import from its own layer and from those below
LAYERS = {
    "config": 0,
    "options": 0,
    "transforms": 1,
    "quantization": 1,
    "kernels": 2,
    "optim": 3,
    "registry": 4,
    "peft": 4,
    "peft_layers": 4,
    "seeds": 4,
    "factory": 5,
    "reporting": 5,
    "checkpoint": 5,
    "checkpoint_files": 5,
    "checkpoint_report": 5,
    "trainer": 6,
    "callbacks": 6,
    "estimator": 6,
    "integrations": 6,
    "__init__": 7,
    "child_processes": 7,
    "cli": 7,
    "run": 7,
}

# neighbours that must not know each other
STRANGERS = {("transforms", "quantization"), ("quantization", "transforms")}

# what a module may import beside torch and the standard library -> the lowest layer that may
LOWEST_LAYER = {
    "torch": 0,
    "bitsandbytes": 1,
    "triton": 2,
    "peft": 4,
    "accelerate": 5,
    "datasets": 5,
    "evaluate": 5,
    "huggingface_hub": 5,
    "matplotlib": 5,
    "numpy": 5,
    "safetensors": 5,
    "transformers": 5,
    "yaml": 5,
    "axolotl": 6,
    "swift": 6,
    "trl": 6,
}

# private by its first letter, but documented by torch among its foreach operations
DOCUMENTED_PRIVATE = {"torch._foreach_norm"}

# slow or often absent: imported by the function that needs them, never when a module is imported
ONLY_INSIDE_FUNCTIONS = {"bitsandbytes", "datasets", "evaluate", "matplotlib", "peft", "trl"}


@dataclass(frozen=True)
class Import:
    """One imported name, as a full dotted path."""

    target: str
    line: int
    runs_on_import: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def unit_of(dotted: str) -> str:
    """'hf_automagic.optim.bucket' -> 'optim'; names of the package itself belong to '__init__'."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def source_files() -> dict[str, str]:
    """Module -> source; a folder's `__init__` goes by the folder's name, the package's by `hf_automagic.__init__`."""
    return {module_name(path): path.read_text() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(tree: ast.Module, folder: str) -> Iterator[Import]:
    """Every import below a syntax tree, `import_module("name")` included. `folder` is what one leading dot means."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, runs = pending.pop()
        match node:
            case ast.Import(names=names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = folder.split(".")[: len(folder.split(".")) - level + 1] if level else []
                targets = [".".join([*base, *([module] if module else []), alias.name]) for alias in names]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                targets = [name]
            case _:
                targets = []
        yield from (Import(target, node.lineno, runs) for target in targets)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        pending.extend((child, runs and not inside) for child in ast.iter_child_nodes(node))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module, folder: str) -> Iterator[tuple[str, int]]:
    """Private names of other packages, imported or reached through an imported name."""
    foreign: set[str] = set()
    for found in imports(tree, folder):
        if found.top != PACKAGE and any(is_private(part) for part in found.target.split(".")):
            yield found.target, found.line
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops = {alias.name: alias.name.split(".")[0] for alias in node.names}
            foreign |= {alias.asname or tops[alias.name] for alias in node.names if tops[alias.name] != PACKAGE}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                yield ast.unparse(node), node.lineno


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the rules, one sentence each."""
    tree = ast.parse(source)
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    folder = module if is_folder else module.rpartition(".")[0]
    unit = unit_of(module)
    if module.split(".")[1] not in LAYERS:
        return [f"{module}: stands in no layer; add '{module.split('.')[1]}' to LAYERS"]
    layer = LAYERS[unit]
    found: list[tuple[int, str]] = []
    for item in imports(tree, folder):
        other = unit_of(item.target)
        if item.top == PACKAGE:
            if LAYERS[other] > layer:
                found.append((item.line, f"layer {layer} imports '{other}' of layer {LAYERS[other]}"))
            elif (unit, other) in STRANGERS:
                found.append((item.line, f"'{unit}' and '{other}' must not know each other"))
        elif item.top not in sys.stdlib_module_names:
            lowest = LOWEST_LAYER.get(item.top)
            if lowest is None:
                found.append((item.line, f"imports '{item.top}', which LOWEST_LAYER does not know"))
            elif layer < lowest:
                found.append((item.line, f"layer {layer} imports '{item.top}', allowed from layer {lowest}"))
            elif item.runs_on_import and item.top in ONLY_INSIDE_FUNCTIONS:
                found.append((item.line, f"imports '{item.top}' outside of a function"))
    if unit != "integrations":
        found += [
            (line, f"uses the private name '{name}'")
            for name, line in private_names(tree, folder)
            if name not in DOCUMENTED_PRIVATE
        ]
    return [f"{module}:{line}: {sentence}" for line, sentence in sorted(set(found))]


def same_layer_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Unit -> the other units of its layer that it imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        folder = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
        unit = unit_of(module)
        others = {unit_of(item.target) for item in imports(ast.parse(source), folder) if item.top == PACKAGE}
        graph.setdefault(unit, set()).update(o for o in others - {unit} if LAYERS[o] == LAYERS[unit])
    return graph


def test_imports_only_point_downwards() -> None:
    sources = source_files()
    assert len(sources) > 1
    found = [sentence for module, source in sources.items() for sentence in violations(module, source)]
    assert not found, "\n".join(found)


def test_neighbours_in_a_layer_form_no_circle() -> None:
    graphlib.TopologicalSorter(same_layer_graph(source_files())).prepare()


PLANTED = [
    ("optim.bucket", "from ..trainer import AutomagicTrainer", "layer 3 imports 'trainer' of layer 6"),
    ("optim.bucket", "from .. import factory", "layer 3 imports 'factory' of layer 5"),
    ("optim.bucket", "from .. import __version__", "layer 3 imports '__init__' of layer 7"),
    ("config", "import hf_automagic.optim.bucket", "layer 0 imports 'optim' of layer 3"),
    ("transforms.core", "def f():\n    from ..quantization.affine import encode", "must not know each other"),
    ("quantization.affine", "from ..transforms import chain", "must not know each other"),
    ("registry", "if TYPE_CHECKING:\n    import transformers", "layer 4 imports 'transformers', allowed from layer 5"),
    ("optim.memory", "from matplotlib import pyplot", "layer 3 imports 'matplotlib', allowed from layer 5"),
    ("optim.memory", "importlib.import_module('accelerate')", "layer 3 imports 'accelerate', allowed from layer 5"),
    ("reporting.plots", "import matplotlib.pyplot as plt", "imports 'matplotlib' outside of a function"),
    ("peft", "class A:\n    import peft", "imports 'peft' outside of a function"),
    ("reporting.plots", "import seaborn", "which LOWEST_LAYER does not know"),
    ("optim.bucket", "from torch.optim.optimizer import _use_grad", "private name 'torch.optim.optimizer._use_grad'"),
    ("optim.bucket", "import torch._dynamo", "private name 'torch._dynamo'"),
    ("optim.bucket", "import torch\ntorch._foreach_add_(a, b)", "private name 'torch._foreach_add_'"),
    ("trainer", "from transformers import Trainer as T\nT.args._x()", "private name 'T.args._x'"),
    ("novelty", "import torch", "stands in no layer"),
]

ALLOWED = [
    ("optim.bucket", "from ..transforms import core\nfrom .context import Context\nimport torch"),
    ("reporting.plots", "def draw():\n    import matplotlib.pyplot as plt\n    plt.__version__"),
    ("peft", "def walk():\n    from peft.tuners import tuners_utils"),
    ("integrations.transformers", "from transformers import trainer\ntrainer._x"),
    ("trainer", "from .callbacks import MemoryCallback\nself._x = 1"),
    ("__init__", "from . import integrations\nfrom .optim import Automagic"),
]


@pytest.mark.parametrize(("module", "source", "sentence"), PLANTED)
def test_a_planted_violation_is_found(module: str, source: str, sentence: str) -> None:
    assert any(sentence in found for found in violations(f"{PACKAGE}.{module}", source))


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_the_house_allows_passes(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_a_planted_circle_is_found() -> None:
    circle = {
        f"{PACKAGE}.factory": "from .reporting import snapshot",
        f"{PACKAGE}.reporting.snapshot": "def f():\n    import hf_automagic.factory",
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(same_layer_graph(circle)).prepare()


def test_the_package_imports_with_torch_alone(torch_only_python: Path) -> None:
    code = f"import {PACKAGE} as package; print(package.Automagic.__name__)"
    run = subprocess.run([torch_only_python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Automagic"


def test_that_environment_holds_no_optional_package(torch_only_python: Path) -> None:
    optional = sorted(LOWEST_LAYER.keys() - {"torch", "triton"})  # torch's CUDA builds bring triton
    code = f"import importlib.util; print([name for name in {optional} if importlib.util.find_spec(name)])"
    run = subprocess.run([torch_only_python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
