"""Greedy max-min diversity: each pick is the vector least similar to its most similar one among those picked."""

import torch
from torch import Tensor

from llava.token_compression.components import BLOCK_ENTRIES


def max_min(unit: Tensor, count: int, first: Tensor | int) -> Tensor:
    """Pick vectors one by one; equally good ones by lowest index.

    Each pick takes one product of all vectors with the last pick, and nothing is held but each vector's highest
    similarity so far.

    Args:
        unit: (n, dim) vectors of length 1, or 0: a zero vector has similarity 0 with everything.
        count: how many, from 1 to n.
        first: index of the first pick.

    Returns:
        (count,) int64 distinct indices, in the order in which they were picked.
    """
    picks = torch.empty(count, dtype=torch.int64, device=unit.device)
    picks[0] = first
    similarity = unit.new_full((len(unit),), -torch.inf)  # with the most similar pick
    for done in range(1, count):
        last = picks[done - 1 : done]
        torch.maximum(similarity, unit @ unit.index_select(0, last)[0], out=similarity)
        similarity.index_fill_(0, last, torch.inf)
        picks[done] = similarity.argmin()
    return picks


def most_isolated(unit: Tensor) -> Tensor:
    """Index, () int64, of the vector that is least similar to its most similar other one; of equals the lowest."""
    if len(unit) == 1:
        return torch.zeros((), dtype=torch.int64, device=unit.device)
    highest = []
    rows = max(1, BLOCK_ENTRIES // len(unit))
    for start in range(0, len(unit), rows):
        block = unit[start : start + rows] @ unit.mT
        block.diagonal(start).fill_(-torch.inf)
        highest.append(block.amax(dim=1))
    return torch.cat(highest).argmin()
