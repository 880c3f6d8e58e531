"""Cosines from vectors in bfloat16, for processors with units that multiply matrices of these many times as fast.

Rounding moves an entry by at most 2^-8 of it, hence a vector by at most 2^-8 of its length, and the cosine of two of
them by little more than 2^-7 (Cauchy and Schwarz). Their product is summed in float32 and rounded once more, by at
most 2^-8 of it. So these cosines decide most pairs, and tell which ones are to be looked at more closely.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from llava.token_compression.components import join, on_grid
from llava.token_compression.cosine import CHUNK_ENTRIES, Scaled, Stored, Vectors, pairs_exceeding
from llava.token_compression.pruned import PENDING_EDGES, LargeGraph

DOUBT = 2.0**-7 + 2.0**-8 + 2.0**-13
"""By how much more than one of float32 a cosine may be off: the last part is for products of these roundings."""

COLUMNS = 256
"""Vectors that are multiplied with others at a time."""

ROWS = 2048
"""The others: 1 MB of products stays in the cache."""


@functools.cache
def has_matrix_unit() -> bool:
    """Whether the CPU has such a unit (AMX) and PyTorch makes use of it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported() and torch.backends.mkldnn.is_available()


def pays(vectors: Vectors) -> TypeGuard[Stored]:
    """Whether products of rounded vectors are faster than those in float32."""
    return isinstance(vectors, Stored) and vectors.device.type == "cpu" and has_matrix_unit()


def rounded_off(directions: Scaled) -> Scaled:
    """The directions with vectors in bfloat16."""
    return directions._replace(vectors=directions.vectors.bfloat16())


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
        self._doubt = tokens.doubt + 2 * moved + moved**2 + 2.0**-9  # the last for products of 0.5 to 1

    def _prepare(self) -> None:
        """No sketches: they would take longer than the products that they save."""

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        threshold = on_grid(threshold)
        if threshold <= self._doubt:
            return super().components(threshold, sampled)
        labels = torch.arange(self.tokens.count)
        degrees = torch.ones_like(labels)
        for u, v, cosines in self._pairs_above(lambda: threshold - self._doubt):
            above = cosines > threshold + self._doubt
            unsure = above.logical_not().nonzero().view(-1)
            above[unsure] = pairs_exceeding(self.tokens, u[unsure], self.tokens, v[unsure], threshold)
            u, v = u[above], v[above]
            degrees += torch.bincount(torch.cat([u, v]), minlength=len(labels))
            if sampled is not None:
                kept = sampled[u] | sampled[v]
                u, v = u[kept], v[kept]
            labels = join(labels, u, v)
        return labels, degrees

    def _pairs_above(self, lowest: Callable[[], float]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pairs u < v, many at a time, whose coarse cosine, the third tensor, exceeds a positive number.

        There are few, so four cosines are looked at as one integer that is not 0.
        """
        packed, places, count = [], [], 0
        for start in range(0, self.tokens.count, COLUMNS):
            columns = self._units[start : start + COLUMNS].mT
            for top in range(start, self.tokens.count, ROWS):
                cosines = self._units[top : top + ROWS] @ columns
                fours = functional.threshold(cosines, lowest(), 0.0, inplace=True).view(torch.int64).view(-1)
                found = fours.nonzero().view(-1)
                packed.append(fours[found])
                places.append(found + (start // COLUMNS * len(self._units) + top) * (COLUMNS // 4))
                count += len(found)
                if count > PENDING_EDGES:
                    yield self._unpacked(torch.cat(packed), torch.cat(places))
                    packed, places, count = [], [], 0
        if count > 0:
            yield self._unpacked(torch.cat(packed), torch.cat(places))

    def _unpacked(self, packed: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosines = packed.view(torch.bfloat16).view(-1, 4)
        which, offset = (cosines > 0).nonzero(as_tuple=True)
        line, column = places[which] // (COLUMNS // 4), places[which] % (COLUMNS // 4)
        u, v = line // len(self._units) * COLUMNS + 4 * column + offset, line % len(self._units)
        once = (u < v).nonzero().view(-1)
        values = cosines[which[once], offset[once]].float()
        return (
            u[once],
            v[once],
            values.clamp_(max=1),
        )  # no cosine is larger, but products of 1 and more are rounded more
