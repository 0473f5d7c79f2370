"""The door into axolotl: a plugin that makes our names known before axolotl reads `optimizer:`.

```yaml
plugins:
  - hf_automagic.integrations.axolotl.AutomagicPlugin
optimizer: automagic_8bit
optim_args: {max_lr: 1e-3}
```
"""

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from transformers import TrainerCallback

from ..callbacks import attach
from ..registry import list_optimizers


class AutomagicPlugin(BasePlugin):
    """Lets axolotl train with our optimizers, log their true rates and leave `optimizer_stats/`.

    Importing this module registers the names; axolotl hands a name that it does not know to transformers unchanged.
    Runs with other optimizers stay as they are.
    """

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Puts our statistics in front of the trackers that the Trainer has, and returns no others."""
        if cfg.optimizer in list_optimizers():
            attach(trainer)
        return []
