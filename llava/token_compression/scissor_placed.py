"""Two steps as in LLaVA-Scissor, within frames and over all frames, but clusters are compared by their means, and count
as less alike the farther apart they are. So no chain of pairwise likeness joins what is unlike, and motion survives.

Source: this project; pairs that are nearest to each other are joined, as in reciprocal agglomeration by centroids.
Cost: O(F N^2 D + K T D) operations, O(T D + F N^2 + 4 K T) memory, K T of a window of frames at a time.

A token is its unit vector with three circular coordinates (frame, row, column) attached, whose weights are `time` and
`space`. The similarity of two clusters is the cosine of the sums of their tokens, which follows from the products of
the tokens; joining two adds their rows and columns in the matrix of products, and no vector is touched again. In each
round the more similar half of the pairs that are nearest to each other is joined. The first step leaves the geometric
mean of T and K, the second K. A kept token is the mean of its cluster, at the place of the member most like it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.apportion import apportion
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.grid import GridOptions
from llava.token_compression.means import add_groups, group_means
from llava.token_compression.registry import Kept, register

Cosines = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PlacedOptions(GridOptions):
    """Options of "scissor_placed".

    Attributes:
        time: weight of the distance in time beside the cosine of the features; 0 for none. With fewer than two tokens
            for each frame both weights shrink in proportion, as so few cannot tell all times and places apart.
        space: weight of the distance in a frame.
        window: the second step is taken in windows of so many frames.
    """

    time: float = 0.5
    space: float = 0.5
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time", "space"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1, got {self.window}.")


@register("scissor_placed", options=PlacedOptions, merge=False)
def scissor_placed(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """See the module."""
    frames, tokens, _ = features.shape
    options, total = config.options, frames * tokens
    share = min(1.0, budget / (2 * frames))
    placed = normalised(with_places(features, options.shape(tokens), options.time * share, options.space * share))
    middle = max(budget, frames, round(math.sqrt(budget * total)))
    labels = joined(placed @ placed.mT, middle)
    start = torch.arange(frames, device=labels.device).unsqueeze(1) * tokens
    roots, labels = (labels + start).view(-1).unique(return_inverse=True)
    sums = add_groups(placed.new_zeros(len(roots), placed.shape[2]), Stored(placed.flatten(0, 1)), labels)

    windows = roots // tokens // options.window
    sizes = torch.bincount(windows)
    counts = apportion(sizes, budget, int(budget >= len(sizes)), sizes)
    second = []
    for own, count in zip(sums.split(sizes.tolist()), counts.tolist(), strict=True):
        second.append(joined((own @ own.mT).unsqueeze(0), count)[0])
    first = sizes.cumsum(0) - sizes
    ids = torch.cat([part + start for part, start in zip(second, first.tolist(), strict=True)])
    membership = ids[labels].unique(return_inverse=True)[1]

    centres = normalised(
        add_groups(placed.new_zeros(budget, placed.shape[2]), Stored(placed.flatten(0, 1)), membership)
    )
    likeness = (placed.flatten(0, 1) * centres[membership]).sum(dim=1)
    best = likeness.new_full((budget,), -torch.inf).scatter_reduce(0, membership, likeness, "amax")
    index = torch.arange(total, device=labels.device)
    candidates = torch.where(likeness == best[membership], index, total)
    positions = candidates.new_full((budget,), total).scatter_reduce(0, membership, candidates, "amin")
    positions, order = positions.sort()
    membership = order.argsort()[membership]
    return Kept(group_means(Stored(features.flatten(0, 1)), membership, budget), positions, membership)


def with_places(features: Tensor, shape: tuple[int, int], time: float, space: float) -> Tensor:
    """Unit vectors (frames, tokens, dim + 6) with their frame, row and column as points on half circles."""
    frames, tokens, _ = features.shape
    places = []
    for axis, (length, weight) in enumerate(((frames, time), (shape[0], space / 2), (shape[1], space / 2))):
        angle = torch.arange(length, dtype=features.dtype, device=features.device) * (math.pi / max(1, length - 1))
        point = weight**0.5 * torch.stack([angle.cos(), angle.sin()], dim=-1)
        view = [length if own == axis else 1 for own in range(3)]
        places.append(point.view(*view, 2).expand(frames, *shape, 2).reshape(frames, tokens, 2))
    return torch.cat([normalised(features), *places], dim=-1)


def joined(products: Tensor, count: int) -> Tensor:
    """Join clusters that are most similar to each other until there are `count`.

    Args:
        products: (graphs, n, n) of the vectors of each graph with each other; overwritten.
        count: of clusters over all graphs, at least one for each.

    Returns:
        (graphs, n) int64, the lowest vector of each one's cluster.
    """
    graphs, n, _ = products.shape
    index = torch.arange(n, device=products.device).expand(graphs, n)
    labels, alive = index.clone(), torch.ones_like(index, dtype=torch.bool)
    scale = products.diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt()

    def cosines(graph: Tensor, row: Tensor) -> Tensor:
        """(k, n) of clusters with all in their graph, minus infinity with themselves and those that are no more."""
        found = products[graph, row].mul_(scale[graph, row].unsqueeze(1)).mul_(scale[graph])
        return found.masked_fill_(~alive[graph], -torch.inf).scatter_(1, row.unsqueeze(1), -torch.inf)

    first = (products * scale.unsqueeze(2)).mul_(scale.unsqueeze(1))
    first.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest, partner = first.max(dim=2)
    del first
    left = graphs * n
    while left > count:
        mutual = alive & (partner.gather(1, partner) == index) & (index < partner) & (nearest > -torch.inf)
        graph, lower = mutual.nonzero(as_tuple=True)
        take = min(left - count, math.ceil(len(lower) / 2))
        order = nearest[graph, lower].argsort(descending=True, stable=True)[:take]
        graph, lower = graph[order], lower[order]
        upper = partner[graph, lower]
        alive[graph, upper] = False
        target = index.clone()
        target[graph, upper] = lower
        labels = target.gather(1, labels)
        both = products[graph, lower] + products[graph, upper]  # (joined, n): rows, of which columns are added next
        both = torch.zeros_like(both).scatter_add_(1, target[graph], both)
        products[graph, lower] = products[graph, :, lower] = both
        scale[graph, lower] = products[graph, lower, lower].clamp_min(1e-12).rsqrt()
        left -= take
        if left > count:
            _look_again(nearest, partner, alive, cosines, graph, lower, upper)
    return labels


def _look_again(
    nearest: Tensor, partner: Tensor, alive: Tensor, cosines: Cosines, graph: Tensor, lower: Tensor, upper: Tensor
) -> None:
    """Find partners anew where they changed, given which clusters were joined: to `lower` those at `upper`."""
    changed = torch.zeros_like(alive)
    changed[graph, lower] = changed[graph, upper] = True
    again = alive & (changed | changed.gather(1, partner))
    rows = again.nonzero(as_tuple=True)
    nearest[rows], partner[rows] = cosines(*rows).max(dim=1)
    to_new = cosines(graph, lower)
    own = graph.unsqueeze(1).expand_as(to_new)
    best = torch.full_like(nearest, -torch.inf).scatter_reduce(0, own, to_new, "amax")
    which = torch.where(to_new == best[graph], lower.unsqueeze(1), alive.shape[1])
    first = torch.full_like(partner, alive.shape[1]).scatter_reduce(0, own, which, "amin")
    closer = (best > nearest) | ((best == nearest) & (first < partner))
    partner.copy_(torch.where(closer, first, partner))
    nearest.copy_(torch.where(closer, best, nearest))
