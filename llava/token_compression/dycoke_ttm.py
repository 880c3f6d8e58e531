"""DyCoke's temporal token merging keeps every fourth frame whole, and of the frames between those tokens that changed
most: odd frames since the frame before them, the others since the whole frame two before. Nothing is averaged.

Source: DyCoke, arXiv 2411.15024, part one, as released; part two prunes the cache of the language model.
Cost: O(T D + T log N) operations, O(T D) memory.

What is changed: what the whole frames leave of the budget is shared equally among the others. Below about a quarter of
the tokens, which is as far as the published method goes, there is room for the whole frames no longer: then the first
one is kept, and of the other fourth frames what changed since the fourth before; at last of the first frame the tokens
least like its mean. Kept tokens stay in their order, where the released code sorts those of a frame by their change.
With an odd number of frames the last one takes part, with four or fewer nothing fails; the released code drops the one
and cannot do the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.apportion import equal_shares
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.evs import similarity_to_mean
from llava.token_compression.ranking import best_per_frame
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select


@dataclass(frozen=True)
class DyCokeOptions:
    """Options of "dycoke_ttm".

    Attributes:
        tail_bug: as released, keep the third frame of the last four whole too (frame 30 of 32, counted from 0): the
            loop over such frames ends too early.
    """

    tail_bug: bool = True


@register("dycoke_ttm", options=DyCokeOptions, merge=False)
def dycoke_ttm(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Whole frames, and the largest changes of the others."""
    frames, tokens, _ = features.shape
    frame = torch.arange(frames)
    whole = frame % 4 == 0
    if config.options.tail_bug:
        whole |= (frame % 4 == 2) & (frame >= frames - 2)
    counts = torch.zeros_like(frame)
    for level in (frame == 0, whole & (frame > 0), ~whole):
        room = min(budget, tokens * int(level.sum()))
        counts[level] = equal_shares(room, max(1, int(level.sum())))[: int(level.sum())]
        budget -= room
    before = torch.tensor([4, 1, 2, 1])[frame % 4]
    unit = normalised(features)
    similarity = (unit * unit[(frame - before).clamp_min(0).to(unit.device)]).sum(dim=-1)
    similarity[0] = similarity_to_mean(features[0])
    return select(features, best_per_frame(-similarity, counts.to(unit.device)))
