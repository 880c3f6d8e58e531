"""HoliTom with the part inside the language model: what is left of the video loses those tokens there that the end of
the question attends to least, each of which is merged into the most similar one that stays.

Source: HoliTom, arXiv 2505.21334, both parts.
Cost: O(T K D) operations, O(T^2 + T D) memory.
Prunes: before the language model as "holitom", to the size of the configuration; then between two layers of it
(`layer`, 18 of 28), to `inner_share` of that.

What is changed: the mergers of the released code, one after the other, are one sum with their weights. The attention of
one row is computed by itself, where the released code computes the whole map of a layer; each video of a prompt is
pruned, in each row of a batch, where the released code takes the first of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.components import normalised
from llava.token_compression.holitom import HoliTomOptions
from llava.token_compression.inner import InnerShareOptions, InnerVideo, Survivors
from llava.token_compression.joining import highest_products, mean_of_joined
from llava.token_compression.ranking import best
from llava.token_compression.registry import register


@dataclass(frozen=True)
class HoliTomInnerOptions(HoliTomOptions, InnerShareOptions):
    """Settings of HoliTom with its part inside the language model, besides those of "holitom".

    Attributes:
        halving: as released, a token and the one it is merged into become their mean, again for each next one, so that
            the last counts for half; False is the mean of them all.
    """

    halving: bool = True

    published = (18, 28)

    def __post_init__(self) -> None:
        HoliTomOptions.__post_init__(self)
        InnerShareOptions.__post_init__(self)


@register("holitom_inner", options=HoliTomInnerOptions, merge=False, before="holitom")
def holitom_inner(video: InnerVideo, count: int) -> Survivors:
    """See the module."""
    kept = best(video.attention[:, 0].mean(dim=0), count)
    stays = torch.zeros(len(video.hidden), dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)
    hidden = video.hidden.float()
    unit = normalised(hidden)
    _, goal = highest_products(unit[~stays], unit[kept])
    return Survivors(kept, merged(hidden[kept], hidden[~stays], goal, video.options.halving))


def merged(anchors: Tensor, others: Tensor, goal: Tensor, halving: bool) -> Tensor:
    """Merge others (n, dim), in their order, into the anchors (k, dim) at `goal` (n,)."""
    if not halving:
        mean, size = mean_of_joined(others, goal, len(anchors))
        return (anchors + size * mean) / (1 + size)
    order = goal.argsort(stable=True)
    sizes = torch.bincount(goal, minlength=len(anchors))
    place = torch.arange(len(goal), device=goal.device) - (sizes.cumsum(0) - sizes)[goal[order]]
    later = torch.empty_like(goal).index_copy_(0, order, sizes[goal[order]] - 1 - place)  # mergers into the same one
    mean, size = mean_of_joined(others * 0.5 ** (later + 1).unsqueeze(1), goal, len(anchors))
    return anchors * 0.5**size + size * mean
