"""All tokens go through the first layers of the language model; then those that the end of the question attends to
least are dropped.

Source: FastV, arXiv 2403.06764.
Cost: O(T D) operations, O(T D) memory.
Prunes: between two layers of the language model (`layer`, 2 of 28). Its first layers see all tokens, and their cache
keeps them.

What is changed: each video of a prompt keeps its own share. The attention of one row is computed by itself, so that any
kernel of attention serves, where the released code computes the whole map of a layer; it sees one prompt at a time,
and one of its versions writes that layer's keys and values twice. Tokens that are left have the rotary positions that
they had, as released.
"""

from dataclasses import dataclass

from llava.token_compression.config import CompressionConfig
from llava.token_compression.inner import InnerOptions, InnerVideo, Survivors
from llava.token_compression.ranking import best
from llava.token_compression.registry import register


@dataclass(frozen=True)
class FastVOptions(InnerOptions):
    """Options of FastV.

    Attributes:
        layer: the first one that sees fewer tokens; as published 2, or 3 in the released demonstration.
    """

    layer: int | None = 2

    def left(self, config: CompressionConfig, entered: int) -> int:
        """The size of the configuration."""
        return config.budget(entered) or entered


@register("fastv", options=FastVOptions, merge=False, before="none")
def fastv(video: InnerVideo, count: int) -> Survivors:
    """See the module."""
    return Survivors(best(video.attention[:, 0].mean(dim=0), count))
