"""FlashVID with the part inside the language model: more tokens enter than are asked for, and late layers see only
those that the end of the question attends to most.

Source: FlashVID, arXiv 2602.08024, both parts.
Cost: O(T) operations, O(T) memory.
Prunes: before the language model as "flashvid", to `expansion` times the size of the configuration; then between two
layers of it (`layer`, 20 of 28), to `inner_share` of that. With the published settings the average over the layers is
the size of the configuration.

What is changed: the budget before the language model is met exactly, and each video of a prompt is pruned by itself.
"""

import math
from dataclasses import dataclass, replace

from llava.errors import ConfigError
from llava.token_compression.config import CompressionConfig
from llava.token_compression.flashvid import FlashVidOptions
from llava.token_compression.inner import InnerShareOptions, InnerVideo, Survivors
from llava.token_compression.ranking import best
from llava.token_compression.registry import register


@dataclass(frozen=True)
class FlashVidInnerOptions(FlashVidOptions, InnerShareOptions):
    """Settings of FlashVID with its part inside the language model, besides those of "flashvid".

    Attributes:
        expansion: so many times the size of the configuration enters the language model, at most all tokens.
    """

    expansion: float = 1.25
    inner_share: float = 0.3

    published = (20, 28)

    def __post_init__(self) -> None:
        FlashVidOptions.__post_init__(self)
        InnerShareOptions.__post_init__(self)
        if not 1 <= self.expansion < math.inf:
            raise ConfigError(f"expansion must be at least 1, got {self.expansion!r}.")

    def entering(self, config: CompressionConfig) -> CompressionConfig:
        """With the size of what enters the language model."""
        if config.retained_tokens is not None:
            return replace(config, retained_tokens=round(self.expansion * config.retained_tokens))
        assert config.retention_ratio is not None
        return replace(config, retention_ratio=min(1.0, self.expansion * config.retention_ratio))

    def left(self, config: CompressionConfig, entered: int) -> int:
        """The share of those that entered, rounded up as published."""
        return math.ceil(self.inner_share * entered)


@register("flashvid_inner", options=FlashVidInnerOptions, merge=False, before="flashvid")
def flashvid_inner(video: InnerVideo, count: int) -> Survivors:
    """See the module."""
    return Survivors(best(video.attention[:, 0].mean(dim=0), count))
