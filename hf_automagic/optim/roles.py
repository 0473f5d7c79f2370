"""What a parameter is to the model; decides its rate and which ideas act on it."""

from enum import Enum

# max_lr times these. What starts at zero, or fresh, can go further than what was there before: B's rate outgrows A's
# (LoRA+, arXiv 2402.12354, section 4). Ratios of 7 to 17 ended lower than 1, 4 and 33 over five LoRA tasks, and full
# fine-tunes wanted A's rate.
PRETRAINED_SCALE, FRESH_SCALE = 0.3, 2.4
REFERENCE_WIDTH = 384  # of the models that max_lr was measured on
# The best rate falls with the width of the model. 0.78 was fitted for LoRA on Llama models up to 70B (Schulman et al.,
# "LoRA Without Regret", 2025), 1 is the law of the maximal update parametrization (arXiv 2203.03466).
WIDTH_EXPONENT = 0.75
LARGEST_WIDTH_SCALE = 2.0  # narrow models are not sped up without bound
# What starts from nothing begins higher and falls sooner, from this share of rail_steps on. A whole model from scratch
# steps as parameters about which nothing is known: 2.4 with a fall after 10 steps served a net on digits better in 100
# steps, and a language model worse in 300. Heads are as high in long runs as B, higher in short ones.
FRESH_FALL = 0.5
SCRATCH_SCALE, NEW_SCALE = 1.0, 3.4


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

    def rail_scale(self, is_full_weight: bool, width: float | None, is_fresh: bool = False) -> float:
        """Returns what `max_lr` is multiplied with for a parameter of this role.

        3.4 for new modules, 2.4 for B of a LoRA, 0.3 for A and pretrained weights, 1 for everything else, among it
        full weights that nobody has trained yet and parameters about which nothing is known. Times
        (384 / width)^0.75, at most 2, from scratch at most 1.

        Args:
            is_full_weight: whether it is a weight of the model itself.
            width: typical number of inputs of the model's layers, None where it is not known.
            is_fresh: whether the model's own weights are as they were initialised.
        """
        by_width = 1.0 if not width else min((REFERENCE_WIDTH / width) ** WIDTH_EXPONENT, LARGEST_WIDTH_SCALE)
        if is_full_weight and is_fresh:
            return SCRATCH_SCALE * min(by_width, 1.0)
        if is_full_weight or self is Role.LORA_A:
            return PRETRAINED_SCALE * by_width
        return {Role.LORA_B: FRESH_SCALE, Role.NEW: NEW_SCALE}.get(self, 1.0) * by_width

    def fall_scale(self, is_full_weight: bool, is_fresh: bool) -> float:
        """Returns what `rail_steps` is multiplied with: 0.5 from scratch and for new modules, 1 elsewhere."""
        starts_from_nothing = is_fresh if is_full_weight else self is Role.NEW
        return FRESH_FALL if starts_from_nothing else 1.0

    @property
    def decays(self) -> bool:
        """Whether weight decay makes sense: not for vectors that scale or shift."""
        return self not in (Role.MAGNITUDE, Role.BIAS, Role.NORM)
