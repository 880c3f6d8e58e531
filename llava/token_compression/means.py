"""Sums and means of groups of vectors (Eq. 4), in blocks, added up in the order of the source on every path."""

import torch
from torch import Tensor

from llava.token_compression.cosine import Stored, Vectors

VECTOR_ENTRIES = 2**22
"""Entries of vectors added at a time: 16 MB of float32."""

STORED_ENTRIES = 2**25
"""Up to so many entries (128 MB of float32) means are stored; beyond, they are computed when they are asked for."""


def add_groups(sums: Tensor, tokens: Vectors, groups: Tensor) -> Tensor:
    """Add every vector to the sum of its group, in place; the same bits on every run.

    Args:
        sums: (count, dim).
        groups: (tokens.count,) int64 in [0, count).
    """
    rows = max(1, VECTOR_ENTRIES // tokens.dim)
    if sums.device.type == "cpu":
        for start in range(0, tokens.count, rows):
            block = slice(start, start + rows)
            sums.index_add_(0, groups[block], tokens.rows(block))
        return sums
    for some in groups.argsort(stable=True).split(rows):
        _add_ascending(sums, groups[some], tokens.rows(some))
    return sums


def group_means(tokens: Vectors, groups: Tensor, count: int) -> Tensor:
    """Mean (count, dim) of each group of vectors; every group must have a member."""
    sums = add_groups(tokens.rows(slice(0, 1)).new_zeros(count, tokens.dim), tokens, groups)
    return sums.div_(torch.bincount(groups, minlength=count).unsqueeze(1))


def means_of(tokens: Vectors, groups: Tensor, count: int) -> Vectors:
    """The same as `group_means`, without holding them all in memory where they are many."""
    if count * tokens.dim <= STORED_ENTRIES:
        return Stored(group_means(tokens, groups, count))
    return Means(tokens, groups, count)


class Means:
    """The means of `group_means`, computed on demand.

    Args:
        source: vectors.
        groups: (source.count,) int64 in [0, count), all of which occur.
        count: number of groups.
    """

    def __init__(self, source: Vectors, groups: Tensor, count: int):
        self.count, self.dim, self.device = count, source.dim, source.device
        self._source = source
        self._members = groups.argsort(stable=True)
        self._sizes = torch.bincount(groups, minlength=count)
        self._starts = self._sizes.cumsum(0) - self._sizes

    def rows(self, index: Tensor | slice) -> Tensor:
        sizes, starts = self._sizes[index], self._starts[index]
        groups = torch.repeat_interleave(sizes)
        offset = torch.arange(len(groups), device=self.device) - (sizes.cumsum(0) - sizes)[groups]
        members = self._members[starts[groups] + offset]
        sums = self._source.rows(slice(0, 1)).new_zeros(len(sizes), self.dim)
        rows = max(1, VECTOR_ENTRIES // self.dim)
        for own, some in zip(groups.split(rows), members.split(rows), strict=True):
            _add_ascending(sums, own, self._source.rows(some))
        return sums.div_(sizes.unsqueeze(1))


def _add_ascending(sums: Tensor, groups: Tensor, vectors: Tensor) -> None:
    """Add vectors to the sums of their groups, which ascend."""
    if sums.device.type == "cpu":
        sums.index_add_(0, groups, vectors)
    else:  # index_add_ adds in an arbitrary order there
        own, sizes = groups.unique_consecutive(return_counts=True)
        sums[own] += torch.segment_reduce(vectors, "sum", lengths=sizes, axis=0)
