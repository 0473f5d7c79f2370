"""The optimizer written slowly and plainly: float64, one tensor at a time, the oracle of every backend.

Each file is one idea, each function one equation. Read `optimizer.py` for the order of a step, then the file of a
stage: `came.py` (second moment, momentum, confidence), `spatial.py`, `lora.py`, `cautious.py`, `self_tuning.py`,
`context.py`, `decay.py`, `codecs.py`. `ancestor.py` is the optimizer that all this descends from, a benchmark arm.
"""

from .ancestor import AncestorAutomagic
from .config import Pair, ParamOptions, ReferenceConfig
from .context import ReferenceContext
from .optimizer import ReferenceOptimizer

__all__ = ["AncestorAutomagic", "Pair", "ParamOptions", "ReferenceConfig", "ReferenceContext", "ReferenceOptimizer"]
