"""One large graph, whose cosines are computed only where a sketch does not bound them low enough.

Vectors are visited in an order that keeps similar ones together, a block of rows at a time against all vectors from
there on, so that each pair occurs once. Of these only the columns are multiplied that the sketch allows to be similar
enough to any row. Memory is bounded: the sketches, some edges, and the vectors and cosines of a pair of blocks.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.components import ANYWHERE, UNRELATED, Window, join, on_grid
from llava.token_compression.cosine import (
    LOOKUP_COST,
    Tokens,
    exact_products,
    exceeding,
    pair_cosines,
    products,
)
from llava.token_compression.forest import Forest, Gathering, TooCloseError, completed, forest_within
from llava.token_compression.sketch import Sketch

ROWS = 128
"""Vectors of a block of rows."""

COLUMN_ENTRIES = 2**20
"""Entries of the vectors multiplied by a block of rows at a time, 4 MB of float32; fewer if their dimensions are."""

BOUND_COLUMNS = 2**13
"""Sketches compared with a block of rows at a time."""

PENDING_EDGES = 2**19
"""Edges collected before they are reduced to a forest."""

PRUNED_SIZE = 1400
"""From so many vectors on, sketches save more than they cost."""

NEIGHBOURS = 2
"""Edges per vector from which the weakest edge of a forest is bounded before the search for all edges begins."""

LOOKUPS = 64
"""Exact cosines looked up per vector and round before all are computed in float64 instead."""

Reach = Callable[[int, int], Tensor]
"""Given a range of positions in some order, the positions after it that it is multiplied with."""


@dataclass(frozen=True)
class Part:
    """Pairs of vectors u (r,) and v (c,).

    Attributes:
        square: the first r of v are u themselves, so that only the pairs above their diagonal count.
        sampled: (n,) bool, one of the ends must be among these vectors, or None.
    """

    tokens: Tokens
    u: Tensor
    v: Tensor
    square: bool
    sampled: Tensor | None = None

    def cosines(self, exact: bool) -> Tensor:
        """(r, c) cosines, exact or within `slack`, `UNRELATED` for pairs that do not count."""
        u, v = _consecutive(self.u), _consecutive(self.v)
        if exact:
            cosines = exact_products(self.tokens.rows(u), self.tokens.rows(v))
        else:
            cosines = products(self.tokens.scaled(u), self.tokens.scaled(v))
        if self.square:
            twice = torch.ones(len(self.u), len(self.u), dtype=torch.bool, device=cosines.device).tril_()
            cosines[:, : len(self.u)].masked_fill_(twice, UNRELATED)
        if self.sampled is not None:
            cosines.masked_fill_(~(self.sampled[self.u, None] | self.sampled[self.v]), UNRELATED)
        return cosines

    def above(self, threshold: float) -> Tensor:
        """Which exact cosines exceed a threshold: (r, c), 1 or 0."""

        def decide(i: Tensor, j: Tensor) -> Tensor:
            return pair_cosines(self.tokens, self.u[i], self.tokens, self.v[j]) > threshold

        def exact() -> Tensor:
            return (self.cosines(exact=True) > threshold).float()

        return exceeding(self.cosines(exact=False), threshold, self.tokens.doubt, decide, exact, LOOKUP_COST)


def _consecutive(index: Tensor) -> Tensor | slice:
    """A slice instead of indices that it stands for: vectors that are sliced need not be copied."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index) and bool((index.diff() == 1).all()):
        return slice(first, last + 1)
    return index


class LargeGraph:
    """The cosine graph of n vectors.

    Args:
        tokens: the vectors; a zero vector has no edge.
    """

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self._columns = max(1, COLUMN_ENTRIES // max(tokens.dim, 4 * ROWS))
        self._largest_part = ROWS * max(ROWS, self._columns)
        self._order = torch.arange(tokens.count, device=tokens.device)
        self._sketches: Tensor | None = None
        if tokens.count >= PRUNED_SIZE:
            self._prepare()

    def _prepare(self) -> None:
        sketch = Sketch(self.tokens)
        sketches = sketch.all(self.tokens)
        pivots = sketches[:: math.isqrt(self.tokens.count)]
        nearest = torch.empty_like(self._order)
        for part, near in zip(sketches.split(BOUND_COLUMNS), nearest.split(BOUND_COLUMNS), strict=True):
            torch.argmax(part @ pivots.mT, dim=1, out=near)
        self._order = nearest.argsort(stable=True)
        self._sketches = sketches[self._order]
        self._margin = sketch.margin

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        threshold = on_grid(threshold)
        labels = torch.arange(self.tokens.count, device=self.tokens.device)
        degrees = torch.ones_like(labels)
        for u, v in self._edges(threshold):
            degrees += torch.bincount(torch.cat([u, v]), minlength=len(labels))
            if sampled is not None:
                kept = sampled[u] | sampled[v]
                u, v = u[kept], v[kept]
            labels = join(labels, u, v)
        return labels, degrees

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees as `Graphs` in paths.py says."""
        degrees = torch.ones(self.tokens.count, dtype=torch.int64, device=self.tokens.device)
        for u, v in self._edges(threshold) if within is None else self._edges_within(threshold, within):
            degrees += torch.bincount(torch.cat([u, v]), minlength=len(degrees))
        return degrees

    def _edges(self, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Ends of all edges above a threshold, many at a time."""
        return self._edges_above(threshold, self._order, functools.partial(self._reach, lowest=lambda: threshold))

    def _edges_within(self, threshold: float, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ends of the edges above a threshold between vectors of equal label, of which there are at least three."""
        order = labels.argsort(stable=True)
        order = order[torch.bincount(labels)[labels[order]] > 2]
        ends = torch.searchsorted(labels[order], labels[order], right=True)
        last = [*ends[ROWS - 1 :: ROWS].tolist(), len(order)]

        def reach(start: int, stop: int) -> Tensor:
            return torch.arange(stop, max(stop, last[start // ROWS]), device=labels.device)

        return self._edges_above(threshold, order, reach)

    def forest(self, needed: int, sampled: Tensor | None, window: Window = ANYWHERE) -> Forest:
        """A maximum spanning forest, as `Graphs` in paths.py says."""
        try:
            make = functools.partial(self._forest, needed, sampled, False)
            return forest_within(window, self.tokens.count - needed + 1, make)
        except TooCloseError:
            return self._forest(needed, sampled, True, ANYWHERE)

    def _forest(self, needed: int, sampled: Tensor | None, exact: bool, window: Window) -> Forest:
        doubt = 0.0 if exact else self.tokens.doubt
        lowest = self._first_bound(needed, sampled) if window[0] <= -1 else window[0]
        gathering = self._gathering(needed, (lowest, window[1]), doubt)
        reach = functools.partial(self._reach, lowest=lambda: gathering.lowest)
        for part in self._parts(self._order, reach, sampled):
            cosines = part.cosines(exact)
            i, j = (cosines >= max(-1.0, gathering.lowest) - doubt).nonzero(as_tuple=True)
            gathering.add(part.u[i], part.v[j], cosines[i, j])
        edges = gathering.forest()
        if gathering.lowest < -1 and window == ANYWHERE:
            edges = completed(edges, self.tokens.count, 1)
        return Forest(edges, self.tokens.count, self._lookup, gathering.labels)

    def _first_bound(self, needed: int, sampled: Tensor | None) -> float:
        """A weight that the `needed` strongest edges reach, from edges within blocks of rows; -inf if these are few."""
        gathering = self._gathering(needed, (-math.inf, 1.0), 0.0)
        for u in self._order.split(ROWS):
            cosines = Part(self.tokens, u, u, True, sampled).cosines(exact=False)
            weight, other = cosines.topk(min(NEIGHBOURS, len(u)), dim=1)
            i, j = (weight > UNRELATED).nonzero(as_tuple=True)
            gathering.add(u[i], u[other[i, j]], weight[i, j])
        gathering.forest()
        return gathering.lowest - 2 * self.tokens.doubt

    def _gathering(self, needed: int, window: Window, doubt: float) -> Gathering:
        numbers = torch.arange(self.tokens.count, device=self.tokens.device)
        limit = LOOKUPS * self.tokens.count
        return Gathering(numbers, self._lookup, needed, window, doubt, limit, PENDING_EDGES, self._largest_part)

    def _edges_above(self, threshold: float, order: Tensor, reach: Reach) -> Iterator[tuple[Tensor, Tensor]]:
        """Ends (k,) and (k,) of the pairs, among those that `reach` allows, whose exact cosine exceeds a threshold.

        They come many at a time, in memory that is used again for the next ones.
        """
        pending = torch.empty(2, PENDING_EDGES + self._largest_part, dtype=torch.int64, device=order.device)
        count = 0
        for part in self._parts(order, reach):
            i, j = part.above(threshold).nonzero(as_tuple=True)
            pending[0, count : count + len(i)], pending[1, count : count + len(i)] = part.u[i], part.v[j]
            count += len(i)
            if count > PENDING_EDGES:
                yield pending[0, :count], pending[1, :count]
                count = 0
        yield pending[0, :count], pending[1, :count]

    def _parts(self, order: Tensor, reach: Reach, sampled: Tensor | None = None) -> Iterator[Part]:
        for start in range(0, len(order), ROWS):
            u = order[start : start + ROWS]
            others = order[reach(start, start + len(u))]
            first, *rest = torch.cat([u, others]).split(max(len(u), self._columns))
            yield Part(self.tokens, u, first, True, sampled)
            for v in rest:
                yield Part(self.tokens, u, v, False, sampled)

    def _reach(self, start: int, stop: int, lowest: Callable[[], float]) -> Tensor:
        """Positions from `stop` on of vectors that may have a cosine of `lowest()` or more with one from `start` on."""
        if self._sketches is None:
            return torch.arange(stop, self.tokens.count, device=self.tokens.device)
        rows = self._sketches[start:stop]
        best = [(rows @ part.mT).amax(dim=0) for part in self._sketches[stop:].split(BOUND_COLUMNS)]
        return stop + (torch.cat([*best, rows.new_empty(0)]) >= lowest() - self._margin).nonzero().view(-1)

    def _lookup(self, u: Tensor, v: Tensor) -> Tensor:
        return pair_cosines(self.tokens, u, self.tokens, v)
