"""Claims about tools from PyPI: where one is installed, its own code builds our optimizer and steps with it.

Each runs in a process of its own, since tools change what they import, and is skipped where the tool cannot be
imported; none of them is among our test dependencies.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.processes import run_python
from tests.tiny_runs import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow

LLAMAFACTORY = """
import hf_automagic
from llamafactory.train.tuner import run_exp
run_exp({
    "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
    "lora_target": "q_proj,v_proj", "dataset": "tiny", "dataset_dir": ".", "template": "empty", "cutoff_len": 16,
    "output_dir": "out", "max_steps": 2, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 2,
    "optim": "automagic_8bit", "optim_args": "max_lr=5e-4", "report_to": "none", "use_cpu": True, "bf16": False,
    "preprocessing_num_workers": 1, **json.loads(sys.argv[1]),
})
look("out/checkpoint-2")
"""

SWIFT = """
import glob
from pathlib import Path
from swift import sft_main
Path("plugin.py").write_text("import hf_automagic.integrations.swift")
options = {
    "model": "model", "model_type": "llama", "template": "default", "dataset": "chat.jsonl", "max_length": 32,
    "external_plugins": "plugin.py", "optimizer": "automagic_8bit", "optim_args": "max_lr=5e-4", "tuner_type": "lora",
    "lora_rank": 4, "max_steps": 2, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 2,
    "output_dir": "out", "report_to": "none", "torch_dtype": "float32", "use_cpu": "true", "check_model": "false",
    "dataloader_num_workers": 0, "gradient_checkpointing": "false",
}
line = [word for name, value in options.items() for word in ("--" + name, str(value))]
sft_main([*line, "--target_modules", "q_proj", "v_proj"])
(checkpoint,) = glob.glob("out/*/checkpoint-2")
look(checkpoint)
"""

AXOLOTL = """
import os
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
import datasets
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import normalize_config, prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from tests.tiny_runs import sentences, tiny_adapter, tiny_tokenizer
config = DictDefault(
    base_model="model", plugins=["hf_automagic.integrations.axolotl.AutomagicPlugin"], optimizer="automagic_8bit",
    optim_args={"max_lr": 5e-4}, learning_rate=1e-4, adapter="lora", lora_r=4, lora_alpha=8, sequence_len=16,
    lora_target_modules=["q_proj", "v_proj"], micro_batch_size=2, gradient_accumulation_steps=1, max_steps=2,
    num_epochs=1, output_dir="out", save_steps=2, logging_steps=1, val_set_size=0, bf16=False, fp16=False, tf32=False,
    datasets=[{"path": "alpaca.json", "type": "alpaca"}], dataset_prepared_path="prepared", flash_attention=False,
    gradient_checkpointing=False, dataloader_num_workers=1, dataloader_prefetch_factor=2, dataloader_pin_memory=False,
)
prepare_plugins(config)
config = validate_config(
    config,
    capabilities={"bf16": False, "n_gpu": 0, "compute_capability": "", "fp8": False, "tf32": False},
    env_capabilities={"torch_version": "2.13.0"},
)
normalize_config(config)
PluginManager.get_instance().cfg = config
builder = HFCausalTrainerBuilder(config, tiny_adapter(), tiny_tokenizer(), None)
builder.train_dataset = datasets.Dataset.from_list([{**row, "attention_mask": [1] * 8} for row in sentences(16)])
trainer = builder.build(2)
trainer.train()
look("out/checkpoint-2")
seen["logs"] = "optim/lr_mean" in trainer.state.log_history[0]
"""

LIGHTNING = """
import hf_automagic, lightning, torch
from tests.tiny_runs import tiny_adapter, sentences

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.losses = tiny_adapter(), []

    def training_step(self, batch, number):
        loss = self.model(**batch).loss
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        return hf_automagic.create_automagic_optimizer(self.model, "automagic_coptim_8bit", max_lr=5e-4)

module = Module()
rows = [{name: torch.tensor(ids) for name, ids in row.items()} for row in sentences(8)]
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_steps=4, accelerator="cpu", **quiet)
trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
optimizer = trainer.optimizers[0]
count(optimizer.state_dict()["param_groups"])
history = torch.tensor(optimizer.c_optim.history().losses)
seen["losses"] = torch.allclose(history, torch.tensor(module.losses), rtol=1e-5)
"""

DIFFUSERS = """
import diffusers, hf_automagic, torch
from accelerate import Accelerator
from peft import LoraConfig
torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
    norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
unet.requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0", "conv1"]))
accelerator = Accelerator(cpu=True)
optimizer = hf_automagic.create_automagic_optimizer(unet, lr=1e-4, max_lr=5e-4)
unet, optimizer = accelerator.prepare(unet, optimizer)
schedule = diffusers.DDPMScheduler()
for _ in range(2):
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.randint(0, 1000, (2,))
    noisy = schedule.add_noise(clean, noise, steps)
    loss = torch.nn.functional.mse_loss(unet(noisy, steps, torch.randn(2, 4, 8)).sample, noise)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
count(optimizer.state_dict()["param_groups"])
"""

LOOK = """
import json, sys, torch
seen = {}

def count(groups):
    seen["roles"], seen["rails"] = [group["role"] for group in groups], sorted({group["max_lr"] for group in groups})
    seen["steps"] = int(groups[0]["counters"]["applied"])

def look(checkpoint):
    count(torch.load(checkpoint + "/optimizer.pt", weights_only=True)["param_groups"])

"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and eight rows of data in the forms that the tools read."""
    folder = tmp_path_factory.mktemp("tools")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    row = {"instruction": "w3 w4", "input": "", "output": "w5 w6 w7"}
    (folder / "alpaca.json").write_text(json.dumps([row] * 8))
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))
    turns = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    return folder


def run_tool(package: str, code: str, folder: Path, options: dict | None = None) -> dict:
    """Runs a tool's code with a tiny model, and returns what it saw; skips where the tool cannot be imported."""
    done = run_python(f"{LOOK}{code}\nprint('SEEN' + json.dumps(seen))", json.dumps(options or {}), cwd=folder)
    lacking = re.search(r"^(?:ImportError|ModuleNotFoundError): .*", done.stderr, flags=re.M)
    if done.returncode and lacking:
        pytest.skip(f"{package} cannot be imported: {lacking[0]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("SEEN")[2])


PAIR = ["lora_A", "lora_B"]


def test_llamafactory_trains_by_the_string(folder):
    assert run_tool("llamafactory", LLAMAFACTORY, folder) == {"roles": PAIR, "rails": [5e-4], "steps": 2}


def test_llamafactorys_lora_plus_takes_our_class_without_a_model(folder):
    options = {"loraplus_lr_ratio": 4.0, "output_dir": "plus"}
    code = LLAMAFACTORY.replace('look("out/', 'look("plus/')
    seen = run_tool("llamafactory", code, folder, options)
    assert (set(seen["roles"]), seen["steps"]) == ({"adapter"}, 2)


def test_ms_swift_trains_by_the_string_and_a_plugin_of_one_line(folder):
    assert run_tool("ms-swift", SWIFT, folder) == {"roles": PAIR, "rails": [5e-4], "steps": 2}


def test_axolotl_trains_with_the_plugin_and_logs_the_true_rate(folder):
    assert run_tool("axolotl", AXOLOTL, folder) == {"roles": PAIR, "rails": [5e-4], "steps": 2, "logs": True}


def test_lightnings_closures_step_and_show_their_losses(folder):
    assert run_tool("lightning", LIGHTNING, folder) == {"roles": PAIR, "rails": [5e-4], "steps": 4, "losses": True}


def test_a_lora_of_diffusers_on_linear_and_conv_layers_steps_through_accelerate(folder):
    assert run_tool("diffusers", DIFFUSERS, folder) == {"roles": PAIR, "rails": [5e-4], "steps": 2}
