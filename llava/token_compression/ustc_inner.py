"""USTC with the part inside the language model: tokens are left that the question attends to, or that are like a word
of it, and each other one is merged into the most similar of them.

Source: Unified Spatio-Temporal Token Compression, arXiv 2603.21957, both parts. No code is published; details from
notes on it.
Cost: O(T K D) operations, O(T^2 + T D) memory.
Prunes: before the language model as "ustc", to the size of the configuration; then between two layers of it (`layer`,
18 of 28), to `inner_share` of that.

What is chosen where the notes leave it open: attention is the mean over the heads, then the most of any word after the
video; a merged token is the plain mean of what is merged.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.components import normalised
from llava.token_compression.holitom_inner import merged
from llava.token_compression.inner import InnerShareOptions, InnerVideo, Survivors
from llava.token_compression.joining import highest_products
from llava.token_compression.ranking import best
from llava.token_compression.registry import register
from llava.token_compression.ustc import UstcOptions


@dataclass(frozen=True)
class UstcInnerOptions(UstcOptions, InnerShareOptions):
    """Settings of USTC with its part inside the language model, besides those of "ustc".

    Attributes:
        likeness: weight of the cosine with the text beside the attention, from 0 to 1.
    """

    likeness: float = 0.5

    published = (18, 28)
    looking: ClassVar[Literal["last", "text", "text without order"]] = "text"

    def __post_init__(self) -> None:
        UstcOptions.__post_init__(self)
        InnerShareOptions.__post_init__(self)
        if not 0 <= self.likeness <= 1:
            raise ConfigError(f"likeness must lie in [0, 1], got {self.likeness!r}.")


@register("ustc_inner", options=UstcInnerOptions, merge=False, before="ustc")
def ustc_inner(video: InnerVideo, count: int) -> Survivors:
    """See the module."""
    hidden = video.hidden.float()
    unit, share = normalised(hidden), video.options.likeness
    attention = video.attention.mean(dim=0).amax(dim=0)
    likeness, _ = highest_products(unit, normalised(video.text.float()))
    kept = best((1 - share) * _scaled(attention) + share * _scaled(likeness), count)
    stays = torch.zeros(len(hidden), dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
    _, goal = highest_products(unit[~stays], unit[kept])
    return Survivors(kept, merged(hidden[kept], hidden[~stays], goal, halving=False))


def _scaled(scores: Tensor) -> Tensor:
    """From 0 to 1; equal scores are 0."""
    low, high = scores.aminmax()
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
