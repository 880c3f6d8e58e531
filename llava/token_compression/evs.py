"""Efficient Video Sampling keeps the first frame, and of the others the tokens that changed most since the one before.

Source: EVS, arXiv 2510.14624, in its form on embeddings; the form on pixels cuts before the vision tower.
Cost: O(T D + T log T) operations, O(T D) memory.

What is changed: instead of the tokens above a percentile, exactly as many of the largest changes are kept as the budget
has room for. With less room than the first frame takes, only tokens of it are kept, those that are least like its mean.
It is published with each token at its own rotary position, which is `position_ids="source"`.
"""

import torch
from torch import Tensor

from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.ranking import best
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select


@register("evs", merge=False)
def evs(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """The first frame, and the largest changes from a frame to the next at the same place."""
    if budget < features.shape[1]:
        return select(features, best(-similarity_to_mean(features[0]), budget))
    unit = normalised(features)
    change = 1 - (unit[1:] * unit[:-1]).sum(dim=-1)
    first = torch.full_like(unit[:1, :, 0], torch.inf)
    return select(features, best(torch.cat([first, change]).view(-1), budget))


def similarity_to_mean(frame: Tensor) -> Tensor:
    """Cosines (n,) of the tokens (n, dim) of a frame with their mean."""
    return normalised(frame) @ normalised(frame.mean(dim=0))
