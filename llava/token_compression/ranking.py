"""The best tokens by a score; of equal ones those with the lowest index."""

import torch
from torch import Tensor


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (count,) int64, ascending, of the highest of scores (n,)."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def best_per_frame(scores: Tensor, counts: Tensor) -> Tensor:
    """Flat indices (counts.sum(),) int64, ascending, of the counts[f] highest scores of each frame f.

    Args:
        scores: (frames, tokens_per_frame).
        counts: (frames,) int64, from 0 to tokens_per_frame.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    return (rank < counts.unsqueeze(1)).view(-1).nonzero().view(-1)


def best_per_group(scores: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Indices (counts.sum(),) int64, ascending, of the counts[g] highest of the scores (n,) of each group g.

    Args:
        scores: (n,).
        groups: (n,) int64, from 0 to len(counts) - 1.
        counts: (groups,) int64, from 0 to the size of the group.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups, minlength=len(counts))
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    return order[rank < counts.to(order.device)[groups[order]]].sort().values
