"""Claims about `python -m hf_automagic.run`: a program that never heard of us knows our names, and notices nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_automagic
from hf_automagic.run import CHILD_PROCESSES

PACKAGE_PARENT = str(Path(hf_automagic.__file__).parents[1])
LAUNCHER = ("-m", "hf_automagic.run")

TELL_ALL = """
import json, multiprocessing, sys

def double(number):
    return 2 * number

def main():
    told = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "main": sys.modules["__main__"].__file__}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        told["doubled"] = pool.map(double, [21])
    print(json.dumps(told))
    return 7

if __name__ == "__main__":
    sys.exit(main())
"""
FAIL = "def fail():\n    raise KeyError('gone')\n\nfail()\n"
NAMES = (
    "import sys\n"
    "from transformers.training_args import OptimizerNames\n"
    "print(OptimizerNames('automagic_8bit').value, *sys.argv[1:])\n"
)
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
{NAMES}
sys.exit(child.wait())
"""


def python(*arguments: str | Path, cwd: Path, path: str = PACKAGE_PARENT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a script, a module in a package and an installed command, all the same program."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tell.py").write_text(TELL_ALL)
    (tmp_path / "scripts" / "fail.py").write_text(FAIL)
    (tmp_path / "scripts" / "names.py").write_text(NAMES)
    (tmp_path / "scripts" / "parent.py").write_text(PARENT)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "tell.py").write_text(TELL_ALL)
    installed = tmp_path / "tell_all-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tell_all\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\ntell-all=package.tell:main\n")
    (tmp_path / "tell-all").mkdir()  # a folder of the command's name, as where its source was checked out
    return tmp_path


@pytest.mark.parametrize("program", [("scripts/tell.py",), ("-m", "package.tell")], ids=["script", "module"])
def test_a_program_sees_what_it_would_see_without_us(folder: Path, program: tuple[str, ...]) -> None:
    arguments = [*program, "-m", "--optim", "automagic_8bit", "--help"]
    plain, ours = python(*arguments, cwd=folder), python(*LAUNCHER, *arguments, cwd=folder)
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr) == (7, "")
    assert json.loads(ours.stdout) == json.loads(plain.stdout)


def test_an_installed_command_runs_with_its_arguments_and_status(folder: Path) -> None:
    path = os.pathsep.join([PACKAGE_PARENT, str(folder)])
    ours = python(*LAUNCHER, "tell-all", "sft", "--config", "x.yaml", cwd=folder, path=path)
    assert ours.returncode == 7, ours.stderr
    told = json.loads(ours.stdout)
    assert told["argv"] == ["tell-all", "sft", "--config", "x.yaml"]
    assert told["path"] == os.path.dirname(sys.executable)


def test_a_traceback_begins_where_the_program_does(folder: Path) -> None:
    plain, ours = python("scripts/fail.py", cwd=folder), python(*LAUNCHER, "scripts/fail.py", cwd=folder)
    assert "KeyError: 'gone'" in plain.stderr
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


def test_what_does_not_exist_is_answered_with_the_nearest_command(folder: Path) -> None:
    answer = python(*LAUNCHER, "tell-al", cwd=folder, path=os.pathsep.join([PACKAGE_PARENT, str(folder)]))
    assert answer.returncode == 1
    assert answer.stderr == (
        "python -m hf_automagic.run: 'tell-al' is neither a file nor an installed command; "
        "the nearest command is 'tell-all'\n"
    )


def test_transformers_knows_our_names_in_the_program_and_in_a_process_it_starts(folder: Path) -> None:
    run = python(*LAUNCHER, "scripts/parent.py", "scripts/names.py", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["automagic_8bit", "automagic_8bit scripts/names.py"]


def test_a_child_that_leaves_transformers_alone_does_without_us(folder: Path) -> None:
    code = "import sys; print([n for n in ('torch', 'hf_automagic') if n in sys.modules], sys.path)"
    child = python("-c", code, cwd=folder, path=CHILD_PROCESSES)
    assert child.stdout.startswith("[] ")
    assert CHILD_PROCESSES not in child.stdout


def test_a_sitecustomize_of_the_users_own_still_runs(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text("print('mine')\n")
    path = os.pathsep.join([CHILD_PROCESSES, str(folder)])
    child = python("-c", "import sitecustomize; print(sitecustomize.__file__)", cwd=folder, path=path)
    assert child.stdout.splitlines() == ["mine", str(folder / "sitecustomize.py")]


ACCELERATE = ("launch", "--cpu", "--num_processes=1")
LAUNCHES = {
    "us inside accelerate": [
        "-m",
        "accelerate.commands.accelerate_cli",
        *ACCELERATE,
        *LAUNCHER,
        "scripts/names.py",
        "x",
    ],
    "accelerate inside us": [*LAUNCHER, "accelerate", *ACCELERATE, "scripts/names.py", "x"],
    "torchrun inside us": [*LAUNCHER, "torchrun", "--standalone", "--nproc-per-node=2", "scripts/names.py", "x"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_every_process_of_a_launcher_knows_our_names(folder: Path, launch: list[str]) -> None:
    pytest.importorskip("accelerate")
    run = python(*launch, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.splitlines()) == {"automagic_8bit x"}


@pytest.mark.slow
def test_the_command_line_of_trl_trains_with_a_name_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset

    from tests.tiny_runs import tiny_llama, tiny_tokenizer

    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    Dataset.from_list([{"text": "w3 w4 w5 w6"}] * 8).to_json(tmp_path / "data" / "train.jsonl")
    (tmp_path / "sft.yaml").write_text(
        "model_name_or_path: model\ndataset_name: data\noptim: automagic_8bit\nmax_steps: 2\nuse_cpu: true\n"
        "bf16: false\nlogging_steps: 1\nreport_to: none\noutput_dir: out\nuse_peft: true\nlora_r: 4\n"
        "lora_target_modules: [q_proj, v_proj]\nper_device_train_batch_size: 2\n"
    )
    run = python(*LAUNCHER, "trl", "sft", "--config", "sft.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "automagic_8bit" in run.stdout + run.stderr
