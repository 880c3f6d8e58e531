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
    """Join every source token to its most similar kept token and average: Eq. 7 and 8.

    Args:
        source: (n, dim) source tokens, float32 or float64.
        kept: (k, dim) kept tokens.
        membership: (n,) int64, the kept token that a source token already belongs to, -1 for none. A zero vector is
            similar to nothing, so it stays there.

    Returns:
        merged (k, dim), `(sum of joined + kept) / (number of joined + 1)`, and assignment (n,) int64.
    """
    unit, targets = normalised(source), normalised(kept)
    absent = targets.eq(0).all(dim=1)
    nearest = torch.cat(
        [
            (block @ targets.T).masked_fill_(absent, -torch.inf).argmax(dim=1)
            for block in unit.split(max(1, BLOCK_ENTRIES // len(kept)))
        ]
    )
    stays = unit.eq(0).all(dim=1) & (membership >= 0)
    assignment = torch.where(stays, membership, nearest)
    sums, sizes = group_sums(source, assignment, len(kept))
    return sums.add_(kept) / (sizes + 1), assignment
