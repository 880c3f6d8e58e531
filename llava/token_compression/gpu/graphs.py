"""Components, forests and nearest tokens by the Triton kernels, with the tree's rounds in PyTorch on the device."""

import contextlib
import functools
import math

import torch
from torch import Tensor

from llava.token_compression.components import ANYWHERE, Window, on_grid
from llava.token_compression.cosine import Stored, Tokens, Vectors, pair_cosines
from llava.token_compression.forest import (
    Edges,
    Forest,
    Gathering,
    TooCloseError,
    boruvka,
    completed,
    exits_among,
    forest_within,
)
from llava.token_compression.gpu import launch
from llava.token_compression.paths import FAST, Graphs, Path, SpanningTrees

PAIRS = 2**22
"""Pairs that are looked at between two waits for the device."""

GRAPHS = 65535
"""Forests found at a time: the limit of a grid's third dimension."""

LOOKUPS = 64
"""Exact cosines looked up per vector and round before the forest is left to the path without kernels."""


class TritonGraphs:
    """The cosine graphs of equal size of consecutive vectors, vertex i of graph b being vector b * n + i.

    Args:
        values: (vertices, dim) float32 or a half precision.
        graphs: number of graphs.
    """

    def __init__(self, values: Tensor, graphs: int):
        self._values = values.contiguous()
        self._inverse, self._unusual = launch.inverse_lengths(values)
        self._graphs = graphs
        self._size = len(values) // graphs
        self._otherwise: Graphs = FAST.graphs(Stored(values), graphs)

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        if not self._unusual:
            count = torch.full((1,), len(self._values), dtype=torch.int32, device=self._values.device)
            labels, degrees, wrong = launch.unite(
                self._values, self._inverse, self._graphs, count, on_grid(threshold), sampled
            )
            if not wrong:
                return labels, degrees
        return self._otherwise.components(threshold, sampled)

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees as `Graphs` in paths.py says."""
        return self.components(threshold, None)[1]

    def forest(self, needed: int, sampled: Tensor | None, window: Window = ANYWHERE) -> SpanningTrees:
        """The maximum spanning trees, of which at least the `needed` strongest edges are there."""
        if not self._unusual:
            with contextlib.suppress(TooCloseError):
                if self._graphs > 1:
                    return Forest(self._whole_forests(sampled), len(self._values), self._lookup)
                make = functools.partial(self._strongest_forest, needed, sampled)
                return forest_within(window, len(self._values) - needed + 1, make)
        return self._otherwise.forest(needed, sampled, window)

    def _whole_forests(self, sampled: Tensor | None) -> Edges:
        """All pairs of some graphs at a time."""
        doubt = launch.doubt(self._values.shape[1])
        step = min(GRAPHS, max(1, PAIRS // self._size**2))
        forest = []
        for first in range(0, self._graphs, step):
            block = slice(first * self._size, (first + step) * self._size)
            values, part = self._values[block], None if sampled is None else sampled[block]
            u, v, weight = launch.edges_above(
                values, self._inverse[block], len(values) // self._size, 0, self._size, -1 - doubt, part
            )

            def lookup(u: Tensor, v: Tensor, values: Tensor = values) -> Tensor:
                return pair_cosines(Stored(values), u, Stored(values), v)

            numbers = torch.arange(len(values), device=values.device)
            edges = Edges.between(u, v, weight, doubt)
            edges = boruvka(numbers, exits_among(edges), lookup, LOOKUPS * len(values))
            forest.append(Edges(edges.u + block.start, edges.v + block.start, edges.weight, edges.doubt))
        return completed(Edges.cat(forest), len(self._values), self._graphs)

    def _strongest_forest(self, needed: int, sampled: Tensor | None, window: Window) -> Forest:
        """Some rows of one graph at a time; what the strongest edges so far exclude is not listed any more."""
        n, dim = self._values.shape
        doubt = launch.doubt(dim)
        rows = launch.BLOCK * max(1, PAIRS // (n * launch.BLOCK))
        numbers = torch.arange(n, device=self._values.device)
        known = (-math.inf if window[0] <= -1 else window[0], window[1])
        gathering = Gathering(numbers, self._lookup, needed, known, doubt, LOOKUPS * n, 0, rows * n)
        for start in range(0, n, rows):
            low = max(-1.0, gathering.lowest) - doubt
            gathering.add(*launch.edges_above(self._values, self._inverse, 1, start, start + rows, low, sampled))
        edges = gathering.forest()
        if gathering.lowest < -1 and window == ANYWHERE:
            edges = completed(edges, n, 1)
        return Forest(edges, n, self._lookup, gathering.labels)

    def _lookup(self, u: Tensor, v: Tensor) -> Tensor:
        return pair_cosines(Stored(self._values), u, Stored(self._values), v)


def _graphs(vectors: Vectors, graphs: int) -> Graphs:
    if isinstance(vectors, Stored) and vectors.values.dtype != torch.float64:
        return TritonGraphs(vectors.values, graphs)
    return FAST.graphs(vectors, graphs)


def _nearest(source: Tokens, kept: Tokens, membership: Tensor, rows: Tensor) -> Tensor:
    """What `nearest_plain` in plain.py returns."""
    assert isinstance(source, Stored)
    assert isinstance(kept, Stored)
    values = source.values.contiguous()
    if values.dtype != torch.float64:
        inverse, unusual = launch.inverse_lengths(values)
        counts = torch.tensor([[len(rows)], [kept.count]], device=rows.device)
        best, wrong = launch.nearest(values, inverse, rows, counts[0], kept.values, counts[1])
        if not (wrong | unusual):
            return torch.where((inverse[rows] == 0) & (membership[rows] >= 0), membership[rows], best)
    return FAST.nearest(source, kept, membership, rows)


TRITON = Path(_graphs, _nearest)
