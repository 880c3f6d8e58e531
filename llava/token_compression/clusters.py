"""From component labels to clusters in the order in which they are kept."""

import torch
from torch import Tensor


def arranged(labels: Tensor, degrees: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Number clusters in the order of their representatives, their vertices of highest degree, lowest on ties.

    Shapes depend on nothing but the number n of vertices, so that a device need not be waited for.

    Args:
        labels: (n,) int64 components; degrees: (n,) int64.
        count: (1,) vertices that are there; the others are components of their own. All, if None.

    Returns:
        membership (n,) int64, each vertex's cluster, n for one that is not there; representatives (n,) int64, ascending
        for as many clusters as there are; and their number (1,) int64.
    """
    n = len(labels)
    vertices = torch.arange(n, device=labels.device)
    there = torch.ones_like(vertices, dtype=torch.bool) if count is None else vertices < count
    rank = degrees * n + vertices.flip(0)
    highest = torch.zeros_like(labels).scatter_reduce(0, labels, rank, "amax")[labels]
    representative = n - 1 - highest % n  # of the cluster of each vertex
    chosen = torch.zeros_like(labels).scatter_(0, representative, there.long())
    order = chosen.cumsum(0)
    membership = torch.where(there, order[representative] - 1, n)
    representatives = torch.zeros(n + 1, dtype=torch.int64, device=labels.device)
    return membership, representatives.scatter_(0, membership, representative)[:n], order[-1:]
