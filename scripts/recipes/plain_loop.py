"""A plain PyTorch loop, without a Trainer.

python scripts/recipes/plain_loop.py
"""

import torch
from common import causal_model, rows, show

from hf_automagic import create_automagic_optimizer

model = causal_model()
optimizer = create_automagic_optimizer(model, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)  # multiplies the tuned rate
losses = []
data = torch.tensor([row["input_ids"] for row in rows(480)])
for batch in data.split(8):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step(loss=loss)
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
show("plain loop", losses, optimizer)
