"""Trains the two small bases that later tasks start from: a byte model on reviews, a conv net on upright digits."""

from pathlib import Path

import torch

from .tasks import TASKS

BASES = {"text.pt": ("text-scratch", 1500, 2e-3), "conv.pt": ("conv-scratch", 600, 1e-3)}


def pretrain(folder: Path, device: torch.device) -> None:
    """Trains each base with AdamW under a cosine and writes its weights."""
    for file, (name, steps, lr) in BASES.items():
        task = TASKS[name]
        model = task.build(folder, 0).to(device)
        train, test = (tuple(t.to(device) for t in part) for part in task.data(folder))
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
        draw = torch.Generator().manual_seed(0)
        for _ in range(steps):
            picked = torch.randint(len(train[0]), (32,), generator=draw).to(device)
            loss, _ = task.loss(model, tuple(t[picked] for t in train))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            held_out = task.loss(model, test)[0]
        print(f"{file}: held-out loss {float(held_out):.3f} after {steps} steps", flush=True)
        torch.save({k: v.cpu() for k, v in model.state_dict().items()}, folder / file)
