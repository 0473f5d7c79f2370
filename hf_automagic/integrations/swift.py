"""The door into ms-swift: our names as `--optimizer`, in a plugin of one line.

ms-swift reads its command line before it imports plugins, so that `--optim` cannot know us; `--optimizer` can.

```python
# plugin.py, for: swift sft --external_plugins plugin.py --optimizer automagic_8bit --optim_args max_lr=1e-3 ...
import hf_automagic.integrations.swift
```
"""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map  # pyright: ignore[reportMissingImports]
from torch import nn

from ..optim.automagic import Automagic
from ..registry import list_optimizers


class AutomagicCallback(OptimizerCallback):
    """Builds the optimizer that `--optimizer` names, as `TrainingArguments(optim=...)` would."""

    args: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Automagic:
        """Hands the name over to transformers, which knows it."""
        self.args.optim = self.args.optimizer
        return super().create_optimizer(model)


optimizers_map.update(dict.fromkeys(list_optimizers(), AutomagicCallback))
