"""Every frame keeps the tokens whose attention stands out and evenly spaced ones, adds to each the tokens with the most
similar keys, and sums what is dropped into one more token.

Source: LLaVA-PruMerge+, arXiv 2403.15388; its port to SigLIP with a given budget in EffiVLM-Bench.
Cost: O(K N D + K N log N) operations, O(T D + K N) memory, the first D that of a key.

What differs: it works on pooled tokens and per frame, as nothing is published for video. The budget is met exactly,
spread evenly over the frames, and the sum of what is dropped counts; its place is that of the dropped token with most
attention. Tokens leave in source order, not by attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.anchors import slots, source_indices
from llava.token_compression.apportion import equal_shares, starts
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.registry import Kept, register

NEIGHBOURS = 32
FENCE = 1.5
"""Attention stands out if it is above the third quartile by so many times the distance of the quartiles."""


@dataclass(frozen=True)
class PruMergeOptions:
    """Settings of PruMerge.

    Attributes:
        spaced: keep evenly spaced tokens besides those that stand out, which is PruMerge+; else those with most
            attention.
        even: if there are more spaced tokens than are needed, take some from all over the frame; published code takes
            the first ones, from its top.
        rest: keep the sum of what is dropped as one more token, where a frame keeps two or more.
    """

    spaced: bool = True
    even: bool = False
    rest: bool = True


@register("prumerge", inputs=("vision_attn_wide", "vision_keys_wide"), options=PruMergeOptions, merge=False)
def prumerge(
    features: Tensor, config: CompressionConfig, budget: int, vision_attn_wide: Tensor, vision_keys_wide: Tensor
) -> Kept:
    """See the module."""
    outliers = outlier_count(vision_attn_wide)
    shares = equal_shares(budget, len(features)).to(features.device)
    source, unit = source_indices(features), normalised(vision_keys_wide)
    anchor, values = torch.full_like(source, -1), torch.empty_like(features)
    for count in shares.unique().tolist():  # one number, or two
        some = (shares == count).nonzero().view(-1)
        if count > 0:
            goal, value = _frames(features[some], vision_attn_wide[some], unit[some], count, outliers, config.options)
            anchor[some] = torch.where(goal >= 0, goal + source[some, :1], -1)
            values[some] = value
    positions, membership = slots(anchor.view(-1))
    return Kept(values.flatten(0, 1)[positions], positions, membership, single_is_own=False)


def outlier_count(attention: Tensor) -> int:
    """How many tokens of a frame (frames, tokens) stand out, on average, rounded down."""
    low, high = attention.quantile(torch.tensor([0.25, 0.75]).to(attention), dim=1, keepdim=True)
    return int((attention > high + FENCE * (high - low)).double().sum(dim=1).mean())


def _frames(
    features: Tensor, attention: Tensor, unit: Tensor, count: int, outliers: int, options: PruMergeOptions
) -> tuple[Tensor, Tensor]:
    """Anchor (frames, tokens) within its frame or -1, and value at each anchor, for frames that keep `count` tokens."""
    frames, tokens, _ = features.shape
    if count == tokens:
        return torch.arange(tokens, device=features.device).expand(frames, -1), features
    rest = options.rest and 1 < count < tokens
    kept = chosen(attention, count - rest, outliers, options)  # (frames, count - rest), ascending
    is_kept = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, kept, True)
    similarity = unit.gather(1, kept.unsqueeze(2).expand(-1, -1, unit.shape[2])) @ unit.mT
    similarity.scatter_(2, kept.unsqueeze(2), -torch.inf)  # not itself
    near = similarity.argsort(dim=2, descending=True, stable=True)[..., : min(NEIGHBOURS, tokens - 1)]
    taken = torch.zeros_like(similarity, dtype=torch.bool).scatter_(2, near, True)
    own = features.gather(1, kept.unsqueeze(2).expand(-1, -1, features.shape[2]))
    merged = own + (taken * attention.unsqueeze(1)).to(features) @ features

    values = torch.zeros_like(features).scatter_(1, kept.unsqueeze(2).expand_as(merged), merged)
    highest, slot = similarity.masked_fill(~taken, -torch.inf).max(dim=1)  # the kept token that each one feeds most
    goal = torch.where(highest > -torch.inf, kept.gather(1, slot), -1)
    if rest:
        dropped = attention.masked_fill(is_kept, 0)
        place = attention.masked_fill(is_kept, -torch.inf).argmax(dim=1, keepdim=True)
        goal = torch.where(goal < 0, place, goal).scatter_(1, place, place)
        summed = dropped.to(features).unsqueeze(1) @ features
        values.scatter_(1, place.unsqueeze(2).expand_as(summed), summed)
    return goal.scatter_(1, kept, kept), values


def chosen(attention: Tensor, count: int, outliers: int, options: PruMergeOptions) -> Tensor:
    """(frames, count) int64, ascending: the tokens of each frame that are kept.

    Args:
        attention: (frames, tokens).
        outliers: how many stand out.
    """
    order = attention.argsort(dim=1, descending=True, stable=True)
    if count <= outliers or not options.spaced:
        return order[:, :count].sort().values
    tokens, missing = attention.shape[1], count - outliers
    standing_out = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, order[:, :outliers], True)
    spaced = torch.arange(0, tokens, max(1, tokens // count), device=attention.device)
    picks = []
    for taken in standing_out[:, spaced]:
        free = spaced[~taken]
        picks.append(free[starts(len(free), missing).to(free.device)] if options.even else free[:missing])
    return torch.cat([order[:, :outliers], torch.stack(picks)], dim=1).sort().values
