"""What is built, installed and imported is the package and nothing else."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.torch_only import make_torch_only_environment

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    build = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def package_files() -> set[str]:
    files = {path.relative_to(ROOT) for path in (ROOT / "hf_automagic").rglob("*") if path.is_file()}
    return {path.as_posix() for path in files if not any(part.startswith((".", "__pyc")) for part in path.parts)}


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"hf_automagic/py.typed", "hf_automagic/reporting/card_section.md"} <= names


def test_the_source_distribution_holds_no_tests_and_no_data(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # hatchling always adds .gitignore, which says what a build from here leaves out
    beside = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"}
    assert names == package_files() | beside


def test_the_wheel_requires_torch_alone(metadata: Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    without_extras = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert [str(r) for r in without_extras] == ["torch>=2.6"]


def test_the_wheel_names_its_licence_and_its_pythons(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"


def test_every_named_dependency_is_pinned(metadata: Message) -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = {r.name: r for r in map(Requirement, (line for line in lines if line and not line.startswith("#")))}
    named = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    for requirement in (r for r in named if r.name != "hf_automagic"):
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes its pin {pin}"


@pytest.mark.slow
def test_an_index_would_take_what_is_built(built: Path) -> None:
    pytest.importorskip("twine")
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_reference_is_built_from_the_docstrings_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    pytest.importorskip("transformers")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    script = run(sys.executable, ROOT / "scripts" / "api_reference.py", tmp_path, env=env)
    assert script.returncode == 0, script.stderr[-4000:]
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    assert {"hf_automagic", "hf_automagic/optim/automagic", "hf_automagic/config", "hf_automagic/trainer"} <= pages


STEP = """
import importlib.metadata, torch, hf_automagic
param = torch.nn.Parameter(torch.ones(8, 64))
before = param.detach().clone()
param.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
hf_automagic.Automagic([param]).step()
assert torch.isfinite(param).all() and not torch.equal(param, before)
assert hf_automagic.__version__ == importlib.metadata.version("hf_automagic")
print(hf_automagic.__file__)
"""


def test_the_wheel_without_extras_steps_and_has_its_command(wheel: Path, tmp_path: Path) -> None:
    python = make_torch_only_environment(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    installed = run(*pip)
    assert installed.returncode == 0, installed.stderr
    step = run(python, "-I", "-c", STEP)
    assert step.returncode == 0, step.stderr
    assert str(tmp_path) in step.stdout
    command = run(python.with_name("hf-automagic"), "--help")
    assert command.returncode == 0, command.stderr
    assert "usage: hf-automagic" in command.stdout


IMPORT = """
import sys, time
import {before}
before = set(sys.modules)
start = time.process_time()
import hf_automagic
seconds = time.process_time() - start
import torch
print([sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}), torch.cuda.is_initialized(), seconds])
"""
# where the user's script stands when it imports us; TrainingArguments itself takes seconds and brings peft
STARTS = ["torch, transformers", "torch, transformers.training_args"]


def import_after(start: str) -> tuple[set[str], bool, float]:
    """New top-level packages outside of the standard library, whether CUDA was touched, seconds of processor time."""
    imported = run(sys.executable, "-c", IMPORT.format(before=start), cwd=ROOT)
    assert imported.returncode == 0, imported.stderr
    tops, touched_cuda, seconds = ast.literal_eval(imported.stdout.splitlines()[-1])
    return set(tops) - set(sys.stdlib_module_names), touched_cuda, seconds


@pytest.mark.parametrize("start", STARTS)
def test_importing_brings_no_other_package_and_touches_no_cuda(start: str) -> None:
    packages, touched_cuda, _ = import_after(start)
    assert packages == {"hf_automagic"}
    assert not touched_cuda


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_importing_is_quick(start: str) -> None:
    seconds = min(import_after(start)[2] for _ in range(3))
    print(f"import hf_automagic after {start}: {seconds:.3f} s of processor time")
    assert seconds < 1.0  # goal 0.3; importing transformers.training_args takes 3


@pytest.mark.parametrize("script", ["scripts/test.sh", "scripts/demo.sh"])
def test_a_script_without_a_fitting_python_says_so(script: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    refused = run("bash", tmp_path / script, env={**os.environ, "PYTHON": "false"})
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: Python 3.10 or newer with its venv module is needed")
    assert not (tmp_path / ".venv").exists()
