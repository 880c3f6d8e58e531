"""LLaVA-Scissor: two steps of Semantic Connected Components (SCC), arXiv 2506.21862.

The spatial step (Eq. 5) joins the tokens of each frame, the temporal step (Eq. 6) joins the representatives of all
frames; both by the connected components of the graph whose edges are the cosine similarities above one threshold tau.

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
from llava.token_compression.components import (
    UNRELATED,
    degrees_above,
    maximum_spanning_forest,
    normalised,
    similarities,
    threshold_components,
)
from llava.token_compression.config import CompressionConfig
from llava.token_compression.merge import group_means
from llava.token_compression.registry import Kept, register

TOLERANCE = 0.01
"""How near to each other the thresholds of the two steps must come under an exact budget to end the search."""

MAX_CUTS = 5
"""How many outcomes of the spatial step the search looks at; each costs one similarity matrix."""


@register("scissor", takes_threshold=True)
def scissor(features: Tensor, config: CompressionConfig, budget: int | None) -> Kept:
    """Semantic Connected Components within frames and over all frames, by threshold or to an exact count."""
    generator = torch.Generator().manual_seed(config.seed)
    if budget is None:
        assert config.similarity_threshold is not None
        return _threshold(features, config.similarity_threshold, config, generator)
    frames = features.shape[0]
    if config.temporal:
        return _cut_to(features, budget, config.error_tolerance, generator)
    if budget < frames:
        raise ConfigError(
            f"Without the temporal step {frames} frames leave at least {frames} tokens, one each, but {budget} are "
            f"asked for; set temporal=True, or keep at least {frames}."
        )
    linkage = Linkage(features, config.error_tolerance, generator)
    clusters = linkage.cut(budget)
    tau, _ = linkage.forest.thresholds(budget)
    return Kept(clusters.tokens, clusters.representatives, clusters.membership, budget, tau)


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
        tokens: (k, dim), the mean of each cluster (Eq. 4).
        representatives: (k,) int64 ascending, each cluster's vertex of highest degree, the lowest one on ties.
        membership: (n,) int64, the cluster of each vector.
    """

    tokens: Tensor
    representatives: Tensor
    membership: Tensor


def form_clusters(vectors: Tensor, labels: Tensor, degrees: Tensor) -> Clusters:
    """Clusters of vectors (n, dim) from component labels (n,) and vertex degrees (n,), in order of representatives."""
    n = len(labels)
    rank = degrees * n + torch.arange(n - 1, -1, -1, device=labels.device)
    highest = torch.zeros_like(labels).scatter_reduce(0, labels, rank, "amax")[labels]
    representative = n - 1 - highest % n  # of the cluster of each vertex
    chosen = torch.zeros_like(labels).index_fill_(0, representative, 1)
    membership = (chosen.cumsum(0) - 1)[representative]
    representatives = chosen.nonzero().view(-1)
    return Clusters(group_means(vectors, membership, len(representatives)), representatives, membership)


class Linkage:
    """Single-linkage clustering of each graph's vectors (graphs, n, dim), to be cut at any count."""

    def __init__(self, vectors: Tensor, error_tolerance: float, generator: torch.Generator):
        self.vectors = vectors.flatten(0, 1)
        self.weights = similarities(normalised(vectors))
        weights = self.weights
        sampled = sample_vertices((vectors.shape[0], vectors.shape[1]), error_tolerance, generator)
        if sampled is not None:
            sampled = sampled.to(weights.device)
            weights = weights.masked_fill(~(sampled[:, :, None] | sampled[:, None, :]), UNRELATED)
        self.forest = maximum_spanning_forest(weights)

    def cut(self, count: int) -> Clusters:
        """Exactly `count` clusters over all graphs, at least one in each."""
        degrees = degrees_above(self.weights, self.forest.thresholds(count)[0])
        return form_clusters(self.vectors, self.forest.cut(count), degrees)


def _threshold(features: Tensor, tau: float, config: CompressionConfig, generator: torch.Generator) -> Kept:
    """The published algorithm (Eq. 1 to 6)."""

    def step(vectors: Tensor) -> Clusters:
        sampled = sample_vertices((vectors.shape[0], vectors.shape[1]), config.error_tolerance, generator)
        sampled = sampled if sampled is None else sampled.to(vectors.device)
        return form_clusters(vectors.flatten(0, 1), *threshold_components(normalised(vectors), tau, sampled))

    spatial = step(features)
    if not config.temporal:
        return Kept(spatial.tokens, spatial.representatives, spatial.membership, len(spatial.tokens), tau)
    return _two_steps(spatial, step(spatial.tokens.unsqueeze(0)), tau)


def _cut_to(features: Tensor, budget: int, error_tolerance: float, generator: torch.Generator) -> Kept:
    """Exactly `budget` clusters after both steps, with thresholds as near to each other as `MAX_CUTS` attempts find.

    As a rule the temporal threshold falls as the spatial one rises (finer spatial clusters are less alike), so that
    the two cross once: a secant search between brackets, starting from equal compression in both steps.
    """
    source = features.shape[0] * features.shape[1]
    linkage = Linkage(features, error_tolerance, generator)
    least = max(budget, features.shape[0])
    count = max(least, round(math.sqrt(budget * source)))
    attempts: dict[int, tuple[float, float]] = {}  # spatial count: spatial threshold, and how far the temporal one is
    nearest, smallest_gap = None, math.inf
    while count not in attempts and len(attempts) < MAX_CUTS and smallest_gap > TOLERANCE:
        spatial = linkage.cut(count)
        temporal = Linkage(spatial.tokens.unsqueeze(0), error_tolerance, generator)
        tau, gap = _nearest_thresholds(linkage.forest.thresholds(count), temporal.forest.thresholds(budget))
        attempts[count] = tau, gap
        if abs(gap) < smallest_gap:
            nearest, smallest_gap = (spatial, temporal.cut(budget), tau + gap), abs(gap)
        count = max(least, linkage.forest.components_above(_crossing(list(attempts.values()))))
    assert nearest is not None
    return _two_steps(*nearest)


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


def _two_steps(spatial: Clusters, temporal: Clusters, tau: float) -> Kept:
    return Kept(
        temporal.tokens,
        spatial.representatives[temporal.representatives],
        temporal.membership[spatial.membership],
        len(spatial.tokens),
        tau,
    )
