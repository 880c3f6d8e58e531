"""The final merge of all source tokens into the kept ones (Eq. 7 and 8)."""

import torch
from torch import Tensor

from llava.token_compression.cosine import Stored
from llava.token_compression.means import add_groups
from llava.token_compression.paths import path_for


def merge(
    source: Tensor | Stored, kept: Tensor, membership: Tensor, single_is_own: bool = True
) -> tuple[Tensor, Tensor]:
    """Join every source token to its most similar kept token (Eq. 7; the first one on ties) and average (Eq. 8).

    Two kinds of source tokens stay where they are already: one that makes up a kept token alone, because no cosine
    exceeds that with itself (unless `single_is_own` is false), and a zero vector, because it is similar to nothing.

    Args:
        source: (n, dim) source tokens of any floating dtype.
        kept: (k, dim) kept tokens, float32 or float64; overwritten.
        membership: (n,) int64, the kept token that a source token is part of, -1 for none.
        single_is_own: whether a kept token with one member is that member.

    Returns:
        merged (k, dim), `(sum of joined + kept) / (number of joined + 1)`, and assignment (n,) int64.
    """
    tokens = source if isinstance(source, Stored) else Stored(source)
    count = len(kept)
    members = torch.bincount(membership[membership >= 0], minlength=count)
    rows = ((membership < 0) | (members[membership] > (1 if single_is_own else 0))).nonzero().view(-1)
    assignment = membership.clone()
    if len(rows) > 0:
        assignment[rows] = path_for(tokens).nearest(tokens, Stored(kept), membership, rows)
    sizes = torch.bincount(assignment, minlength=count).unsqueeze(1)
    return add_groups(kept, tokens, assignment).div_(sizes + 1), assignment
