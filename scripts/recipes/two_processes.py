"""An accelerate loop; every process must end with the same weights.

accelerate launch --multi_gpu --num_processes 2 scripts/recipes/two_processes.py
torchrun --nproc-per-node 2 scripts/recipes/two_processes.py    # CPUs, where accelerate's launcher starts only one
"""

import torch
from accelerate import Accelerator
from common import causal_model, rows, show
from torch.utils.data import DataLoader

from hf_automagic import create_automagic_optimizer

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
model = causal_model()
optimizer = create_automagic_optimizer(model)
data = DataLoader([{k: torch.tensor(v) for k, v in row.items()} for row in rows(480)], batch_size=8)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
losses = []
for batch in data:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
everyone = accelerator.gather(weights[None])
if not all(torch.equal(weights, other) for other in everyone):
    raise SystemExit("the processes have different weights")
if accelerator.is_main_process:
    show(f"{accelerator.num_processes} processes", losses, optimizer.optimizer)
