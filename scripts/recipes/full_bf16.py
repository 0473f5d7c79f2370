"""A full fine-tune in bfloat16: no fp32 copy of the weights, steps are written with stochastic rounding.

python scripts/recipes/full_bf16.py
"""

import torch
from common import causal_model, rows, show
from transformers import TrainingArguments

from hf_automagic import AutomagicTrainer

args = TrainingArguments(
    "runs/full_bf16",
    optim="automagic_8bit",
    max_steps=60,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
trainer = AutomagicTrainer(model=causal_model(torch.bfloat16), args=args, train_dataset=rows(480))
trainer.train()
optimizer = trainer.optimizer.optimizer
show("full bf16", [log["loss"] for log in trainer.state.log_history if "loss" in log], optimizer)
print(f"{optimizer.memory_stats().bytes_per_parameter:.2f} bytes of state a weight; Adam in bf16 has 4, in fp32 8")
