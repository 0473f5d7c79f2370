"""LoRA on the convolutions of a small image classifier, with the context controller and spatial terms.

    python scripts/recipes/conv_lora.py

The images are scikit-learn's 1,797 digits where it is installed, else squares and stripes.
"""

import torch
from common import show
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_automagic import create_automagic_optimizer


def images() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        labels = torch.arange(640) % 2
        stripes = torch.eye(8).repeat(2, 1)[:8] * 16
        return torch.stack([stripes if label else stripes.flip(0) for label in labels])[:, None] / 16, labels
    digits = load_digits()
    return torch.tensor(digits.images[:640], dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target[:640])


torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()
)
network.append(nn.Linear(16 * 64, 10))
model = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=["5"]))
optimizer = create_automagic_optimizer(model, "automagic_coptim_8bit", edge_suppression=True, spatial_awareness=True)
pixels, labels = images()
losses = []
for _ in range(2):
    for batch, wanted in zip(pixels.split(16), labels.split(16), strict=True):
        loss = nn.functional.cross_entropy(model(batch), wanted)
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(loss.item())
show("conv LoRA", losses, optimizer)
print(f"context: consistency {optimizer.c_optim.compute_gradient_consistency():.2f}, {len(optimizer.events())} events")
