"""What a parameter is to the model; decides its rails and which ideas act on it."""

from enum import Enum


class Role(str, Enum):
    """The role of a parameter.

    `adapter` is any tuner's own parameter without a more telling name, and a parameter about which nothing is known;
    `new` is a freshly initialised module, such as a classification head.
    """

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    EMBEDDING_A = "embedding_A"
    EMBEDDING_B = "embedding_B"
    ADAPTER = "adapter"
    MAGNITUDE = "magnitude"
    NEW = "new"
    BIAS = "bias"
    NORM = "norm"
    EMBEDDING = "embedding"
    FULL = "full"

    @property
    def is_lora_B(self) -> bool:
        """Whether this is the factor that starts at zero, which LoRA+ steps faster."""
        return self in (Role.LORA_B, Role.EMBEDDING_B)

    @property
    def is_full_weight(self) -> bool:
        """Whether this is a pretrained weight itself, which wants smaller steps than what is added to it."""
        return self in (Role.FULL, Role.EMBEDDING, Role.BIAS, Role.NORM)

    @property
    def decays(self) -> bool:
        """Whether weight decay makes sense: not for vectors that scale or shift."""
        return self not in (Role.MAGNITUDE, Role.BIAS, Role.NORM)
