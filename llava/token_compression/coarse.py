"""Cosines from vectors in bfloat16, for processors with units that multiply matrices of these many times as fast.

Rounding moves an entry by at most 2^-8 of it, hence a vector by at most 2^-8 of its length, and the cosine of two of
them by little more than 2^-7 (Cauchy and Schwarz). Their product is summed in float32 and rounded once more, by at
most 2^-8 of it. So these cosines decide most pairs, and tell which ones are to be looked at more closely.
"""

import functools
import math
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from llava.token_compression.components import Window, join
from llava.token_compression.cosine import CHUNK_ENTRIES, Stored, Vectors, close_cosines, pairs_exceeding
from llava.token_compression.forest import Edges, Forest, boruvka, exits_among
from llava.token_compression.pruned import LOOKUPS, LargeGraph

DOUBT = 2.0**-7 + 2.0**-8 + 2.0**-13
"""By how much more than one of float32 a cosine may be off: the last part is for products of these roundings."""

COLUMNS = 256
"""Vectors that are multiplied with others at a time."""

ROWS = 2048
"""The others: 1 MB of products stays in the cache."""

PENDING = 2**17
"""Fours of products that are collected before they are looked at."""


@functools.cache
def has_matrix_unit() -> bool:
    """Whether the CPU has such a unit (AMX) and PyTorch makes use of it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported() and torch.backends.mkldnn.is_available()


def pays(vectors: Vectors) -> TypeGuard[Stored]:
    """Whether products of rounded vectors are faster than those in float32."""
    return isinstance(vectors, Stored) and vectors.device.type == "cpu" and has_matrix_unit()


class Coarse:
    """Stored tokens, with directions in bfloat16."""

    def __init__(self, source: Stored):
        self.count, self.dim, self.device = source.count, source.dim, source.device
        self.rows, self.scaled = source.rows, source.rounded_off
        self.doubt = source.doubt + DOUBT


Pairs = tuple[Tensor, Tensor, Tensor]
"""Numbers u (k,) and v (k,) int64 of vectors, and coarse cosines (k,)."""


class CoarseGraph(LargeGraph):
    """The cosine graph of n stored vectors: all pairs are multiplied, and those that may matter looked at again."""

    def __init__(self, tokens: Stored):
        super().__init__(tokens)
        padded = math.ceil(tokens.count / COLUMNS) * COLUMNS
        self._units = torch.zeros(padded, tokens.dim, dtype=torch.bfloat16)
        step = max(1, CHUNK_ENTRIES // 4 // tokens.dim)
        moved = 0.0  # by rounding
        for start in range(0, tokens.count, step):
            vectors, factors, _ = tokens.scaled(slice(start, start + step))
            exact, units = vectors * factors.unsqueeze(1), self._units[start : start + len(vectors)]
            units.copy_(exact)
            moved = max(moved, float(torch.linalg.vector_norm(exact.sub_(units.float()), dim=1).max()))
        self._found: tuple[float, Pairs] | None = None  # all pairs above a number, if they are few
        self._doubt = tokens.doubt + 2 * moved + moved**2 + 2.0**-9  # the last for products of 0.5 to 1

    def _prepare(self) -> None:
        """No sketches: they would take longer than the products that they save."""

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees as `Graphs` in paths.py says: all pairs are multiplied anyway."""
        return super().degrees(threshold, within if threshold <= self._doubt else None)

    def _edges(self, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
        if threshold <= self._doubt:
            yield from super()._edges(threshold)
            return
        for u, v, cosines in self._pairs_above(threshold - self._doubt):
            above = cosines > threshold + self._doubt
            unsure = above.logical_not().nonzero().view(-1)
            above[unsure] = pairs_exceeding(self.tokens, u[unsure], self.tokens, v[unsure], threshold)
            yield u[above], v[above]

    def _forest(self, needed: int, sampled: Tensor | None, exact: bool, window: Window) -> Forest:
        if exact or window[0] <= self._doubt:
            return super()._forest(needed, sampled, exact, window)
        joined = torch.arange(self.tokens.count)
        pairs: Pairs = (joined[:0], joined[:0], torch.empty(0))
        for part in self._pairs_above(window[0] - self._doubt):
            if sampled is not None:
                part = _chosen(part, (sampled[part[0]] | sampled[part[1]]).nonzero().view(-1))
            u, v, weights = (torch.cat(columns) for columns in zip(pairs, part, strict=True))
            above = weights > window[1] + self._doubt
            joined = join(joined, u[above], v[above])
            pairs = _chosen((u, v, weights), above.logical_not().nonzero().view(-1))
            pairs = _chosen(pairs, self._bridges(joined, pairs, needed, window))
        u, v, _ = pairs
        edges = Edges.between(u, v, close_cosines(self.tokens, u, self.tokens, v), self.tokens.doubt)
        edges = edges[(edges.weight - edges.doubt > window[0]).nonzero().view(-1)]  # none of which has been missed
        forest = boruvka(joined, exits_among(edges), self._lookup, LOOKUPS * self.tokens.count)
        return Forest(forest, self.tokens.count, self._lookup, joined)

    def _bridges(self, joined: Tensor, pairs: Pairs, needed: int, window: Window) -> Tensor:
        """Indices of the pairs in a window that its forest may need.

        From the strongest pairs down, a pair is left out if surely stronger ones join its ends. All pairs are left out
        that are surely weaker than the last of the edges needed.

        Args:
            joined: labels of what is joined by pairs surely stronger than the window.
        """
        u, v, weights = pairs
        step, level = 2 * self._doubt, min(window[1], 1.0) + self._doubt
        surely, labels, found, further = joined, joined, [joined[:0]], 2
        while level > window[0] - self._doubt and further > 0:
            band = ((weights <= level) & (weights > level - step)).nonzero().view(-1)
            band = band[surely[u[band]] != surely[v[band]]]
            found.append(band)
            surely, labels = labels, join(labels, u[band], v[band])
            if int((labels != torch.arange(len(labels))).sum()) >= needed:
                further -= 1
            level -= step
        return torch.cat(found)

    def _pairs_above(self, lowest: float) -> Iterator[Pairs]:
        """Pairs u < v, many at a time, whose coarse cosine exceeds a positive number.

        There are few, so four cosines are looked at as one integer that is not 0.
        """
        if self._found is not None and self._found[0] <= lowest:
            yield _chosen(self._found[1], (self._found[1][2] > lowest).nonzero().view(-1))
            return
        limit = math.floor(256 * lowest) / 256  # a number that bfloat16 has
        packed, places, count, complete = [], [], 0, True
        for start in range(0, self.tokens.count, COLUMNS):
            columns = self._units[start : start + COLUMNS].mT
            for top in range(start, self.tokens.count, ROWS):
                cosines = self._units[top : top + ROWS] @ columns
                fours = functional.threshold(cosines, limit, 0.0, inplace=True).view(torch.int64).view(-1)
                found = fours.nonzero().view(-1)
                packed.append(fours[found])
                places.append(found + (start // COLUMNS * len(self._units) + top) * (COLUMNS // 4))
                count += len(found)
                if count > PENDING:
                    yield self._unpacked(torch.cat(packed), torch.cat(places), lowest)
                    packed, places, count, complete = [], [], 0, False
        if packed:
            pairs = self._unpacked(torch.cat(packed), torch.cat(places), lowest)
            if complete:
                self._found = lowest, pairs
            yield pairs

    def _unpacked(self, packed: Tensor, places: Tensor, lowest: float) -> Pairs:
        cosines = packed.view(torch.bfloat16).view(-1, 4).float()
        which, offset = (cosines > lowest).nonzero(as_tuple=True)
        line, column = places[which] // (COLUMNS // 4), places[which] % (COLUMNS // 4)
        u, v = line // len(self._units) * COLUMNS + 4 * column + offset, line % len(self._units)
        values = cosines[which, offset].clamp_(max=1)  # no cosine is larger, but larger products are rounded more
        return _chosen((u, v, values), (u < v).nonzero().view(-1))


def _chosen(pairs: Pairs, index: Tensor) -> Pairs:
    u, v, weights = pairs
    return u[index], v[index], weights[index]
