"""Group means and the final merge of all source tokens into the kept ones (Eq. 4, 7 and 8)."""

import torch
from torch import Tensor

from llava.token_compression.components import BLOCK_ENTRIES, normalised


def group_sums(vectors: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum (count, dim) and size (count, 1) of each group of rows; the same bits on every run.

    Args:
        vectors: (n, dim).
        groups: (n,) int64 in [0, count).
    """
    sizes = torch.bincount(groups, minlength=count)
    if vectors.device.type == "cpu":
        sums = vectors.new_zeros(count, vectors.shape[1]).index_add_(0, groups, vectors)
    else:  # index_add_ adds in an arbitrary order there
        order = groups.argsort(stable=True)
        sums = torch.segment_reduce(vectors[order], "sum", lengths=sizes, axis=0)
    return sums, sizes.unsqueeze(1)


def group_means(vectors: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean (count, dim) of each group of rows (Eq. 4); every group must have a member."""
    sums, sizes = group_sums(vectors, groups, count)
    return sums / sizes


def merge(source: Tensor, kept: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
    """Join every source token to its most similar kept token (Eq. 7; the first one on ties) and average (Eq. 8).

    Two kinds of source tokens stay where they are already: one that makes up a kept token alone, because no cosine
    exceeds that with itself, and a zero vector, because it is similar to nothing.

    Args:
        source: (n, dim) source tokens, float32 or float64.
        kept: (k, dim) kept tokens.
        membership: (n,) int64, the kept token that a source token is part of, -1 for none.

    Returns:
        merged (k, dim), `(sum of joined + kept) / (number of joined + 1)`, and assignment (n,) int64.
    """
    members = torch.bincount(membership[membership >= 0], minlength=len(kept))
    settled = (membership >= 0) & ((members[membership] == 1) | source.eq(0).all(dim=1))
    targets = normalised(kept)
    absent = targets.eq(0).all(dim=1)
    assignment = membership.clone()
    for rows in settled.logical_not().nonzero().view(-1).split(max(1, BLOCK_ENTRIES // len(kept))):
        cosines = normalised(source[rows]) @ targets.T
        assignment[rows] = cosines.masked_fill_(absent, -torch.inf).argmax(dim=1)
    sums, sizes = group_sums(source, assignment, len(kept))
    return sums.add_(kept) / (sizes + 1), assignment
