"""Groups of source tokens around anchors: what the methods keep that merge tokens into some of them."""

import torch
from torch import Tensor


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


def without(membership: Tensor, positions: Tensor) -> Tensor:
    """The membership of all tokens but the anchors, which are at `positions`: -1 for them."""
    return membership.index_fill(0, positions, -1)


def source_indices(features: Tensor) -> Tensor:
    """(frames, tokens_per_frame) int64, the flat source index of every token."""
    frames, tokens, _ = features.shape
    return torch.arange(frames * tokens, device=features.device).view(frames, tokens)
