"""Groups of source tokens around anchors: what methods keep that merge tokens into some of them."""

import torch
from torch import Tensor

from llava.token_compression.cosine import Stored
from llava.token_compression.means import add_groups


def slots(anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Number the anchors in source order.

    Args:
        anchor: (n,) int64, the source index of the anchor that each source token goes to, its own for an anchor, -1
            for a token that is dropped.

    Returns:
        positions (k,) int64 of the anchors, ascending, and membership (n,) int64 in [-1, k).
    """
    is_anchor = anchor == torch.arange(len(anchor), device=anchor.device)
    number = is_anchor.cumsum(0) - 1
    return is_anchor.nonzero().view(-1), torch.where(anchor >= 0, number[anchor], -1)


def others(tokens: Tensor, positions: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the members of each group without its anchor.

    Args:
        tokens: (n, dim) float32 or float64.
        positions, membership: as `slots` returns them.

    Returns:
        sums (k, dim) and counts (k, 1), in the dtype of the tokens.
    """
    merged = membership >= 0
    merged[positions] = False
    rows, count = merged.nonzero().view(-1), len(positions)
    sums = add_groups(tokens.new_zeros(count, tokens.shape[1]), Stored(tokens[rows]), membership[rows])
    return sums, torch.bincount(membership[rows], minlength=count).to(tokens).unsqueeze(1)


def nearest(vectors: Tensor, anchors: Tensor) -> Tensor:
    """Index (..., n) int64 of the anchor (..., k, dim) of highest cosine to each vector (..., n, dim), first on ties.

    A zero vector is similar to nothing and goes to the first anchor.
    """
    return (unit(vectors) @ unit(anchors).mT).argmax(dim=-1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., dim) of length 1; a zero vector stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-6)


def ranking(scores: Tensor) -> Tensor:
    """Indices along the last dimension from the highest score to the lowest, equal ones by index."""
    return scores.argsort(dim=-1, descending=True, stable=True)
