"""The kernels as functions on tensors. None of them waits for the device."""

import math

import torch
from torch import Tensor

from llava.token_compression.components import RESOLUTION
from llava.token_compression.gpu import kernels

BLOCK = 64
"""Vertices of a tile's side."""

ENTRIES = 32
"""Vector entries multiplied at a time."""

PAIRS = 2**20
"""Pairs that a list for exact decisions holds as a rule: 8 MB."""

PROGRAMS = 1024
"""Programs that work a list off."""

DOUBT = 4.0
"""How many times the doubt of float32 (see `slack` in cosine.py) is given to tensor cores, which do not round sums."""


def doubt(dim: int) -> float:
    """How far a cosine from the kernels may be from the exact one."""
    return DOUBT * 8 * (math.sqrt(dim) + 1) * 2.0**-24


def inverse_lengths(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors (n, dim): (n,) float32, 0 for a zero vector; and () bool, whether products of any may overflow."""
    lengths = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    moderate = ((lengths > 1e-15) & (lengths < 1e15)) | (lengths == 0)  # false for what is not finite
    return torch.where(lengths > 0, 1 / lengths, 0).float(), ~moderate.all()


class PairList:
    """A list of pairs on the device: (limit,) int64 and its length (1,) int32, which may exceed the limit."""

    def __init__(self, device: torch.device, limit: int):
        self.limit = limit
        self.pairs = torch.empty(limit, dtype=torch.int64, device=device)
        self.found = torch.zeros(1, dtype=torch.int32, device=device)

    def overflow(self) -> Tensor:
        """() bool."""
        return self.found[0] > self.limit


def unite(
    values: Tensor, inverse: Tensor, graphs: int, count: Tensor, threshold: float, sampled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Components of the cosine graphs of values (n, dim), `graphs` of them of equal size.

    Args:
        inverse: (n,) float32 inverse lengths.
        count: (1,) int32, how many of the values are there.
        threshold: on the grid of exact cosines.
        sampled: (n,) bool or None.

    Returns:
        labels (n,) int64, degrees (n,) int64, and whether they are wrong because too many pairs needed an exact
        decision, () bool.
    """
    n, dim = values.shape
    size = n // graphs
    labels = torch.arange(n, dtype=torch.int32, device=values.device)
    degrees = torch.ones_like(labels)
    if threshold >= 1:
        return labels.long(), degrees.long(), torch.zeros((), dtype=torch.bool, device=values.device)
    unsure = PairList(values.device, PAIRS)
    chosen = labels if sampled is None else sampled.to(torch.int8)
    options = {"SAMPLED": sampled is not None, "K": ENTRIES}
    kernels.join_kernel[(math.ceil(size / BLOCK) ** 2 * graphs,)](
        values, inverse, chosen, labels, degrees, unsure.pairs, unsure.found, unsure.limit, size, count,
        threshold - doubt(dim), threshold + doubt(dim), dim=dim, B=BLOCK, **options,
    )  # fmt: skip
    kernels.settle_kernel[(PROGRAMS,)](
        values, chosen, labels, degrees, unsure.pairs, unsure.found, unsure.limit, round(threshold / RESOLUTION),
        dim=dim, PROGRAMS=PROGRAMS, **options,
    )  # fmt: skip
    kernels.flatten_kernel[(math.ceil(n / 256),)](labels, n, B=256)
    return labels.long(), degrees.long(), unsure.overflow()


def edges_above(
    values: Tensor, inverse: Tensor, graphs: int, start: int, stop: int, low: float, sampled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (k,), (k,) int64 whose cosine is above `low`, and their cosines (k,) float32. Waits for the device.

    Args:
        values: (n, dim), of graphs of equal size; inverse: (n,) float32 inverse lengths.
        start, stop: rows of each graph, multiples of `BLOCK`; their pairs with all later vertices are looked at.
        sampled: (n,) bool, one of the ends must be among these vectors, or None.
    """
    n, dim = values.shape
    size = n // graphs
    blocks = math.ceil((min(stop, size) - start) / BLOCK)
    length = graphs * blocks * BLOCK * size
    found = PairList(values.device, length)
    weights = torch.empty(length, device=values.device)
    chosen = inverse if sampled is None else sampled.to(torch.int8)
    kernels.edges_kernel[(math.ceil(size / BLOCK), blocks, graphs)](
        values, inverse, chosen, weights, found.pairs, found.found, found.limit, size, start // BLOCK, low,
        dim=dim, SAMPLED=sampled is not None, B=BLOCK, K=ENTRIES,
    )  # fmt: skip
    count = int(found.found)
    pairs = found.pairs[:count]
    return pairs // 2**31, pairs % 2**31, weights[:count]


def add_segments(sums: Tensor, values: Tensor, groups: Tensor, count: Tensor, means: bool) -> Tensor:
    """Add vectors (n, dim) to their group's row of sums (k, dim) in ascending order, and average, in place.

    Args:
        groups: (n,) int64 in [0, k]; k for none.
        count: (1,) int64, groups from there on are left alone.
        means: average over the added vectors; else over those and what was there before.
    """
    k, dim = sums.shape
    sizes = torch.zeros(k + 1, dtype=torch.int64, device=sums.device).scatter_add_(0, groups, torch.ones_like(groups))
    starts = sizes.cumsum(0) - sizes
    order = groups.argsort(stable=True)
    entries = 512
    kernels.sums_kernel[(k, math.ceil(dim / entries))](
        values, order, starts, sizes, sums, count, dim=dim, MEANS=means, K=entries
    )
    return sums


def nearest(
    values: Tensor, inverse: Tensor, rows: Tensor, rows_count: Tensor, kept: Tensor, kept_count: Tensor
) -> tuple[Tensor, Tensor]:
    """The kept row (m,) int64 of highest exact cosine for each row in a list, and whether that is wrong, () bool.

    Args:
        values: (n, dim); inverse: (n,) float32 inverse lengths.
        rows: (m,) int64, of which the first `rows_count` (1,) are looked at.
        kept: (k, dim) float32, of which the first `kept_count` (1,) are compared with.
    """
    dim = values.shape[1]
    kept_inverse, unusual = inverse_lengths(kept)
    best = torch.zeros_like(rows)
    rivals = PairList(values.device, PAIRS)
    keys = torch.full_like(rows, -(2**63))
    kernels.nearest_kernel[(math.ceil(len(rows) / BLOCK),)](
        values, inverse, rows, rows_count, kept, kept_inverse, kept_count, best, rivals.pairs, rivals.found,
        rivals.limit, 2 * doubt(dim), dim=dim, M=BLOCK, N=BLOCK, K=ENTRIES,
    )  # fmt: skip
    kernels.rivals_kernel[(PROGRAMS,)](
        values, rows, kept, rivals.pairs, rivals.found, rivals.limit, keys, dim=dim, PROGRAMS=PROGRAMS, K=ENTRIES
    )
    contested = keys > -(2**63)
    return torch.where(contested, -keys % 2**21, best), rivals.overflow() | unusual
