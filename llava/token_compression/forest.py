"""Maximum spanning forests of edges whose weights are known up to a doubt.

Boruvka's algorithm takes the strongest edge out of every component, round by round. With weights in doubt several
edges may be the strongest one; only for those the exact weight is looked up, so that the forest is the exact one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.components import ANYWHERE, UNRELATED, Window, join

Exact = Callable[[Tensor, Tensor], Tensor]
"""Looks up the exact weights (k,) float64 of the edges between vertices u and v, (k,) int64 each."""


class TooCloseError(Exception):
    """So many weights are too close to each other that looking them up one by one would take too long."""


@dataclass
class Edges:
    """Edges between numbered vertices.

    Attributes:
        u, v: (k,) int64 ends, u < v.
        weight: (k,) float64.
        doubt: (k,) float64, by how much each weight may be off; 0 for an exact one.
    """

    u: Tensor
    v: Tensor
    weight: Tensor
    doubt: Tensor

    def __len__(self) -> int:
        return len(self.u)

    def __getitem__(self, index: Tensor | slice) -> "Edges":
        return Edges(self.u[index], self.v[index], self.weight[index], self.doubt[index])

    @classmethod
    def between(cls, u: Tensor, v: Tensor, weight: Tensor, doubt: float) -> "Edges":
        """Edges in any orientation, equally doubtful."""
        weight = weight.to(torch.float64, copy=True)
        return cls(torch.minimum(u, v), torch.maximum(u, v), weight, torch.full_like(weight, doubt))

    @classmethod
    def cat(cls, parts: "list[Edges]") -> "Edges":
        columns = zip(*((part.u, part.v, part.weight, part.doubt) for part in parts), strict=True)
        return cls(*map(torch.cat, columns))

    def weakest(self, count: int) -> float:
        """A weight that the strongest `count` edges surely reach; minus infinity if there are fewer."""
        if len(self) < count:
            return -math.inf
        return float((self.weight - self.doubt).sort(descending=True).values[count - 1])

    def settle(self, which: Tensor, exact: Exact, limit: int | None = None) -> None:
        """Look up the weights in doubt among those at `which`, (k,) int64 indices.

        Raises:
            TooCloseError: they are more than `limit`.
        """
        which = which[self.doubt[which] > 0]
        if limit is not None and len(which) > limit:
            raise TooCloseError
        if len(which) > 0:
            self.weight[which] = exact(self.u[which], self.v[which])
            self.doubt[which] = 0

    def strongest_first(self) -> Tensor:
        """Indices in order of descending weight; equal ones by ascending (u, v)."""
        order = self.v.argsort(stable=True)
        order = order[self.u[order].argsort(stable=True)]
        return order[self.weight[order].argsort(descending=True, stable=True)]


def boruvka(vertices: Tensor, exits: Callable[[Tensor], Edges], exact: Exact, limit: int) -> Edges:
    """The edges of the maximum spanning forest, in no particular order; weights on which nothing hung stay in doubt.

    Equal weights are ordered by their lower, then by their higher vertex, so the forest is unique.

    Args:
        vertices: (n,) int64, `arange(n)`.
        exits: called with the component labels (n,) int64; returns all edges that may be the strongest one out of
            their component, possibly more and possibly repeated, and none once no edge leaves a component.
        exact: looks weights up.
        limit: to the number of weights looked up in one round.

    Raises:
        TooCloseError: that number is exceeded.
    """
    labels, forest = vertices, []
    while True:
        picked = _strongest_exits(_distinct(exits(labels), len(labels)), labels, exact, limit)
        forest.append(picked)
        if len(picked) == 0:
            return Edges.cat(forest)
        labels = join(labels, picked.u, picked.v)


def exits_among(edges: Edges) -> Callable[[Tensor], Edges]:
    """The argument `exits` of `boruvka` for a list of edges."""

    def exits(labels: Tensor) -> Edges:
        nonlocal edges
        edges = edges[(labels[edges.u] != labels[edges.v]).nonzero().view(-1)]
        near, _ = _near_best(edges, labels)
        return edges[near.any(dim=0).nonzero().view(-1)]

    return exits


def _near_best(edges: Edges, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each edge may be the strongest at its lower and at its higher end: (2, k) bool; the ends' labels."""
    ends = torch.stack([labels[edges.u], labels[edges.v]])
    best = torch.full((len(labels),), -torch.inf, dtype=torch.float64, device=labels.device)
    for end in ends:
        best.scatter_reduce_(0, end, edges.weight - edges.doubt, "amax")
    return edges.weight + edges.doubt >= best[ends], ends


def _strongest_exits(edges: Edges, labels: Tensor, exact: Exact, limit: int) -> Edges:
    near, ends = _near_best(edges, labels)
    rivals = torch.bincount(ends[near], minlength=len(labels))
    edges.settle((near & (rivals[ends] > 1)).any(dim=0).nonzero().view(-1), exact, limit)
    order = edges.weight.argsort(descending=True, stable=True)  # distinct edges ascend by (u, v)
    rank = torch.arange(len(order), device=labels.device)
    first = torch.full_like(labels, len(order))
    for end in ends:
        first.scatter_reduce_(0, end[order], rank, "amin")
    return edges[order[first[first < len(order)].unique()]]


def _distinct(edges: Edges, vertices: int) -> Edges:
    code = edges.u * vertices + edges.v
    order = code.argsort(stable=True)
    return edges[order[code[order].diff(prepend=code.new_tensor([-1])) > 0]]


class Gathering:
    """The strongest edges of a maximum spanning forest of edges that come in parts.

    Edges are collected in memory that is allocated once (many small tensors would scatter over it), and reduced to
    their forest when it is full: the forest of all edges is that of the forests of any parts of them.

    Args:
        vertices: (n,) int64, `arange(n)`.
        exact: looks weights up.
        needed: how many edges of the forest are wanted.
        window: no edge weaker than the first weight is wanted (minus infinity if that is not known yet); what edges
            stronger than the second one join is only joined.
        doubt: by how much the weights of the edges to come may be off.
        limit: as for `boruvka`.
        capacity: edges that are collected before they are reduced.
        largest: edges of a part, at most.

    Attributes:
        lowest: the first weight of the window; rises as more is known.
        labels: (n,) int64, of the vertices that edges stronger than the window join.
    """

    def __init__(
        self,
        vertices: Tensor,
        exact: Exact,
        needed: int,
        window: Window,
        doubt: float,
        limit: int,
        capacity: int,
        largest: int,
    ):
        self.lowest, self._highest = window
        self.labels, self._exact, self._needed, self._doubt, self._limit = vertices, exact, needed, doubt, limit
        self._capacity = capacity
        self._ends = torch.empty(2, capacity + largest, dtype=torch.int64, device=vertices.device)
        self._weight = torch.empty(capacity + largest, dtype=torch.float64, device=vertices.device)
        self._count = 0
        self._forest = self._taken()

    def add(self, u: Tensor, v: Tensor, weight: Tensor) -> None:
        """Add edges with ends (k,) and (k,) int64 and weights (k,)."""
        if self._highest < 1:
            stronger = weight > self._highest + self._doubt
            self.labels = join(self.labels, u[stronger], v[stronger])
            apart = (self.labels[u] != self.labels[v]).nonzero().view(-1)
            u, v, weight = u[apart], v[apart], weight[apart]
        block = slice(self._count, self._count + len(u))
        self._ends[0, block], self._ends[1, block], self._weight[block] = u, v, weight
        self._count += len(u)
        if self._count > self._capacity:
            self.forest()

    def forest(self) -> Edges:
        """The forest of all edges so far.

        Raises:
            TooCloseError: too many weights would have to be looked up.
        """
        edges = Edges.cat([self._forest, self._taken()])
        self._forest = boruvka(self.labels, exits_among(edges), self._exact, self._limit)
        self.lowest = max(self.lowest, self._forest.weakest(self._needed))
        return self._forest

    def _taken(self) -> Edges:
        ends, weight = self._ends[:, : self._count], self._weight[: self._count]
        self._count = 0
        return Edges.between(ends[0], ends[1], weight, self._doubt)


def completed(edges: Edges, vertices: int, graphs: int) -> Edges:
    """A forest with an `UNRELATED` edge from the first vertex of each graph to every component that it does not reach.

    Args:
        edges: of a maximum spanning forest.
        vertices: number of vertices of all graphs together, numbered graph by graph.
        graphs: number of graphs, all of one size.
    """
    numbers = torch.arange(vertices, device=edges.u.device)
    size = vertices // graphs
    alone = ((join(numbers, edges.u, edges.v) == numbers) & (numbers % size > 0)).nonzero().view(-1)
    weight = torch.full_like(alone, UNRELATED, dtype=torch.float64)
    return Edges.cat([edges, Edges(alone // size * size, alone, weight, torch.zeros_like(weight))])


def forest_within(window: Window, components: int, make: Callable[[Window], "Forest"]) -> "Forest":
    """The forest that `make` finds in a window of weights, if it can be cut to so many components; else the whole.

    Which edges above the window make up the forest is unknown, but not what all of them together join.
    """
    forest = make(window)
    if window == ANYWHERE or forest.settles(components, window[1]):
        return forest
    return make(ANYWHERE)


class Forest:
    """A maximum spanning forest, to be cut at any number of components that its edges allow.

    Weights in doubt are looked up where an answer hangs on them.

    Args:
        edges: all edges of the forest, or its strongest ones.
        vertices: number of vertices.
        exact: looks weights up.
        joined: (vertices,) int64 labels of vertices joined by stronger edges, which are not among these.
    """

    def __init__(self, edges: Edges, vertices: int, exact: Exact, joined: Tensor | None = None):
        self.vertices = vertices
        self._edges = edges[edges.strongest_first()]
        self._exact = exact
        self._known: dict[int, float] = {}
        numbers = torch.arange(vertices, device=edges.u.device)
        self._joined = numbers if joined is None else joined
        self._apart = int((self._joined == numbers).sum())

    def cut(self, components: int) -> Tensor:
        """Labels (vertices,) int64 of exactly `components` single-linkage clusters."""
        count = self._apart - components
        if count > 0:
            self._settle_around(count - 1)
        return join(self._joined, self._edges.u[:count], self._edges.v[:count])

    def thresholds(self, components: int) -> tuple[float, float]:
        """Lowest and highest threshold of a cut: the strongest similarity left out and the weakest one used.

        From the first up to, but not including, the second, the components of all similarities strictly above the
        threshold are the clusters of the cut. With ties both are equal, and there is no such threshold.
        """
        count = self._apart - components
        lowest = max(-1.0, self._settle_around(count)) if count < len(self._edges) else -1.0
        highest = max(-1.0, self._settle_around(count - 1)) if count > 0 else 1.0
        return lowest, highest

    def components_above(self, threshold: float) -> int:
        """Number of components of the graphs whose edges are the similarities strictly above `threshold`."""
        self._settle((self._edges.weight - threshold).abs() <= self._edges.doubt)
        return self._apart - int((self._edges.weight > threshold).sum())

    def settles(self, components: int, below: float) -> bool:
        """Whether the edges that decide on the cut at so many components are here, none stronger than `below`."""
        count = self._apart - components
        return 0 < count < len(self._edges) and self.thresholds(components)[1] <= below

    def _settle_around(self, position: int) -> float:
        """Make sure which edge is the one at `position` in descending order; return its exact weight.

        The weight found there is off by no more than the largest doubt, and so is any other: an edge more than twice
        that doubt away is on the right side of this position already.
        """
        if position not in self._known:
            weight = self._edges.weight
            self._settle((weight - weight[position]).abs() <= 2 * self._edges.doubt.max())
            self._known[position] = float(self._edges.weight[position])
        return self._known[position]

    def _settle(self, near: Tensor) -> None:
        unsure = (near & (self._edges.doubt > 0)).nonzero().view(-1)
        if len(unsure) > 0:
            self._edges.settle(unsure, self._exact)
            if not self._in_order():
                self._edges = self._edges[self._edges.strongest_first()]

    def _in_order(self) -> bool:
        """Whether weights descend, and equal ones are as they were when they were last ordered: that takes a while."""
        step, exact = self._edges.weight.diff(), self._edges.doubt == 0
        return bool(((step < 0) | ((step == 0) & ~(exact[1:] | exact[:-1]))).all())
