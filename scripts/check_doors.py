"""Checks the source tree of a tool, which is on git alone, for the names and calls that our door into it depends on.

    git clone https://github.com/kohya-ss/sd-scripts
    python scripts/check_doors.py sd-scripts

Looks for the lines, and runs the functions of theirs that meet an optimizer, taken out of their tree, with ours.
`DOORS` is the only place that holds what was found, where and when; tests/test_doors.py holds us to the same.
"""

import argparse
import ast
import dataclasses
import enum
import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hf_automagic


@dataclasses.dataclass(frozen=True)
class Door:
    """What one tool has, in words of its own source, and when it was last looked at.

    Args:
        tool: the name of its repository.
        repository: owner and name on GitHub.
        commit: that was checked.
        date: of that commit.
        lines: (file, text) pairs; the text stands in the file, apart from white space.
        edit: (file, old, new) where the tool knows a closed list of optimizers: what a user adds before `old`.
        trial: runs functions of theirs with an optimizer of ours, given the tree; raises where that fails.
    """

    tool: str
    repository: str
    commit: str
    date: str
    lines: tuple[tuple[str, str], ...]
    edit: tuple[str, str, str] | None = None
    trial: Callable[[Path], None] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a tree against its door; the status is 1 where something is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the tool's tree; its folder's name says which tool it is")
    parser.add_argument("--tool", choices=[door.tool for door in DOORS], help="the tool, where the folder's name lies")
    args = parser.parse_args(arguments)
    name = args.tool or args.path.resolve().name
    door = next((door for door in DOORS if door.tool == name), None)
    if door is None:
        parser.error(f"{name!r} is no tool that we know; name it: --tool {' | '.join(d.tool for d in DOORS)}")
    missing = missing_lines(door, args.path)
    for file, text in missing:
        print(f"{door.tool}: {file} lacks {text!r}; last seen at {door.repository}@{door.commit[:12]} of {door.date}")
    if missing:
        return 1
    if door.trial:
        door.trial(args.path)
    print(f"{door.tool}: {len(door.lines)} lines found" + (", its own code ran our optimizer" if door.trial else ""))
    return 0


def missing_lines(door: Door, tree: Path) -> list[tuple[str, str]]:
    """Returns the (file, text) pairs that the tree does not hold."""
    wanted = [*door.lines, *([door.edit[:2]] if door.edit else [])]
    return [(file, text) for file, text in wanted if squeeze(text) not in squeeze(read(tree / file))]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def squeeze(text: str) -> str:
    """Takes white space out, so that formatting does not count."""
    return "".join(text.split())


def definition(tree: Path, file: str, name: str, edit: tuple[str, str] = ("", ""), **names: Any) -> Any:
    """Takes one function or class out of a file of theirs and runs its definition alone, with the names it needs.

    Args:
        tree: of the tool.
        file: in it.
        name: of the function or class.
        edit: (old, new) where a user adds lines before what stands in the file.
        **names: modules and others that the definition uses.
    """
    old, new = edit
    body = ast.parse(read(tree / file).replace(old, new + old, 1)).body
    found = [node for node in body if getattr(node, "name", None) == name]
    names["__name__"] = "check_doors"
    exec(compile(ast.Module(body=found, type_ignores=[]), str(tree / file), "exec"), names)
    return names[name]


# The trials: an optimizer of ours in functions of theirs.


def lora_pair() -> list[torch.nn.Parameter]:
    """Two bare matrices with gradients, which is what these tools hand over of an adapter."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 320), (320, 16))]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def step(optimizer: torch.optim.Optimizer) -> None:
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    if any(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise SystemExit("a parameter did not move")


AI_TOOLKIT_EDIT = (
    "toolkit/optimizer.py",
    "    elif lower_type == 'automagic2':",
    "    elif lower_type == 'hf_automagic':\n"
    "        from hf_automagic import Automagic\n"
    "        optimizer = Automagic(params, lr=float(learning_rate), **optimizer_params)\n",
)
KOHYA_ARGS = ("max_lr=2e-3", "betas=(0.8,0.99,0.999)", "stochastic_rounding=True", "codec='softsign'")


def try_kohya(tree: Path) -> None:
    get_optimizer = definition(
        tree,
        "library/train_util.py",
        "get_optimizer",
        **{"ast": ast, "importlib": importlib, "torch": torch, "Tuple": tuple},
        logger=logging.getLogger("sd-scripts"),
    )
    args = argparse.Namespace(
        optimizer_type="hf_automagic.Automagic",
        optimizer_args=list(KOHYA_ARGS),
        learning_rate=1e-4,
        use_8bit_adam=False,
        use_lion_optimizer=False,
        fused_backward_pass=False,
        gradient_accumulation_steps=1,
    )
    groups = [{"params": dict(enumerate(lora_pair())).values(), "lr": 5e-5}]
    name, _, optimizer = get_optimizer(args, groups)
    step(optimizer)
    if name != "hf_automagic.optim.automagic.Automagic" or optimizer.param_groups[0]["max_lr"] != 2e-3:
        raise SystemExit(f"the loader made {name} with a rail of {optimizer.param_groups[0]['max_lr']}")


def try_ai_toolkit(tree: Path) -> None:
    file, *edit = AI_TOOLKIT_EDIT
    get_optimizer = definition(tree, file, "get_optimizer", tuple(edit), torch=torch)
    optimizer = get_optimizer(lora_pair(), "hf_automagic", learning_rate="1e-4", optimizer_params={"max_lr": 2e-3})
    step(optimizer)
    if f"{optimizer.get_avg_learning_rate():.1e}" != "1.0e-04":
        raise SystemExit(f"its progress bar would show {optimizer.get_avg_learning_rate():.1e}, not 1.0e-04")


def try_diffusion_pipe(tree: Path) -> None:
    read_rates = definition(tree, "train.py", "_get_automagic_lrs", torch=torch)
    optimizer = hf_automagic.Automagic(lora_pair(), lr=1e-4)
    step(optimizer)
    rates, mean = read_rates(optimizer)
    if len(rates) != 2 or not math.isclose(float(mean), optimizer.get_avg_learning_rate(), rel_tol=1e-6):
        raise SystemExit(f"its TensorBoard would show {float(mean)}, not {optimizer.get_avg_learning_rate()}")


def try_onetrainer(tree: Path) -> None:
    kinds = definition(tree, "modules/util/enum/Optimizer.py", "Optimizer", Enum=enum.Enum, torch=torch)
    optimizer = hf_automagic.Automagic([{"params": lora_pair(), "lr": 1e-4, "initial_lr": 1e-4, "name": "unet"}])
    step(optimizer)
    shown = kinds.PRODIGY.maybe_adjust_lrs({"unet": 1e-4}, optimizer)["unet"]
    if float(shown) != optimizer.get_learning_rates()[0]:
        raise SystemExit(f"its TensorBoard would show {float(shown)}, not {optimizer.get_learning_rates()[0]}")


DOORS = (
    Door(
        "sd-scripts",
        "kohya-ss/sd-scripts",
        "48d368fa557731ad0488c07304dfeba8c07910eb",
        "2026-02-16",
        (
            ("library/train_util.py", 'elif optimizer_type.endswith("8bit".lower()):'),
            ("library/train_util.py", 'key, value = arg.split("=")\nvalue = ast.literal_eval(value)'),
            ("library/train_util.py", 'optimizer_module = importlib.import_module(".".join(values[:-1]))'),
            ("library/train_util.py", "optimizer = optimizer_class(trainable_params, lr=lr, **optimizer_kwargs)"),
            ("library/train_util.py", 'if hasattr(optimizer, "train") and callable(optimizer.train):'),
            ("train_network.py", "lrs = lr_scheduler.get_last_lr()"),
        ),
        trial=try_kohya,
    ),
    Door(
        "ai-toolkit",
        "ostris/ai-toolkit",
        "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350",
        "2026-08-21",
        (
            ("jobs/process/BaseSDTrainProcess.py", "learning_rate = optimizer.get_avg_learning_rate()"),
            ("jobs/process/BaseSDTrainProcess.py", "learning_rate = optimizer.get_learning_rates()[0]"),
            ("jobs/process/BaseSDTrainProcess.py", 'prog_bar_string = f"lr: {learning_rate:.1e}"'),
            ("jobs/process/BaseSDTrainProcess.py", "torch.load(optimizer_state_file_path, weights_only=True)"),
            ("jobs/process/BaseSDTrainProcess.py", "group['initial_lr'] = previous_lrs[i]"),
        ),
        edit=AI_TOOLKIT_EDIT,
        trial=try_ai_toolkit,
    ),
    Door(
        "OneTrainer",
        "Nerogar/OneTrainer",
        "23df3832e8f213d64c337e39f9365ba46e99fed0",
        "2026-08-19",
        (
            ("modules/util/enum/Optimizer.py", 'optimizer.param_groups[i].get("effective_lr", lr)'),
            ("modules/util/NamedParameterGroup.py", "'params': list(group.parameters)"),
            ("modules/util/NamedParameterGroup.py", "'initial_lr': lr"),
            ("modules/util/create.py", "parameters = parameter_group_collection.parameters_for_optimizer(config)"),
        ),
        edit=(
            "modules/util/create.py",
            "        # SGD Optimizer\n        case Optimizer.SGD:",
            "        case Optimizer.AUTOMAGIC:\n"
            "            from hf_automagic import Automagic\n"
            "            optimizer = Automagic(parameters, lr=config.learning_rate)\n",
        ),
        trial=try_onetrainer,
    ),
    Door(
        "diffusion-pipe",
        "tdrussell/diffusion-pipe",
        "8f83dbf25d03219df705570ec03e62be04bc402f",
        "2026-08-20",
        (
            ("train.py", "lr = optimizer._get_lr(group, state)"),
            ("train.py", "lrs = torch.stack(lrs)"),
            ("train.py", "if optimizer.__class__.__name__ in ('Automagic', 'GenericOptim'):"),
            ("train.py", "return klass(param_groups, *args, **kwargs)"),
        ),
        edit=(
            "train.py",
            "        elif optim_type_lower == 'genericoptim':\n            from optimizers import generic_optim",
            "        elif optim_type_lower == 'hf_automagic':\n"
            "            from hf_automagic import Automagic as klass\n",
        ),
        trial=try_diffusion_pipe,
    ),
    Door(
        "axolotl",
        "axolotl-ai-cloud/axolotl",
        "067b021c8b87a9e5e380b9173c704cf7340e30f5",
        "2026-07-24",
        (
            ("src/axolotl/core/builders/base.py", 'training_args_kwargs["optim"] = self.cfg.optimizer'),
            ("src/axolotl/core/builders/base.py", 'training_args_kwargs["optim_args"] = optim_args'),
            ("src/axolotl/integrations/base.py", "def add_callbacks_post_trainer(\nself,"),
            ("src/axolotl/integrations/base.py", 'module_name, class_name = plugin_name.rsplit(".", 1)'),
            ("src/axolotl/utils/schemas/training.py", "optimizer: (str | CustomSupportedOptimizers) | None"),
        ),
    ),
)


if __name__ == "__main__":
    sys.exit(main())
