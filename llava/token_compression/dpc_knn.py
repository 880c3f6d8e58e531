"""Density peaks with k nearest neighbours (DPC-kNN): centres are dense tokens that are far from denser ones.

For vectors y of width D, d(i, j) = |y_i - y_j| / sqrt(D), the density rho(i) = exp(-mean of the squares of the k
smallest d(i, .)), i itself with distance 0 among them, and delta(i) the distance to the nearest denser vector, the
largest distance of all for the densest. The centres are the vectors with the highest rho delta; the others go to the
nearest centre.

Published code adds noise to rho to break ties; here the vector of lower index counts as the denser one of equals.
Products are compared by their logarithms, so that no density is too small for float32.
"""

import math

import torch
from torch import Tensor

NOISE = 1e-6
"""Squared distances below this part of the vectors' own squares are rounding errors, and count as 0."""


def distances(vectors: Tensor) -> Tensor:
    """d (..., n, n) of vectors (..., n, dim)."""
    products = vectors @ vectors.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    scale = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    apart = scale - 2 * products
    return apart.masked_fill_(apart <= NOISE * scale, 0).sqrt_().div_(math.sqrt(vectors.shape[-1]))


def density_peaks(apart: Tensor, neighbours: Tensor | int, valid: Tensor | None = None) -> Tensor:
    """Vectors in the order of their rho delta.

    Args:
        apart: (sets, n, n), the distances within each set.
        neighbours: k, at least 1, or (sets,) int64 of them; no more than a set has are used.
        valid: (sets, n) bool, the vectors that there are; all by default.

    Returns:
        (sets, n) int64, the vectors of each set from the highest rho delta to the lowest, equal ones by index, and
        after them those that are not valid.
    """
    sets, count, _ = apart.shape
    if valid is None:
        valid = torch.ones(sets, count, dtype=torch.bool, device=apart.device)
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    k = torch.as_tensor(neighbours, device=apart.device).expand(sets).minimum(valid.sum(dim=1)).clamp_min(1)
    nearest = apart.masked_fill(~pairs, torch.inf).topk(min(count, int(k.max())), dim=2, largest=False).values
    means = nearest.square().cumsum(dim=2) / torch.arange(1, nearest.shape[2] + 1, device=apart.device)
    log_density = -means.gather(2, (k - 1).view(-1, 1, 1).expand(-1, count, 1)).squeeze(2)
    log_density = log_density.masked_fill(~valid, -torch.inf)

    earlier = torch.ones(count, count, dtype=torch.bool, device=apart.device).tril(-1)  # [i, j]: j < i
    other, own = log_density.unsqueeze(1), log_density.unsqueeze(2)
    denser = (other > own) | ((other == own) & earlier)
    largest = apart.masked_fill(~pairs, 0).amax(dim=(1, 2))
    delta = apart.masked_fill(~(denser & pairs), torch.inf).amin(dim=2)
    delta = torch.where(delta.isinf(), largest.unsqueeze(1), delta)
    lowest = torch.finfo(apart.dtype).min
    scores = (log_density + delta.log()).clamp_min(lowest).masked_fill(~valid, -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)


def first_of(order: Tensor, counts: Tensor) -> Tensor:
    """(sets, n) bool: which vectors are among the first counts[set] of order (sets, n)."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < counts.to(order.device).unsqueeze(1)


def to_centres(apart: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre (sets, n) int64 of each vector, the first on ties; a centre has itself.

    Args:
        apart: (sets, n, n).
        centres: (sets, n) bool, at least one per set that matters.
    """
    nearest = apart.masked_fill(~centres.unsqueeze(1), torch.inf).argmin(dim=2)
    return torch.where(centres, torch.arange(centres.shape[1], device=centres.device), nearest)
