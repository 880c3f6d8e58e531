"""Connected components and maximum spanning trees of cosine-similarity graphs, exact and vectorised.

Vertices are token vectors; an edge joins two of them whose cosine similarity exceeds a threshold (Eq. 1 of the
LLaVA-Scissor paper). Graphs come in batches (one per frame) of equal size: vertex i of graph b has the number
`b * N + i`, and no edge joins two graphs. Nothing loops over vertices or edges in Python: rounds are logarithmic in N,
and similarities are visited in blocks of rows. All results are deterministic and do not depend on the device beyond
the rounding of the similarities themselves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**21
"""Similarities handled at a time: 8 MB of float32, which stays near the processor's cache."""

Window = tuple[float, float]
"""Lowest and highest value."""

ANYWHERE: Window = (-1.0, 1.0)
"""Where cosines are."""

UNRELATED = -2.0
"""Edge weight, below every cosine, between vectors that nothing makes similar: taken last, so that every tree spans."""

RESOLUTION = 2.0**-40
"""Cosines are compared after rounding to multiples of this: far above the rounding errors of float64, so that equal
vectors are exactly equally similar in whatever order a product is summed, and far below those of float32."""


def on_grid(cosine: float) -> float:
    """The multiple of `RESOLUTION` nearest to a number; the higher one of two."""
    return math.floor(cosine / RESOLUTION + 0.5) * RESOLUTION


def rounded(cosines: Tensor) -> Tensor:
    """Cosines rounded as by `on_grid`, in place."""
    return cosines.div_(RESOLUTION).add_(0.5).floor_().mul_(RESOLUTION)


def normalised(vectors: Tensor) -> Tensor:
    """Vectors (..., dim) scaled to length 1; a zero vector stays zero."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not ((lengths > 1e-15) & (lengths < 1e15)).all():  # zero vectors, and squares that may under- or overflow
        largest = torch.linalg.vector_norm(vectors, ord=float("inf"), dim=-1, keepdim=True)
        vectors = vectors / torch.where(largest > 0, largest, 1)
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1)
    return vectors / lengths


def connected_components(edges: Tensor) -> Tensor:
    """The lowest vertex of each vertex's component: (B, N) int64, numbered within its graph.

    Args:
        edges: (B, N, N) floating and symmetric, 1 where there is an edge and 0 elsewhere; the diagonal does not matter.
    """
    batch, n, _ = edges.shape
    vertices = torch.arange(batch * n, device=edges.device)
    end = vertices // n * n + n
    heights = torch.empty_like(edges)

    def lowest_neighbour(labels: Tensor) -> Tensor:
        """By label; a product and a maximum are faster than a look at every edge."""
        torch.mul(edges, (end - labels).to(edges.dtype).view(batch, 1, n), out=heights)
        return end - heights.amax(dim=2).long().view(-1)

    labels = _flattened(torch.minimum(vertices, lowest_neighbour(vertices)))
    rows = (lowest_neighbour(labels) < labels).nonzero().view(-1)  # most edges lie within these trees
    row, other = (heights.view(-1, n)[rows] > (end - labels)[rows, None]).nonzero(as_tuple=True)
    u = rows[row]
    return join(labels, u, u // n * n + other).view(batch, n) % n


def join(labels: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Component labels after adding edges: every label is the lowest vertex of its component.

    Each round hooks every component onto its lowest neighbour and flattens the resulting trees by pointer jumping. Two
    rounds at least halve the number of components that still have a neighbour.

    Args:
        labels: (n,) int64, as returned by this function; `arange(n)` for a graph without edges.
        u, v: (edges,) int64 ends of the new edges, in any order and with repetitions.
    """
    while True:
        u, v = labels[u], labels[v]
        apart = u != v
        u, v = u[apart], v[apart]
        if u.numel() == 0:
            return labels
        labels = _flattened(labels.scatter_reduce(0, torch.maximum(u, v), torch.minimum(u, v), "amin"))


def threshold_components(unit: Tensor, threshold: float, sampled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Components of the graphs whose edges are the cosine similarities strictly above `threshold`.

    Args:
        unit: (B, N, dim) vectors of length 1, or 0; a zero vector has no edge.
        threshold: at 1 no edge is left, whatever rounding makes of the similarity of equal vectors.
        sampled: (B, N) bool, the paper's vertex sampling: only edges with a sampled end join components.

    Returns:
        labels (B * N,) int64, the lowest vertex of each component, and degrees (B * N,) int64 in the full graph, each
        vertex counting itself.
    """
    count = unit.shape[0] * unit.shape[1]
    labels = torch.arange(count, device=unit.device)
    degrees = torch.ones_like(labels)
    threshold = on_grid(threshold)
    if threshold >= 1:
        return labels, degrees
    present = unit.ne(0).any(dim=-1).view(-1) if threshold < 0 else None
    for u, v in _edges_above(unit, threshold):
        if present is not None:
            kept = present[u] & present[v]
            u, v = u[kept], v[kept]
        degrees += torch.bincount(u, minlength=count) + torch.bincount(v, minlength=count)
        if sampled is not None:
            kept = sampled.view(-1)[u] | sampled.view(-1)[v]
            u, v = u[kept], v[kept]
        labels = join(labels, u, v)
    return labels, degrees


def similarities(unit: Tensor) -> Tensor:
    """Symmetric edge weights (B, N, N): the cosines of unit vectors (B, N, dim).

    Every edge of a zero vector, and the diagonal, is `UNRELATED`.
    """
    batch, n, _ = unit.shape
    weights = unit.new_empty(batch, n, n)
    for graphs, row, block in _upper_blocks(unit):
        end = row + block.shape[1]
        square = block[:, :, : end - row]
        square.copy_(square.triu() + square.triu(1).mT)
        weights[graphs, row:end, row:] = block
        weights[graphs, end:, row:end] = block[:, :, end - row :].mT
    absent = unit.eq(0).all(dim=-1)
    if absent.any():
        weights.masked_fill_(absent[:, :, None] | absent[:, None, :], UNRELATED)
    weights.diagonal(dim1=1, dim2=2).fill_(UNRELATED)
    return weights


def degrees_above(weights: Tensor, threshold: float) -> Tensor:
    """Degrees (B * N,) int64 in the graphs of weights (B, N, N) above `threshold`; each vertex counts itself."""
    rows = weights.view(-1, weights.shape[-1]).split(max(1, BLOCK_ENTRIES // weights.shape[-1]))
    return torch.cat([(block > threshold).to(weights.dtype).sum(dim=1) for block in rows]).long() + 1


@dataclass(frozen=True)
class SpanningForest:
    """The edges of one maximum spanning tree per graph, strongest first: all threshold components at once.

    Attributes:
        u, v: (edges,) int64 ends, u < v.
        weight: (edges,) similarities in descending order; equal ones by ascending (u, v).
        vertices: number of vertices of all graphs together.
    """

    u: Tensor
    v: Tensor
    weight: Tensor
    vertices: int

    def cut(self, components: int) -> Tensor:
        """Labels (vertices,) int64 of exactly `components` single-linkage clusters."""
        edges = self.vertices - components
        labels = torch.arange(self.vertices, device=self.u.device)
        return join(labels, self.u[:edges], self.v[:edges])

    def thresholds(self, components: int) -> tuple[float, float]:
        """Lowest and highest threshold of a cut: the strongest similarity left out and the weakest one used.

        From the first up to, but not including, the second, the components of all similarities strictly above the
        threshold are the clusters of the cut. With ties both are equal, and there is no such threshold.
        """
        edges = self.vertices - components
        lowest = max(-1.0, float(self.weight[edges])) if edges < len(self.weight) else -1.0
        highest = max(-1.0, float(self.weight[edges - 1])) if edges > 0 else 1.0
        return lowest, highest

    def components_above(self, threshold: float) -> int:
        """Number of components of the graphs whose edges are the similarities strictly above `threshold`."""
        return self.vertices - int((self.weight > threshold).sum())


def maximum_spanning_forest(weights: Tensor) -> SpanningForest:
    """Boruvka's algorithm on complete graphs: at most log2(N) rounds, each one pass over `weights`.

    Equal weights are ordered by their lower, then by their higher vertex, so the forest is unique.

    Args:
        weights: (B, N, N) symmetric, finite; the diagonal does not matter.
    """
    batch, n, _ = weights.shape
    count = batch * n
    labels = torch.arange(count, device=weights.device)
    us, vs, strengths = [labels[:0]], [labels[:0]], [weights.view(-1)[:0]]
    for _ in range((n - 1).bit_length()):
        roots, edge, strength = _strongest_exits(weights, labels)
        u, v = edge // count, edge % count
        target = torch.where(labels[u] == roots, labels[v], labels[u])
        parent = torch.arange(count, device=weights.device)
        parent[roots] = target
        first_of_two = (parent[target] == roots) & (roots < target)  # both chose this edge: keep it once
        parent[roots[first_of_two]] = roots[first_of_two]
        us.append(u[~first_of_two])
        vs.append(v[~first_of_two])
        strengths.append(strength[~first_of_two])
        labels = _flattened(parent)[labels]
        if sum(map(len, us)) == count - batch:
            break
    u, v, weight = torch.cat(us), torch.cat(vs), torch.cat(strengths)
    order = (u * count + v).argsort()
    order = order[weight[order].argsort(descending=True, stable=True)]
    return SpanningForest(u[order], v[order], weight[order], count)


def _strongest_exits(weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each component that has an exit: its root, its strongest edge to another component, and that edge's weight.

    Edges are coded as `low * count + high`.
    """
    batch, n, _ = weights.shape
    count = batch * n
    own = labels.to(torch.int32).view(batch, n)

    step = max(1, BLOCK_ENTRIES // count)
    rows = [slice(start, start + step) for start in range(0, n, step)]
    best = torch.cat([_outward(weights[:, row], own[:, row], own[:, None]).amax(dim=-1) for row in rows], dim=1).view(
        -1
    )
    strongest = torch.full_like(best, -torch.inf).scatter_reduce(0, labels, best, "amax")
    ends = ((best == strongest[labels]) & (best > -torch.inf)).nonzero().view(-1)
    partners = [
        _outward(weights.view(count, n)[end], labels[end].to(torch.int32), own[end // n]).argmax(dim=-1)
        for end in ends.split(max(1, BLOCK_ENTRIES // n))
    ]
    other = torch.cat(partners) + ends // n * n
    code = torch.minimum(ends, other) * count + torch.maximum(ends, other)
    first = torch.full_like(labels, count * count).scatter_reduce(0, labels[ends], code, "amin")
    roots = (first < count * count).nonzero().view(-1)
    return roots, first[roots], strongest[roots]


def _outward(weights: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Edge weights (..., rows, N), or (rows, N), with -inf where an edge stays inside the component of its row."""
    return torch.where(own.unsqueeze(-1) == others, -torch.inf, weights)


def _flattened(parent: Tensor) -> Tensor:
    """Every vertex's root, by pointer jumping."""
    while True:
        grandparent = parent[parent]
        if torch.equal(grandparent, parent):
            return parent
        parent = grandparent


def _edges_above(unit: Tensor, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
    n = unit.shape[1]
    for graphs, row, block in _upper_blocks(unit):
        graph, i, j = (block > threshold).triu_(1).nonzero(as_tuple=True)
        first = (graph + graphs.start) * n + row
        yield first + i, first + j


def _upper_blocks(unit: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Similarities of each pair once: (graphs, row, block), block[:, i, j] being that of vertices row + i and row + j.

    Below the diagonal of its leading square a block repeats what is above it, up to rounding.
    """
    batch, n, _ = unit.shape
    rows = max(1, min(n, BLOCK_ENTRIES // n))
    graphs = max(1, BLOCK_ENTRIES // (rows * n))
    for first in range(0, batch, graphs):
        part = unit[first : first + graphs]
        for row in range(0, n, rows):
            yield slice(first, first + len(part)), row, rounded(part[:, row : row + rows] @ part[:, row:].mT)
