"""STTM covers each frame by a quadtree: a square of tokens is one node where its quarters are alike. Then nodes of
neighbouring frames, one of which lies within the other, are joined where they are alike, and components averaged.

Source: STTM, arXiv 2507.07990, as released; there in front of the third layer of the language model, here before it.
Cost: O(T D + T log T) operations, O(T D) memory.

What is changed: the threshold over time is not given, but that at which exactly K components are left. The one within
frames is raised where it leaves fewer than K nodes. Where all nodes that may be joined are, and components are still
too many, those of fewest tokens go to the most similar other ones. Components are exact; the released propagation of
labels can stop too early.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.components import join, normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.grid import GridOptions
from llava.token_compression.joining import first_members, most_similar
from llava.token_compression.means import group_means
from llava.token_compression.ranking import best
from llava.token_compression.registry import Kept, register


@dataclass(frozen=True)
class SttmOptions(GridOptions):
    """Options of "sttm".

    Attributes:
        tau_s: cosine from which on a quarter is like the whole.
        border_children: as released, compare a square at the border of an odd grid, which has no more than two
            quarters, with the first one of the frame as well; it is then split more often.
    """

    tau_s: float = 0.85
    border_children: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau_s <= 1:
            raise ConfigError(f"tau_s is a cosine and must lie in [-1, 1], got {self.tau_s!r}.")


@dataclass(frozen=True)
class Level:
    """A grid of squares over every frame.

    Attributes:
        vectors: (frames, squares, dim), means.
        shape: rows and columns of squares.
        square: (tokens_per_frame,) int64, the square of each token.
        likeness: (frames, squares), the least cosine of a square with one of its quarters; infinite for single tokens.
    """

    vectors: Tensor
    shape: tuple[int, int]
    square: Tensor
    likeness: Tensor


@register("sttm", options=SttmOptions, merge=False)
def sttm(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Quadtrees within frames, components over time."""
    levels = pyramid(features, config.options.shape(features.shape[1]), config.options.border_children)
    first_token, depth = covered(levels, _enough(levels, config.options.tau_s, budget))
    ids, node = first_token.unique(return_inverse=True)
    vectors = _vectors(levels, ids, depth)
    labels = components(vectors, node, budget)
    roots, slots = labels.unique(return_inverse=True)
    if len(roots) > budget:
        large = best(torch.bincount(slots[node.view(-1)]), budget)
        unit = normalised(group_means(Stored(vectors), slots, len(roots)))
        roots, slots = roots[large], most_similar(unit, large)[slots]
    means = group_means(Stored(vectors), slots, budget)
    return Kept(means, ids[roots], slots[node.view(-1)], spatial_tokens=len(ids))


def pyramid(features: Tensor, shape: tuple[int, int], border_children: bool) -> list[Level]:
    """Levels from single tokens on to the last one but that with a side of two squares, if there are several."""
    tokens = features.shape[1]
    each = torch.arange(tokens, device=features.device)
    levels = [Level(features, shape, each, torch.full_like(features[..., 0], torch.inf))]
    while min(levels[-1].shape) > 2:
        levels.append(_coarser(levels[-1], border_children))
    return levels[:-1] if len(levels) > 1 else levels


def _coarser(level: Level, border_children: bool) -> Level:
    """Squares of two by two; of an odd number of rows or columns the first one is left alone."""
    frames, _, dim = level.vectors.shape
    device = level.vectors.device
    values, parents = level.vectors.view(frames, *level.shape, dim), []
    for axis, length in enumerate(level.shape):
        parent = (torch.arange(length, device=device) + length % 2) // 2
        sizes = torch.bincount(parent)
        shape = list(values.shape)
        shape[axis + 1] = len(sizes)
        values = values.new_zeros(shape).index_add(axis + 1, parent, values)
        values = values / sizes.view([-1 if index == axis + 1 else 1 for index in range(4)])
        parents.append(parent)
    rows, columns = values.shape[1:3]
    parent = (parents[0].unsqueeze(1) * columns + parents[1]).view(-1)
    whole = values.flatten(1, 2)
    unit, quarters = normalised(whole), normalised(level.vectors)
    cosines = (unit[:, parent] * quarters).sum(dim=-1)
    likeness = torch.full_like(whole[..., 0], torch.inf).scatter_reduce(1, parent.expand_as(cosines), cosines, "amin")
    if border_children:
        border = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        border[: level.shape[0] % 2] = True
        border[:, : level.shape[1] % 2] = True
        corner = (unit * quarters[:, :1]).sum(dim=-1)
        likeness = torch.where(border.view(-1), likeness.minimum(corner), likeness)
    return Level(whole, (rows, columns), parent[level.square], likeness)


def covered(levels: list[Level], tau: float) -> tuple[Tensor, Tensor]:
    """The nodes that cover every frame: from the coarsest squares on, those that are like their quarters.

    Returns:
        The flat source index of the first token of each token's node, and the level of that node, both
        (frames, tokens_per_frame) int64.
    """
    frames, tokens, _ = levels[0].vectors.shape
    start = torch.arange(frames, device=levels[0].square.device).unsqueeze(1) * tokens
    first = torch.empty(frames, tokens, dtype=torch.int64, device=start.device)
    depth = torch.full_like(first, -1)
    for number, level in reversed(list(enumerate(levels))):
        here = (level.likeness >= tau)[:, level.square] & (depth < 0)
        corner = first_members(level.square, level.likeness.shape[1])[level.square]
        first = torch.where(here, start + corner, first)
        depth = torch.where(here, number, depth)
    return first, depth


def components(vectors: Tensor, node: Tensor, most: int) -> Tensor:
    """Join nodes that share a place in neighbouring frames, most similar first, down to a count where that is possible.

    Args:
        vectors: (nodes, dim).
        node: (frames, tokens_per_frame) int64, the node of each token.
        most: how many components there should be.

    Returns:
        (nodes,) int64, the lowest node of each one's component.
    """
    unit = normalised(vectors)
    u, v = node[:-1].reshape(-1), node[1:].reshape(-1)
    order = (unit[u] * unit[v]).sum(dim=-1).argsort(descending=True, stable=True)
    u, v = u[order], v[order]
    single = torch.arange(len(vectors), device=node.device)

    def few(edges: int) -> bool:
        return int((join(single, u[:edges], v[:edges]) == single).sum()) <= most

    edges = bisect_left(range(len(u)), True, key=few)  # an edge takes away one component at most
    return join(single, u[:edges], v[:edges])


def _enough(levels: list[Level], tau: float, budget: int) -> float:
    """The threshold within frames, raised as little as leaves at least `budget` nodes."""
    likeness = torch.cat([level.likeness.view(-1) for level in levels]).unique()
    taus = [tau, *likeness[likeness > tau].tolist()]
    index = torch.arange(levels[0].likeness.numel(), device=likeness.device)
    return taus[bisect_left(range(len(taus) - 1), True, key=lambda i: _count(levels, taus[i], index) >= budget)]


def _count(levels: list[Level], tau: float, index: Tensor) -> int:
    return int((covered(levels, tau)[0].view(-1) == index).sum())


def _vectors(levels: list[Level], ids: Tensor, depth: Tensor) -> Tensor:
    """The means (nodes, dim) of nodes with these first tokens."""
    _, tokens, dim = levels[0].vectors.shape
    vectors = levels[0].vectors.new_empty(len(ids), dim)
    own_depth = depth.view(-1)[ids]
    for number, level in enumerate(levels):
        some = own_depth == number
        vectors[some] = level.vectors[ids[some] // tokens, level.square[ids[some] % tokens]]
    return vectors
