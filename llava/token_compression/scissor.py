"""LLaVA-Scissor joins the tokens of each frame, then the representatives of all frames (Eq. 5 and 6). Both steps take
the connected components of the graph whose edges are the cosine similarities above one threshold tau.

Source: Semantic Connected Components (SCC), arXiv 2506.21862.
Cost: O(F N^2 D + T^2 D) operations, O(T D + F N^2 + T^2) memory, of whose squares no more than 2^21 numbers at a time.

With `similarity_threshold` that is all. With an exact budget of K tokens, tau is found instead of given. Threshold
components are single-linkage clusters, so a maximum spanning forest holds the components at every tau, and cutting it
gives every count. One forest over the tokens of each frame holds the spatial step at every tau; for one outcome of
the spatial step, a second forest gives the temporal threshold at which K tokens are left. One tau for both steps is
then a spatial tau whose temporal threshold is tau itself: `_cut_to` searches it, and cuts the temporal step to exactly
K tokens wherever the search ends. Where no tau serves both (the frames have nothing in common), the spatial step is
cut to K tokens and the temporal step has nothing left to do.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.clusters import arranged
from llava.token_compression.components import ANYWHERE, Window
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored, Vectors
from llava.token_compression.means import means_of
from llava.token_compression.paths import Graphs, Path, path_for
from llava.token_compression.registry import Kept, register

TOLERANCE = 0.01
"""How near to each other the thresholds of the two steps must come under an exact budget to end the search."""

EXPECTED_CHANGE = 1.5
"""How many times the last gap the temporal threshold is expected to change by, where it is not known better."""

FIRST_CHANGE = 0.1
"""How far from the first spatial threshold the temporal one is expected."""

MAX_CUTS = 5
"""How many outcomes of the spatial step the search looks at; each costs one forest, and the best one a second one if
it is not the last."""


@register("scissor", takes_threshold=True, any_dtype=True, takes_tokens=True)
def scissor(features: Tensor, config: CompressionConfig, budget: int | None, tokens: Stored | None = None) -> Kept:
    """Semantic Connected Components within frames and over all frames, by threshold or to an exact count."""
    frames = features.shape[0]
    tokens = tokens or Stored(features.flatten(0, 1))
    steps = Steps(path_for(tokens), config)
    if budget is None:
        assert config.similarity_threshold is not None
        return _threshold(steps, tokens, frames, config.similarity_threshold, config.temporal)
    if config.temporal:
        return _cut_to(steps, tokens, frames, budget)
    if budget < frames:
        raise ConfigError(
            f"Without the temporal step {frames} frames leave at least {frames} tokens, one each, but {budget} are "
            f"asked for; set temporal=True, or keep at least {frames}."
        )
    linkage = steps.linkage(tokens, frames, budget)
    tau, _ = linkage.trees.thresholds(budget)
    return _one_step(linkage.cut(budget), tau)


def sample_vertices(shape: tuple[int, int], error_tolerance: float, generator: torch.Generator) -> Tensor | None:
    """The vertices whose edges are looked at (Eq. 2): (graphs, vertices) bool on the CPU, or None for all.

    In each graph of N vertices, min(N, ceil(ln(N) / epsilon^2)) are drawn without replacement.
    """
    graphs, n = shape
    if n == 1 or n * error_tolerance**2 <= math.log(n):
        return None
    size = math.ceil(math.log(n) / error_tolerance**2)
    if size == n:
        return None
    drawn = torch.rand(graphs, n, generator=generator).argsort(dim=1)[:, :size]
    return torch.zeros(graphs, n, dtype=torch.bool).scatter_(1, drawn, True)


@dataclass(frozen=True)
class Clusters:
    """A partition of n vectors.

    Attributes:
        tokens: the k means of the clusters (Eq. 4).
        representatives: (k,) int64 ascending, each cluster's vertex of highest degree, the lowest one on ties.
        membership: (n,) int64, the cluster of each vector.
    """

    tokens: Vectors
    representatives: Tensor
    membership: Tensor


def form_clusters(vectors: Vectors, labels: Tensor, degrees: Tensor) -> Clusters:
    """Clusters of n vectors from component labels (n,) and vertex degrees (n,), in order of representatives."""
    membership, representatives, number = arranged(labels, degrees)
    representatives = representatives[: int(number)]
    return Clusters(means_of(vectors, membership, len(representatives)), representatives, membership)


class Steps:
    """What both steps do with the vectors that they are given.

    Args:
        path: the implementation.
        config: for its `error_tolerance` and `seed`.
    """

    def __init__(self, path: Path, config: CompressionConfig):
        self._path = path
        self._error_tolerance = config.error_tolerance
        self._seed = config.seed

    def components(self, vectors: Vectors, graphs: int, tau: float) -> Clusters:
        """The components of each graph at a threshold (Eq. 1 to 4)."""
        sampled = self._sampled(vectors, graphs)
        return form_clusters(vectors, *self._path.graphs(vectors, graphs).components(tau, sampled))

    def linkage(self, vectors: Vectors, graphs: int, least: int, window: Window = ANYWHERE) -> "Linkage":
        """Single-linkage clustering of each graph, to be cut at any count from `least` on.

        Given a window in which thresholds of a cut to `least` are expected, it may have to be cut to that.
        """
        return Linkage(vectors, self._path.graphs(vectors, graphs), self._sampled(vectors, graphs), least, window)

    def _sampled(self, vectors: Vectors, graphs: int) -> Tensor | None:
        generator = torch.Generator().manual_seed(self._seed)
        sampled = sample_vertices((graphs, vectors.count // graphs), self._error_tolerance, generator)
        return None if sampled is None else sampled.view(-1).to(vectors.device)


class Linkage:
    """Single-linkage clustering of the vectors of graphs, to be cut at any count from `least` on."""

    def __init__(self, vectors: Vectors, graphs: Graphs, sampled: Tensor | None, least: int, window: Window):
        self.vectors = vectors
        self._graphs = graphs
        self._joins_all = sampled is None
        self.trees = graphs.forest(vectors.count - least + 1, sampled, window)

    def cut(self, count: int) -> Clusters:
        """Exactly `count` clusters over all graphs, at least one in each."""
        labels = self.trees.cut(count)
        degrees = self._graphs.degrees(self.trees.thresholds(count)[0], labels if self._joins_all else None)
        return form_clusters(self.vectors, labels, degrees)


def _threshold(steps: Steps, tokens: Vectors, frames: int, tau: float, temporal: bool) -> Kept:
    """The published algorithm (Eq. 1 to 6)."""
    spatial = steps.components(tokens, frames, tau)
    if not temporal:
        return _one_step(spatial, tau)
    return _two_steps(spatial, steps.components(spatial.tokens, 1, tau), tau)


def _cut_to(steps: Steps, tokens: Vectors, frames: int, budget: int) -> Kept:
    """Exactly `budget` clusters after both steps, with thresholds as near to each other as `MAX_CUTS` attempts find.

    As a rule the temporal threshold falls as the spatial one rises (finer spatial clusters are less alike), so that
    the two cross once: a secant search between brackets, starting from equal compression in both steps.
    """
    least = max(budget, frames)
    linkage = steps.linkage(tokens, frames, least)
    count = max(least, round(math.sqrt(budget * tokens.count)))
    attempts: dict[int, tuple[float, float]] = {}  # spatial count: spatial threshold, and how far the temporal one is

    def attempt(count: int) -> tuple[Clusters, Linkage]:
        spatial, thresholds = linkage.cut(count), linkage.trees.thresholds(count)
        window = _expected(list(attempts.values()), thresholds)
        temporal = steps.linkage(spatial.tokens, 1, budget, window)
        attempts[count] = _nearest_thresholds(thresholds, temporal.trees.thresholds(budget))
        return spatial, temporal

    def gap(count: int) -> float:
        return abs(attempts[count][1])

    clusters: tuple[Clusters, Linkage] | None = None
    last = 0
    while count not in attempts and len(attempts) < MAX_CUTS:
        clusters = None  # before the next ones are made
        clusters, last = attempt(count), count
        if gap(count) <= TOLERANCE:
            break
        count = max(least, linkage.trees.components_above(_crossing(list(attempts.values()))))
    best = min(attempts, key=gap)
    if clusters is None or best != last:
        clusters = None
        clusters = attempt(best)
    spatial, temporal = clusters
    return _two_steps(spatial, temporal.cut(budget), sum(attempts[best]))


def _expected(attempts: list[tuple[float, float]], spatial: Window) -> Window:
    """Where the temporal threshold should be for these spatial ones: between those of lower and higher ones."""
    if not attempts:
        return spatial[0] - FIRST_CHANGE, spatial[1] + FIRST_CHANGE
    change = EXPECTED_CHANGE * abs(attempts[-1][1])
    above = [tau + gap for tau, gap in attempts if tau >= spatial[0]]
    below = [tau + gap for tau, gap in attempts if tau <= spatial[1]]
    lowest = max(above) if above else min(below) - change
    highest = min(below) if below else max(above) + change
    return lowest - TOLERANCE, highest + TOLERANCE


def _nearest_thresholds(spatial: tuple[float, float], temporal: tuple[float, float]) -> tuple[float, float]:
    """Of two ranges of thresholds, the spatial threshold next to the temporal ones, and how far those are above it."""
    if temporal[0] > spatial[1]:
        return spatial[1], temporal[0] - spatial[1]
    if temporal[1] < spatial[0]:
        return spatial[0], temporal[1] - spatial[0]
    return max(spatial[0], temporal[0]), 0.0


def _crossing(attempts: list[tuple[float, float]]) -> float:
    """The spatial threshold at which the gap to the temporal one should close; attempts are (threshold, gap)."""
    low = max((tau for tau, gap in attempts if gap > 0), default=-1.0)
    high = min((tau for tau, gap in attempts if gap < 0), default=1.0)
    tau, gap = attempts[-1]
    guess = tau + gap  # the temporal threshold depends little on the spatial one
    if len(attempts) > 1 and gap != attempts[-2][1]:
        before, gap_before = attempts[-2]
        guess = tau - gap * (tau - before) / (gap - gap_before)
    return guess if min(low, high) < guess < max(low, high) else (low + high) / 2


def _one_step(clusters: Clusters, tau: float) -> Kept:
    count = len(clusters.representatives)
    return Kept(clusters.tokens.rows(slice(None)), clusters.representatives, clusters.membership, count, tau)


def _two_steps(spatial: Clusters, temporal: Clusters, tau: float) -> Kept:
    return Kept(
        temporal.tokens.rows(slice(None)),
        spatial.representatives[temporal.representatives],
        temporal.membership[spatial.membership],
        len(spatial.representatives),
        tau,
    )
