"""Claims about the door: one import makes our names `optim=` strings, and what is saved loads without us.

What changes or watches the process (the enum, the import system, logging) runs in processes of its own.
"""

import pytest

from tests.processes import report

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CONFIGS = """
import contextlib, copy, dataclasses, io, os, pickle
from pathlib import Path
import hf_automagic
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames
import torch

name, out = "automagic_8bit", Path(sys.argv[1])
common = {"output_dir": str(out), "optim": name, "report_to": []}
args = TrainingArguments(**common)
seen["TrainingArguments"] = args.optim
seen["Seq2SeqTrainingArguments"] = Seq2SeqTrainingArguments(**common).optim
parser = HfArgumentParser(TrainingArguments)
line = ["--output_dir", str(out), "--optim", name, "--report_to", "none", "--optim_args", "max_lr=3e-4"]
seen["command line"] = parser.parse_args_into_dataclasses(line)[0].optim
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    parser.parse_args(["--help"])
seen["help"] = name if name in text.getvalue() else ""
(out / "a.json").write_text(json.dumps(common))
(out / "a.yaml").write_text(f"output_dir: {out}\\noptim: {name}\\nreport_to: none\\noptim_args: {{max_lr: 3.0e-4}}\\n")
seen["json"] = parser.parse_json_file(str(out / "a.json"))[0].optim
seen["yaml"] = parser.parse_yaml_file(str(out / "a.yaml"))[0].optim
seen["dict"] = parser.parse_dict(common)[0].optim
seen["to_dict"] = args.to_dict()["optim"]
seen["to_json_string"] = json.loads(args.to_json_string())["optim"]
seen["to_sanitized_dict"] = args.to_sanitized_dict()["optim"]
seen["set_optimizer"] = TrainingArguments(str(out)).set_optimizer(name=name).optim
seen["replace"] = dataclasses.replace(args).optim
seen["replace after pickle"] = dataclasses.replace(pickle.loads(pickle.dumps(args))).optim
seen["deepcopy"] = copy.deepcopy(args).optim
seen["pickle"] = pickle.loads(pickle.dumps(args)).optim
seen["attribute"] = OptimizerNames.AUTOMAGIC_8BIT
seen["item"] = OptimizerNames["AUTOMAGIC_8BIT"]
seen["iteration"] = next(member for member in OptimizerNames if member == name)
seen = {place: str(getattr(value, "value", value)) for place, value in seen.items()}
seen["types"] = [type(pickle.loads(pickle.dumps(args)).optim).__name__, type(args.optim).__name__]
torch.save(args, out / "training_args.bin")
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return report(CONFIGS, folder), folder


PLACES = [
    "TrainingArguments",
    "Seq2SeqTrainingArguments",
    "command line",
    "help",
    "json",
    "yaml",
    "dict",
    "to_dict",
    "to_json_string",
    "to_sanitized_dict",
    "set_optimizer",
    "replace",
    "replace after pickle",
    "deepcopy",
    "pickle",
    "attribute",
    "item",
    "iteration",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.matrix("T23")
def test_the_string_works_in_every_place(configs, place):
    assert configs[0][place] == "automagic_8bit"


def test_the_import_costs_neither_transformers_nor_cuda():
    code = """
import torch
before = set(sys.modules)
import hf_automagic
added = {module.partition(".")[0] for module in set(sys.modules) - before}
seen["heavy"] = sorted(added & {"transformers", "peft", "accelerate", "datasets", "matplotlib", "bitsandbytes"})
seen["cuda"] = torch.cuda.is_initialized()
"""
    assert report(code) == {"heavy": [], "cuda": False}


def test_the_package_works_without_transformers_and_peft():
    code = """
sys.modules["transformers"] = sys.modules["peft"] = None
import hf_automagic, torch
hf_automagic.register()
model = torch.nn.Linear(4, 4)
optimizer = hf_automagic.create_automagic_optimizer(model)
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
seen["groups"] = len(optimizer.param_groups)
hf_automagic.unregister()
"""
    assert report(code) == {"groups": 2}


SHAPE = """
def shape(t):
    ours = hf_automagic.list_optimizers()
    args = t.TrainingArguments("x", optim="came", report_to=[])
    wrapped = [t.Trainer.get_optimizer_cls_and_kwargs, t.Trainer.create_optimizer]
    originals = [getattr(method, "__wrapped__", None) for method in wrapped]
    return {
        "members": sorted(m.value for m in t.OptimizerNames if m.value in ours) == ours,
        "handlers": set(ours) <= set(getattr(t, "_OPTIMIZER_HANDLERS", ours)),
        "class": t.Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__,
        "static": isinstance(vars(t.Trainer)["get_optimizer_cls_and_kwargs"], staticmethod),
        "wrapped once": all(method is not None and not hasattr(method, "__wrapped__") for method in originals),
        "source": inspect.getsource(t.TrainingArguments).startswith("@dataclass"),
    }
"""
GOOD = {
    "members": True,
    "handlers": True,
    "class": "Automagic",
    "static": True,
    "wrapped once": True,
    "source": True,
}


def test_threads_race_the_import_and_a_plain_script_sees_each_banner_once():
    code = """
import contextlib, inspect, io, threading
import hf_automagic, torch
threads = [threading.Thread(target=hf_automagic.register) for _ in range(8)]
[thread.start() for thread in threads]
import transformers.trainer as t
[thread.join() for thread in threads]
args = t.TrainingArguments("x", optim="automagic_8bit", report_to=[], use_cpu=True)
with contextlib.redirect_stderr(io.StringIO()) as text:
    t.Trainer(torch.nn.Linear(4, 4), args).create_optimizer()
    ours = (hf_automagic.Automagic, {"lr": 1e-4})
    hf_automagic.AutomagicTrainer(torch.nn.Linear(3, 3), args, optimizer_cls_and_kwargs=ours).create_optimizer()
lines = "optim=automagic_8bit: lr 5e-05 from learning_rate", "12 trainable elements"
seen["banners"] = [text.getvalue().count(line) for line in lines]
seen["shape"] = shape(t)
"""
    assert report(SHAPE + code) == {"shape": GOOD, "banners": [1, 1]}


LATE_IMPORT = """
import inspect, threading
import torch, transformers.trainer as t

args = torch.load(sys.argv[1], weights_only=False)
seen["saved"] = {"optim": args.optim, "ours": [m for m in sys.modules if m.startswith("hf_automagic")]}
try:
    t.TrainingArguments("x", optim="automagic_8bit")
except ValueError:
    seen["saved"]["refused"] = True

WRAPPED = "get_optimizer_cls_and_kwargs", "create_optimizer"

def state():
    names = t.OptimizerNames
    return [
        [m.value for m in names], sorted(vars(names)), sorted(names._member_map_), sorted(names._value2member_map_),
        sorted(map(str, getattr(t, "_OPTIMIZER_HANDLERS", {}))), [type(finder).__name__ for finder in sys.meta_path],
        [hasattr(getattr(t.Trainer, method), "__wrapped__") for method in WRAPPED],
        isinstance(vars(t.Trainer)["get_optimizer_cls_and_kwargs"], staticmethod),
    ]

before = state()
import hf_automagic
seen["us last"] = shape(t)
threads = [threading.Thread(target=hf_automagic.register) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
seen["eight more times"] = shape(t)
hf_automagic.unregister()
seen["restored"] = state() == before
hf_automagic.register_optimizer(hf_automagic.OptimizerInfo("sgd", "Not that one."))
hf_automagic.register()
args = t.TrainingArguments("x", optim="sgd", report_to=[])
seen["sgd"] = t.Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__
hf_automagic.unregister()
hf_automagic.unregister()
seen["restored again"] = state() == before
"""


@pytest.fixture(scope="module")
def late_import(configs):
    """What a process saw that loaded transformers, and what `configs` saved, before this package."""
    return report(SHAPE + LATE_IMPORT, configs[1] / "training_args.bin")


@pytest.mark.matrix("T23")
def test_saved_arguments_load_where_we_are_not_installed(configs, late_import):
    assert configs[0]["types"] == ["str", "OptimizerNames"]
    assert late_import["saved"] == {"optim": "automagic_8bit", "ours": [], "refused": True}


@pytest.mark.matrix("T23")
def test_registering_is_idempotent_reversible_and_keeps_away_from_built_in_names(late_import):
    assert {place: seen for place, seen in late_import.items() if place != "saved"} == {
        "us last": GOOD,
        "eight more times": GOOD,
        "restored": True,
        "sgd": "SGD",
        "restored again": True,
    }
