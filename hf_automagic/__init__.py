"""Self-tuning, 8-bit, LoRA-aware optimizers for the Hugging Face stack.

```python
import hf_automagic                                   # registers the names below
args = TrainingArguments("out", optim="automagic_8bit")
```
"""

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoint import find_resumable_checkpoint
from .config import AutomagicConfig
from .factory import create_automagic_optimizer
from .integrations.transformers import register, unregister
from .optim.automagic import Automagic
from .optim.loss_hook import attach_loss_hook
from .peft import param_groups
from .registry import OptimizerInfo, get_optimizer_info, list_optimizers, register_optimizer, unregister_optimizer
from .reporting.dashboard import TrainingDashboard
from .seeds.classes import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    Automagic_CameAMP_Improved,
)
from .seeds.config import Optimizer8BitConfig, adjust_config_for_model_size, get_recommended_config
from .seeds.monitors import MemoryMonitor, check_memory_leak, check_quantization_quality, monitor_learning_rates
from .seeds.training import AdaptiveOptimizer, CustomQuantizationStrategy, progressive_quantization_training

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .callbacks import (
        CheckpointCallback,
        EdgeCaseCallback,
        EffectiveLRCallback,
        MemoryCallback,
        OptimizerStatsCallback,
    )
    from .trainer import AutomagicTrainer, AutomagicTrainerMixin

# What needs transformers is imported when it is asked for: the optimizer itself works with torch alone.
_NEEDS_TRANSFORMERS = {
    "AutomagicTrainer": "trainer",
    "AutomagicTrainerMixin": "trainer",
    "CheckpointCallback": "callbacks",
    "EdgeCaseCallback": "callbacks",
    "EffectiveLRCallback": "callbacks",
    "MemoryCallback": "callbacks",
    "OptimizerStatsCallback": "callbacks",
}

__all__ = [
    "AdaptiveOptimizer",
    "Automagic",
    "AutomagicConfig",
    "AutomagicTrainer",
    "AutomagicTrainerMixin",
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_8Bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved",
    "CheckpointCallback",
    "CustomQuantizationStrategy",
    "EdgeCaseCallback",
    "EffectiveLRCallback",
    "MemoryCallback",
    "MemoryMonitor",
    "Optimizer8BitConfig",
    "OptimizerInfo",
    "OptimizerStatsCallback",
    "TrainingDashboard",
    "adjust_config_for_model_size",
    "attach_loss_hook",
    "check_memory_leak",
    "check_quantization_quality",
    "create_automagic_optimizer",
    "find_resumable_checkpoint",
    "get_optimizer_info",
    "get_recommended_config",
    "list_optimizers",
    "monitor_learning_rates",
    "param_groups",
    "progressive_quantization_training",
    "register",
    "register_optimizer",
    "unregister",
    "unregister_optimizer",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TRANSFORMERS:
        return getattr(importlib.import_module(f".{_NEEDS_TRANSFORMERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
