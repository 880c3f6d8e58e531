"""SimpleCluster is k-means by cosine over the tokens of the whole video, each rotated by its frame, row and column so
that near tokens are more alike. A kept token is the mean of the original tokens of its cluster.

Source: SimpleCluster, arXiv 2609.35394, as released.
Cost: O(K T D) operations, O(K T) memory beside copies of the tokens, of which no more than 2^21 numbers at a time.

What is changed: the first prototype is token 0, where the released code takes the longest of vectors that all have
length 1. All iterations are run, without looking whether anything moves still. Where clusters are empty at the end,
each gets the token least similar to the prototype of its own cluster, of those that others share a cluster with; the
released code fails there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.grid import GridOptions
from llava.token_compression.joining import first_members, highest_products
from llava.token_compression.max_min import max_min
from llava.token_compression.means import add_groups, group_means
from llava.token_compression.registry import Kept, register

BASE = 10_000
"""Of the wavelengths of the rotation."""


@dataclass(frozen=True)
class SimpleClusterOptions(GridOptions):
    """Options of "simplecluster".

    Attributes:
        iterations: of k-means.
        positions: rotate tokens by their positions; the paper's ablation does not.
    """

    iterations: int = 10
    positions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise ConfigError(f"iterations must be at least 0, got {self.iterations}.")


@register("simplecluster", options=SimpleClusterOptions, merge=False)
def simplecluster(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """k-means from prototypes chosen by max-min diversity."""
    frames, tokens, dim = features.shape
    placed = features.view(frames, *config.options.shape(tokens), dim)
    unit = normalised((rotated(placed) if config.options.positions else placed).reshape(-1, dim))
    prototypes = unit[max_min(unit, budget, 0)]
    for _ in range(config.options.iterations):
        similarity, slots = highest_products(unit, prototypes)
        moved = normalised(add_groups(torch.zeros_like(prototypes), Stored(unit), slots))
        empty = (torch.bincount(slots, minlength=budget) == 0).nonzero().view(-1)
        moved[empty] = unit[similarity.argsort(stable=True)[: len(empty)]]
        prototypes = moved
    slots = without_empty(*highest_products(unit, prototypes), budget)
    first, order = first_members(slots, budget).sort()
    slots = order.argsort()[slots]
    return Kept(group_means(Stored(features.flatten(0, 1)), slots, budget), first, slots)


def rotated(features: Tensor) -> Tensor:
    """Features (frames, rows, columns, dim) rotated by their three positions, each in a third of the channels.

    A third of 2 h channels, neglecting an odd one, is h pairs of neighbours; pair j turns by position * BASE^(-j / h).
    """
    third = features.shape[-1] // 3
    parts = features.split([features.shape[-1] - 2 * third, third, third], dim=-1)
    turned = []
    for axis, part in enumerate(parts):
        pairs, length = part.shape[-1] // 2, part.shape[axis]
        frequency = BASE ** (-torch.arange(pairs, dtype=part.dtype, device=part.device) / max(1, pairs))
        angle = torch.arange(length, dtype=part.dtype, device=part.device).unsqueeze(1) * frequency
        angle = angle.view([*(length if index == axis else 1 for index in range(3)), pairs])
        x, y = part[..., : 2 * pairs : 2], part[..., 1 : 2 * pairs : 2]
        cos, sin = angle.cos(), angle.sin()
        pair = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)
        turned += [pair, part[..., 2 * pairs :]]
    return torch.cat(turned, dim=-1)


def without_empty(similarity: Tensor, slots: Tensor, count: int) -> Tensor:
    """Slots (n,) int64 such that each of `count` <= n occurs: empty ones get the least similar that can be spared.

    Args:
        similarity: (n,) of each token to what its slot stands for.
        slots: (n,) int64 in [0, count).
    """
    empty = (torch.bincount(slots, minlength=count) == 0).nonzero().view(-1)
    order = similarity.argsort(stable=True)
    rank = order.argsort()
    most = torch.full((count,), -1, device=slots.device).scatter_reduce(0, slots, rank, "amax")  # stays in its slot
    spared = order[(most[slots] != rank)[order]][: len(empty)]
    return slots.index_copy(0, spared, empty)
