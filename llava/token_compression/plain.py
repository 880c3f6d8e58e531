"""The plain path: whole similarity matrices in float64, as the equations say. What every faster path must equal."""

import torch
from torch import Tensor

from llava.token_compression.components import (
    ANYWHERE,
    UNRELATED,
    SpanningForest,
    Window,
    degrees_above,
    maximum_spanning_forest,
    normalised,
    similarities,
    threshold_components,
)
from llava.token_compression.cosine import Vectors, exact_products


class PlainGraphs:
    """The cosine graphs of equal size of consecutive vectors, vertex i of graph b being vector b * n + i.

    Args:
        tokens: of all graphs.
        graphs: number of graphs.
    """

    def __init__(self, tokens: Vectors, graphs: int):
        self._unit = normalised(tokens.rows(slice(None)).view(graphs, -1, tokens.dim).double())

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        return threshold_components(self._unit, threshold, sampled)

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees as `Graphs` in paths.py says."""
        return degrees_above(similarities(self._unit), threshold)

    def forest(self, needed: int, sampled: Tensor | None, window: Window = ANYWHERE) -> SpanningForest:
        """The maximum spanning forest of all graphs."""
        weights = similarities(self._unit)
        if sampled is not None:
            ends = sampled.view(weights.shape[:2])
            weights.masked_fill_(~(ends[:, :, None] | ends[:, None]), UNRELATED)
        return maximum_spanning_forest(weights)


def nearest_plain(source: Vectors, kept: Vectors, membership: Tensor, rows: Tensor) -> Tensor:
    """The kept token (len(rows),) int64 of highest cosine for some source tokens, the first one on ties.

    A zero vector is similar to nothing: it stays where it is part of, if it is.

    Args:
        membership: (source.count,) int64, the kept token that a source token is part of, -1 for none.
        rows: (m,) int64 source tokens.
    """
    vectors = source.rows(rows)
    best = exact_products(vectors, kept.rows(slice(None))).argmax(dim=1)
    stays = vectors.eq(0).all(dim=1) & (membership[rows] >= 0)
    return torch.where(stays, membership[rows], best)
