"""USTC keeps tokens of high contribution that are unlike all kept so far, over space and time at once. What it does not
keep is clustered by density peaks into the rest of the budget, each cluster its mean.

Source: Unified Spatio-Temporal Token Compression, arXiv 2603.21957: the part before the language model. No code is
published; details from notes on it.
Cost: O(T^2 D) operations, O(T D + T^2) memory, of whose squares no more than 2^21 numbers at a time.

What is changed, or chosen where the notes leave it open: candidates come in the order of the attention that they
receive; kept ones take what the clusters' share leaves of the budget; if they are fewer, the clusters are more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.components import BLOCK_ENTRIES, normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.dpc_knn import NOISE
from llava.token_compression.means import group_means
from llava.token_compression.ranking import best
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select

CANDIDATES = 256
"""Tokens that are compared with those kept, and with each other, at a time."""


@dataclass(frozen=True)
class UstcOptions:
    """Options of "ustc".

    Attributes:
        order: "attention" visits tokens from the highest `vision_attn` on; "raster" in source order, which needs no
            attention: the paper's ablation by similarity only.
        tau: a token as similar as this to a kept one is not kept.
        cluster_share: of the budget.
        neighbours: k of the density.
    """

    order: Literal["attention", "raster"] = "attention"
    tau: float = 0.7
    cluster_share: float = 0.3
    neighbours: int = 7

    def __post_init__(self) -> None:
        if not 0 <= self.cluster_share <= 1:
            raise ConfigError(f"cluster_share must be from 0 to 1, got {self.cluster_share!r}.")
        if self.neighbours < 1:
            raise ConfigError(f"neighbours must be at least 1, got {self.neighbours}.")

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is needed besides the tokens."""
        return ("vision_attn",) if self.order == "attention" else ()


@register("ustc", inputs=("vision_attn",), options=UstcOptions, merge=False)
def ustc(features: Tensor, config: CompressionConfig, budget: int, vision_attn: Tensor | None = None) -> Kept:
    """A cover of the tokens, and clusters of what it leaves."""
    options: UstcOptions = config.options
    vectors = features.flatten(0, 1)
    order = torch.arange(len(vectors), device=vectors.device)
    if vision_attn is not None:
        order = vision_attn.view(-1).argsort(descending=True, stable=True)
    quota = round(budget * (1 - options.cluster_share))
    pool = order[cover(normalised(vectors)[order], options.tau, quota)]
    if len(pool) == budget:
        return select(features, pool.sort().values)
    rest = torch.ones_like(order, dtype=torch.bool).index_fill(0, pool, False).nonzero().view(-1)
    centres, slots = density_clusters(vectors[rest], budget - len(pool), options.neighbours)
    anchors = torch.cat([pool, rest[centres]])
    membership = torch.empty_like(order)
    membership[pool] = torch.arange(len(pool), device=pool.device)
    membership[rest] = slots + len(pool)
    positions, arrangement = anchors.sort()
    membership = arrangement.argsort()[membership]
    return Kept(group_means(Stored(vectors), membership, budget), positions, membership)


def cover(unit: Tensor, tau: float, most: int) -> Tensor:
    """Visit vectors in their order, and keep each one whose cosines with all kept before are below a threshold.

    Args:
        unit: (n, dim) vectors of length 1, or 0.
        most: at most so many are kept.

    Returns:
        Indices (kept,) int64, ascending.
    """
    kept = torch.empty(0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(unit), CANDIDATES):
        if len(kept) >= most:
            break
        block = unit[start : start + CANDIDATES]
        undecided = (block @ unit[kept].mT >= tau).any(dim=1).logical_not()
        alike = (block @ block.mT >= tau).tril(-1)  # [i, j]: to j before i
        accepted = torch.zeros_like(undecided)
        while undecided.any():
            certain = undecided & ~(alike & undecided).any(dim=1)
            accepted |= certain
            undecided &= ~certain & ~(alike & certain).any(dim=1)
        kept = torch.cat([kept, start + accepted.nonzero().view(-1)])
    return kept[:most]


def density_clusters(vectors: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Clusters around density peaks, as in dpc_knn.py, of one large set: without the matrix of its distances.

    Args:
        vectors: (n, dim), at least `count`.
        neighbours: k, of which a vector itself is one.

    Returns:
        Centres (count,) int64, ascending, and the cluster (n,) int64 of each vector.
    """
    index = torch.arange(len(vectors), device=vectors.device)
    density, farthest = [], []
    for _, apart in _squared_distances(vectors, vectors):
        nearest = apart.topk(min(neighbours, len(vectors)), dim=1, largest=False).values
        density.append(-nearest.mean(dim=1))
        farthest.append(apart.max())
    log_density, largest = torch.cat(density), torch.stack(farthest).max()
    delta = []
    for own, apart in _squared_distances(vectors, vectors):
        denser = log_density > log_density[own, None]
        denser |= (log_density == log_density[own, None]) & (index < index[own, None])
        nearest_denser = apart.masked_fill(~denser, torch.inf).amin(dim=1)
        delta.append(torch.where(nearest_denser.isinf(), largest, nearest_denser))
    centres = best(log_density + torch.cat(delta).log() / 2, count)
    slots = torch.cat([apart.argmin(dim=1) for _, apart in _squared_distances(vectors, vectors[centres])])
    slots[centres] = torch.arange(count, device=slots.device)
    return centres, slots


def _squared_distances(vectors: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances per channel, some rows at a time; 0 where they are within rounding errors."""
    squares, other_squares = vectors.square().sum(dim=1), others.square().sum(dim=1)
    rows = max(1, BLOCK_ENTRIES // len(others))
    for start in range(0, len(vectors), rows):
        block = slice(start, start + rows)
        scale = squares[block, None] + other_squares
        apart = scale - 2 * (vectors[block] @ others.mT)
        yield block, apart.masked_fill_(apart <= NOISE * scale, 0).div_(vectors.shape[1])
