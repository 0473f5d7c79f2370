"""The names of the two documents that this project grew from: classes, options and helpers, as aliases of ours."""

from .classes import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    Automagic_CameAMP_Improved,
    SeedOptimizer,
)
from .config import Optimizer8BitConfig, adjust_config_for_model_size, get_recommended_config
from .monitors import (
    MemoryMonitor,
    check_memory_leak,
    check_quantization_quality,
    monitor_learning_rates,
)
from .training import AdaptiveOptimizer, CustomQuantizationStrategy, progressive_quantization_training
from .views import QuantizedState, get_memory_stats, high_precision_states, quantized_states

__all__ = [
    "AdaptiveOptimizer",
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_8Bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved",
    "CustomQuantizationStrategy",
    "MemoryMonitor",
    "Optimizer8BitConfig",
    "QuantizedState",
    "SeedOptimizer",
    "adjust_config_for_model_size",
    "check_memory_leak",
    "check_quantization_quality",
    "get_memory_stats",
    "get_recommended_config",
    "high_precision_states",
    "monitor_learning_rates",
    "progressive_quantization_training",
    "quantized_states",
]
