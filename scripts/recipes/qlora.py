"""QLoRA: adapters in bfloat16 on a base in bitsandbytes' 4 bits; steps are written with stochastic rounding.

python scripts/recipes/qlora.py            # a GPU, or a CPU where bitsandbytes has 4 bits for it
"""

import tempfile

import torch
from common import causal_model, rows, show
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from hf_automagic import AutomagicTrainer

with tempfile.TemporaryDirectory() as folder:  # your model's name goes here
    causal_model().save_pretrained(folder)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map={"": device})
base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, adapters, autocast_adapter_dtype=False)
for param in model.parameters():
    if param.requires_grad:
        param.data = param.data.to(torch.bfloat16)
args = TrainingArguments(
    "runs/qlora",
    optim="automagic_8bit",
    optim_args="max_lr=5e-3",  # a random tiny model; leave it out for a pretrained one
    max_steps=30,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    bf16=True,
    use_cpu=device == "cpu",
)
trainer = AutomagicTrainer(model=model, args=args, train_dataset=rows(240))
trainer.train()
show("QLoRA", [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.optimizer.optimizer)
