"""Storage of states in few bits; knows nothing of what the states mean."""

from .affine import Affine
from .core import CODECS, Codec, EncodeContext, dequantize, make_codec, quantize, register_codec
from .dynamic import Dynamic
from .feedback import WithFeedback
from .log16 import Log16
from .policy import ParamInfo, QuantizationStrategy, StateCodecs, choose_codecs
from .rounding import keys_for, random_bits, random_halves, round_stochastically, step_keys
from .softsign import Softsign

__all__ = [
    "CODECS",
    "Affine",
    "Codec",
    "Dynamic",
    "EncodeContext",
    "Log16",
    "ParamInfo",
    "QuantizationStrategy",
    "Softsign",
    "StateCodecs",
    "WithFeedback",
    "choose_codecs",
    "dequantize",
    "keys_for",
    "make_codec",
    "quantize",
    "random_bits",
    "random_halves",
    "register_codec",
    "round_stochastically",
    "step_keys",
]
