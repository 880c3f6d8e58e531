"""Token Merging splits the tokens into even and odd ones, matches every even one with its most similar odd one, and
averages the most similar pairs, weighted by how many tokens each stands for. Passes repeat until K tokens are left.

Source: ToMe, arXiv 2210.09461, which does one pass in each layer of an image encoder; used on the tokens of a whole
video before the language model as in the comparison of STTM, arXiv 2507.07990.
Cost: O(T^2 D) operations, O(T D + T^2) memory, of whose squares no more than 2^21 numbers at a time.

What is changed: a pass halves the tokens at most, and the last one merges as many pairs as are too many, so that every
count is exact. The cosine is that of the tokens, not of attention keys. Kept tokens are handed on in source order.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.joining import highest_products
from llava.token_compression.means import add_groups
from llava.token_compression.registry import Kept, register


@dataclass(frozen=True)
class ToMeOptions:
    """Options of "tome".

    Attributes:
        order: of the tokens in which a further pass tells even from odd ones. "released": those that were not merged,
            most similar first, then the odd ones; "raster": source order.
    """

    order: Literal["released", "raster"] = "released"


@register("tome", options=ToMeOptions, merge=False)
def tome(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Bipartite soft matching of all tokens of the video, pass after pass."""
    sums = features.flatten(0, 1)
    anchors = torch.arange(len(sums), device=sums.device)
    sizes, membership = torch.ones_like(anchors), anchors
    while len(sums) > budget:
        slots, kept = _matched(normalised(sums / sizes.unsqueeze(1)), len(sums) - budget)
        anchors, membership = anchors[kept], slots[membership]
        sums = add_groups(sums.new_zeros(len(kept), sums.shape[1]), Stored(sums), slots)
        sizes = torch.zeros_like(anchors).index_add(0, slots, sizes)
        if config.options.order == "raster" or len(sums) == budget:
            order = anchors.argsort()
            anchors, sums, sizes = anchors[order], sums[order], sizes[order]
            membership = order.argsort()[membership]
    return Kept(sums / sizes.unsqueeze(1), anchors, membership)


def _matched(unit: Tensor, too_many: int) -> tuple[Tensor, Tensor]:
    """One pass: the slot (n,) int64 that each token goes into, and the token (slots,) int64 that names each slot."""
    even, odd = torch.arange(len(unit), device=unit.device)[::2], torch.arange(len(unit), device=unit.device)[1::2]
    similarity, target = highest_products(unit[even], unit[odd])
    order = similarity.argsort(descending=True, stable=True)
    merged, others = order.tensor_split([min(too_many, len(odd))])
    kept = torch.cat([even[others], odd])
    slots = order.new_empty(len(unit))
    slots[kept] = torch.arange(len(kept), device=unit.device)
    slots[even[merged]] = slots[odd[target[merged]]]
    return slots, kept
