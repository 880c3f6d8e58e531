"""DyCoke with its second part: in all but the first layers of the language model each new token of an answer sees only
those tokens of the video that it attends to most in the layer before.

Source: DyCoke, arXiv 2411.15024, both parts, as released.
Cost: O(T log T) operations, O(T) memory.
Prunes: before the language model as "dycoke_ttm", to the size of the configuration; and the cache for each generated
token, from a layer on (`layer`, 3 of 28). All keys and values stay where they are, so that no memory is saved and
tokens can come back; the prompt itself is read in full.

What is changed: tokens of all videos of a prompt compete, in each row of a batch, and attention is compared with that
to the same prompt only; the released code sees one row, and compares the first token of an answer with the last of the
one before. What the paper says of tokens that are added to those of the last step is not in the released code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError
from llava.token_compression.config import CompressionConfig
from llava.token_compression.dycoke_ttm import DyCokeOptions
from llava.token_compression.inner import DecodingStep, InnerOptions
from llava.token_compression.registry import register


@dataclass(frozen=True)
class DyCokeDecodingOptions(DyCokeOptions, InnerOptions):
    """Options of "dycoke", besides those of "dycoke_ttm".

    Attributes:
        layer: the first one in which a new token sees fewer tokens.
        pruned_share: of the video tokens, those that it does not see.
        similar: a cosine of its attention to that of the token before it from which on nothing is chosen anew.
        unchanged: what it sees then: as released "all" video tokens, or those that the "last" one saw.
    """

    layer: int | None = 3
    pruned_share: float = 0.7
    similar: float = 0.9
    unchanged: Literal["all", "last"] = "all"

    while_decoding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        InnerOptions.__post_init__(self)
        if not 0 <= self.pruned_share <= 1:
            raise ConfigError(f"pruned_share must lie in [0, 1], got {self.pruned_share!r}.")

    def left(self, config: CompressionConfig, entered: int) -> int:
        """How many video tokens a new token sees, rounded down."""
        return math.floor((1 - self.pruned_share) * entered + 1e-9)


@register("dycoke", options=DyCokeDecodingOptions, merge=False, before="dycoke_ttm")
def dycoke(step: DecodingStep) -> Tensor:
    """See the module."""
    order = step.attention.masked_fill(~step.videos, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    chosen = step.videos & (rank < step.counts.unsqueeze(1))
    if step.previous is None or step.seen is None:
        return chosen
    similarity = functional.cosine_similarity(step.attention * step.videos, step.previous * step.videos, dim=1)
    before = step.videos if step.options.unchanged == "all" else step.seen
    return torch.where((similarity >= step.options.similar).unsqueeze(1), before, chosen)
