"""DoRA: the magnitudes get no weight decay, and B may step faster (LoRA+).

python scripts/recipes/dora.py
"""

import torch
from common import causal_model, rows, show
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from hf_automagic import AutomagicTrainer

adapters = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
args = TrainingArguments(
    "runs/dora",
    optim="automagic_8bit",
    optim_args="loraplus_lr_ratio=4, max_lr=5e-3",
    weight_decay=0.01,
    max_steps=60,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
trainer = AutomagicTrainer(model=get_peft_model(causal_model(), adapters), args=args, train_dataset=rows(480))
trainer.train()
show("DoRA", [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.optimizer.optimizer)
