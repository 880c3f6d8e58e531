"""FrameFusion merges a token with the one at the same place in the frame before if they are alike. Runs of such tokens
become their mean, at the place of the first.

Source: FrameFusion, arXiv 2501.01986: the merging step, once and before the language model. There it is run in the
first layers, by a threshold, and followed by pruning by attention.
Cost: O(T D + T log T) operations, O(T D) memory.

What is changed: exactly as many tokens are merged as are too many, those most similar to their predecessors. With
fewer tokens than a frame has, all frames are merged, and the means least like their own mean are kept.
"""

import torch
from torch import Tensor

from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.evs import similarity_to_mean
from llava.token_compression.means import group_means
from llava.token_compression.ranking import best
from llava.token_compression.registry import Kept, register


@register("framefusion", merge=False)
def framefusion(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Means of runs in time, cut where tokens change most."""
    frames, tokens, _ = features.shape
    unit = normalised(features)
    change = 1 - (unit[1:] * unit[:-1]).sum(dim=-1)
    change = torch.cat([torch.full_like(unit[:1, :, 0], torch.inf), change])
    anchors = best(change.view(-1), max(budget, tokens))
    starts = torch.zeros(frames * tokens, dtype=torch.int64, device=features.device)
    starts[anchors] = anchors
    starts = starts.view(frames, tokens).cummax(dim=0).values.view(-1)  # the last anchor at this place
    slots = torch.searchsorted(anchors, starts)
    means = group_means(Stored(features.flatten(0, 1)), slots, len(anchors))
    if budget >= tokens:
        return Kept(means, anchors, slots)
    kept = best(-similarity_to_mean(means), budget)
    renumbered = torch.full_like(anchors, -1)
    renumbered[kept] = torch.arange(budget, device=kept.device)
    return Kept(means[kept], anchors[kept], renumbered[slots])
