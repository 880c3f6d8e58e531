"""The most similar kept token of each source token (Eq. 7), with products only where a sketch leaves a doubt."""

import torch
from torch import Tensor

from llava.token_compression.coarse import Coarse, pays
from llava.token_compression.components import BLOCK_ENTRIES
from llava.token_compression.cosine import (
    LOOKUP_COST,
    Scaled,
    Tokens,
    close_cosines,
    exact_products,
    pair_cosines,
    products,
)
from llava.token_compression.sketch import Sketch

FEW = 512
"""Up to so many kept tokens it is faster to compare with all of them than to find out which ones are likely."""

FEW_ENTRIES = 3 * 2**18
"""The same for so many entries of all kept tokens together."""

COARSE_FEW = 3 * 2**10
"""The same where products of rounded vectors are faster."""

COARSE_ENTRIES = 2**20
"""Products of rounded vectors at a time: 4 MB of float32."""

ROWS = 256
"""Source tokens at a time for which likely kept tokens are chosen together."""

VECTOR_ENTRIES = 2**22
"""Entries of vectors handed out at a time: 16 MB of float32."""


def nearest(source: Tokens, kept: Tokens, membership: Tensor, rows: Tensor) -> Tensor:
    """What `nearest_plain` in plain.py returns."""
    if pays(source) and pays(kept) and kept.count <= COARSE_FEW:
        return _among_all(source, kept, membership, rows, Coarse(source), Coarse(kept), COARSE_ENTRIES)
    if kept.count <= max(FEW, FEW_ENTRIES // kept.dim):
        return _among_all(source, kept, membership, rows, source, kept, BLOCK_ENTRIES)
    return _among_likely(source, kept, membership, rows)


def _among_all(
    source: Tokens, kept: Tokens, membership: Tensor, rows: Tensor, first: Tokens, first_kept: Tokens, entries: int
) -> Tensor:
    """Compare with all kept tokens, so many at a time, by products of directions that may be rounded off."""
    everywhere = 4 * len(rows) > 3 * source.count  # then leaving some out costs more than it saves
    targets, columns = first_kept.scaled(slice(None)), torch.arange(kept.count, device=rows.device)
    step = max(1, min(entries // kept.count, VECTOR_ENTRIES // source.dim))
    asked = torch.arange(source.count, device=rows.device) if everywhere else rows
    found = torch.empty_like(asked)
    for u, answers in zip(asked.split(step), found.split(step), strict=True):
        vectors = first.scaled(slice(int(u[0]), int(u[-1]) + 1) if everywhere else u)
        best = _best(products(vectors, targets), source, u, kept, columns, max(first.doubt, first_kept.doubt))
        answers.copy_(_unless_zero(vectors, membership[u], best))
    return found[rows] if everywhere else found


def _among_likely(source: Tokens, kept: Tokens, membership: Tensor, rows: Tensor) -> Tensor:
    """Compare with one guess first; only tokens that the sketch allows to be as similar are compared with as well."""
    sketch, doubt = Sketch(kept), max(source.doubt, kept.doubt)
    targets, bounds = sketch.all(kept), sketch.all(source, rows)
    guesses = membership[rows].clone()
    for some in (guesses < 0).nonzero().view(-1).split(BLOCK_ENTRIES // kept.count):
        guesses[some] = (bounds[some] @ targets.mT).argmax(dim=1)
    found = torch.empty_like(guesses)
    for some in guesses.argsort(stable=True).split(ROWS):
        u = rows[some]
        vectors = source.scaled(u)
        reached = products(vectors, kept.scaled(guesses[some].unique())).amax(dim=1, keepdim=True)
        above = (bounds[some] @ targets.mT).sub_(reached).amax(dim=0)
        columns = (above >= -doubt - sketch.margin).nonzero().view(-1)
        parts = columns.split(max(1, VECTOR_ENTRIES // source.dim))
        cosines = torch.cat([products(vectors, kept.scaled(part)) for part in parts], dim=1)
        found[some] = _unless_zero(vectors, membership[u], _best(cosines, source, u, kept, columns, doubt))
    return found


def _unless_zero(vectors: Scaled, membership: Tensor, best: Tensor) -> Tensor:
    return torch.where((vectors.factors == 0) & (membership >= 0), membership, best)


def _best(cosines: Tensor, source: Tokens, u: Tensor, kept: Tokens, v: Tensor, doubt: float) -> Tensor:
    """Of kept tokens v (c,), ascending, the one of highest exact cosine with each source token u (r,).

    Args:
        cosines: (r, c), off by at most `doubt`; overwritten.
    """
    highest, best = cosines.max(dim=1)
    near = cosines.ge_(highest[:, None] - 2 * doubt)  # 1 or 0: faster to add up than bool
    contested = (near.sum(dim=1) > 1).nonzero().view(-1)
    row, column = near[contested].nonzero(as_tuple=True)
    closer = max(source.doubt, kept.doubt)
    if doubt > closer and len(row) > 0:
        close = close_cosines(source, u[contested][row], kept, v[column])
        top = close.new_full((len(contested),), -torch.inf).scatter_reduce_(0, row, close, "amax")
        rivals = close >= top[row] - 2 * closer
        row, column = row[rivals], column[rivals]
    if len(row) * LOOKUP_COST > len(contested) * len(v):
        parts = v.split(max(1, VECTOR_ENTRIES // source.dim))
        exact = torch.cat([exact_products(source.rows(u[contested]), kept.rows(part)) for part in parts], dim=1)
        best[contested] = exact.argmax(dim=1)
    elif len(row) > 0:
        exact = pair_cosines(source, u[contested][row], kept, v[column])
        top = exact.new_full((len(contested),), -torch.inf).scatter_reduce_(0, row, exact, "amax")
        first = torch.full_like(contested, len(v))
        best[contested] = first.scatter_reduce_(0, row, torch.where(exact == top[row], column, len(v)), "amin")
    return v[best]
