"""Which implementation computes components, forests and nearest tokens. All of them give the same results."""

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llava.token_compression.coarse import CoarseGraph, pays
from llava.token_compression.components import ANYWHERE, Window
from llava.token_compression.cosine import Halved, Stored, Tokens, Vectors
from llava.token_compression.dense import DenseGraphs
from llava.token_compression.nearest import nearest
from llava.token_compression.plain import PlainGraphs, nearest_plain
from llava.token_compression.pruned import LargeGraph

PLAIN_ENTRIES = 2**18
"""Up to so many entries of all vectors together the plain path is the fastest: it takes the fewest steps."""

DENSE_SIZE = 512
"""A graph of up to so many vertices is computed whole."""


COARSE_SIZE = 2**13
"""Of up to so many vectors all products of rounded ones, where they are fast, take less time than sketches."""


class SpanningTrees(Protocol):
    """The maximum spanning trees of graphs: all threshold components at once. See `SpanningForest` in components.py."""

    def cut(self, components: int) -> Tensor: ...

    def thresholds(self, components: int) -> tuple[float, float]: ...

    def components_above(self, threshold: float) -> int: ...


class Graphs(Protocol):
    """The cosine graphs of equal size of consecutive vectors, vertex i of graph b being vector b * n + i.

    `sampled` (vertices,) bool is the paper's vertex sampling, None for all vertices.
    """

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        ...

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees (vertices,) int64 in the graphs of cosines above a threshold, each vertex counting itself.

        Args:
            within: labels (vertices,) that no such edge leaves, if there are any. Degrees of vertices whose label
                occurs less than three times may then be 1: they are equal anyway.
        """
        ...

    def forest(self, needed: int, sampled: Tensor | None, window: Window = ANYWHERE) -> SpanningTrees:
        """The maximum spanning trees, of which at least the `needed` strongest edges are there.

        Args:
            window: where the weights of the last two of these are expected. It has no influence on a cut that uses all
                but the last one, except that this is found sooner; others may then be out of reach.
        """
        ...


@dataclass(frozen=True)
class Path:
    """An implementation.

    Attributes:
        graphs: makes the graphs of vectors, given their number.
        nearest: finds the most similar kept token; see `nearest_plain` in plain.py.
    """

    graphs: Callable[[Vectors, int], Graphs]
    nearest: Callable[[Tokens, Tokens, Tensor, Tensor], Tensor]


def _fast_graphs(vectors: Vectors, graphs: int) -> Graphs:
    if graphs > 1 or vectors.count <= DENSE_SIZE:
        return DenseGraphs(vectors, graphs)
    if pays(vectors) and vectors.count <= COARSE_SIZE:
        return CoarseGraph(vectors)
    return LargeGraph(vectors if isinstance(vectors, Stored) else Halved(vectors))


PLAIN = Path(PlainGraphs, nearest_plain)
FAST = Path(_fast_graphs, nearest)


@functools.cache
def has_kernels() -> bool:
    """Whether a Triton is installed whose atomic operations return what every thread may use."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= (3, 4)


def path_for(tokens: Vectors) -> Path:
    """The fastest path for the vectors of a video."""
    if tokens.count * tokens.dim <= PLAIN_ENTRIES:
        return PLAIN
    if tokens.device.type == "cuda" and has_kernels():
        from llava.token_compression.gpu.graphs import TRITON

        return TRITON
    return FAST
