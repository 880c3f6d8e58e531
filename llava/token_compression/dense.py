"""Small graphs, a block of them at a time: all cosines of a frame fit into the processor's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from llava.token_compression.coarse import Coarse, pays
from llava.token_compression.components import ANYWHERE, BLOCK_ENTRIES, UNRELATED, Window, connected_components, on_grid
from llava.token_compression.cosine import (
    CLOSE_COST,
    LOOKUP_COST,
    Scaled,
    Vectors,
    exact_products,
    exceeding,
    pair_cosines,
    pairs_exceeding,
    products,
    slack,
)
from llava.token_compression.forest import Edges, Forest, TooCloseError, boruvka, completed

KEPT_ENTRIES = 2**23
"""Up to so many cosines (32 MB) are kept from the forest on for the degrees at its cuts."""


class DenseGraphs:
    """The cosine graphs of equal size of consecutive vectors, vertex i of graph b being vector b * n + i.

    Args:
        tokens: of all graphs.
        graphs: number of graphs.
    """

    def __init__(self, tokens: Vectors, graphs: int):
        self.tokens = tokens
        self.size = tokens.count // graphs
        self.doubt = slack(tokens.dim, tokens.device)
        entries = self.size * max(self.size, tokens.dim // 8)  # of a block's cosines and, at 64 MB, of its vectors
        self._step = self.size * max(1, BLOCK_ENTRIES // entries)
        self._cosines: dict[int, Tensor] = {}  # of the blocks with these first vertices, if they are asked for again

    def components(self, threshold: float, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels and degrees, as `threshold_components` in components.py says."""
        labels, degrees = [], []
        for first in range(0, self.tokens.count, self._step):
            edges = self._edges(first, on_grid(threshold))
            degrees.append(edges.sum(dim=2).view(-1))
            if sampled is not None:
                of_block = sampled[first : first + len(degrees[-1])].view(-1, self.size)
                edges.mul_(of_block[:, :, None] | of_block[:, None])
            own = connected_components(edges)
            labels.append((own + first + self.size * torch.arange(len(own), device=own.device)[:, None]).view(-1))
        return torch.cat(labels), torch.cat(degrees).long() + 1

    def degrees(self, threshold: float, within: Tensor | None) -> Tensor:
        """Degrees as `Graphs` in paths.py says."""
        above = (self._above(first, cosines.clone(), threshold) for first, cosines in self._blocks())
        return torch.cat([edges.sum(dim=2).view(-1) for edges in above]).long() + 1

    def forest(self, needed: int, sampled: Tensor | None, window: Window = ANYWHERE) -> Forest:
        """The whole maximum spanning forest of all graphs."""
        forest = []
        for first, cosines in self._blocks(keep=self.tokens.count * self.size <= KEPT_ENTRIES):
            block = slice(first, first + cosines.shape[0] * self.size)
            part = None if sampled is None else sampled[block]
            try:
                edges = self._boruvka(first, cosines.clone(), self.doubt, part)
            except TooCloseError:
                edges = self._boruvka(first, self._exact(block), 0.0, part)
            forest.append(Edges(edges.u + first, edges.v + first, edges.weight, edges.doubt))
        edges = completed(Edges.cat(forest), self.tokens.count, self.tokens.count // self.size)
        return Forest(edges, self.tokens.count, self._lookup)

    def _lookup(self, u: Tensor, v: Tensor) -> Tensor:
        """Exact cosines (k,) float64 of the pairs of vertices (u, v)."""
        return pair_cosines(self.tokens, u, self.tokens, v)

    def _blocks(self, keep: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The first vertex of a block of graphs and their cosines (graphs, n, n), the diagonal being `UNRELATED`."""
        for first in range(0, self.tokens.count, self._step):
            cosines = self._cosines.get(first)
            if cosines is None:
                cosines = self._block(first)
            if keep:
                self._cosines[first] = cosines
            yield first, cosines

    def _block(self, first: int) -> Tensor:
        cosines = self._products(slice(first, first + self._step))
        cosines.diagonal(dim1=1, dim2=2).fill_(UNRELATED)
        return cosines

    def _products(self, block: slice) -> Tensor:
        rows = self.tokens.rows(block).view(-1, self.size, self.tokens.dim)
        if rows.dtype == torch.float32:
            cosines = rows @ rows.mT
            squares = cosines.diagonal(dim1=1, dim2=2)
            if ((squares > 1e-30) & (squares < 1e30)).all():
                inverse_lengths = squares.rsqrt()
                return cosines.mul_(inverse_lengths[:, :, None]).mul_(inverse_lengths[:, None])
        scaled = Scaled.of(rows)
        return products(scaled, scaled)

    def _exact(self, block: slice) -> Tensor:
        vectors = self.tokens.rows(block).view(-1, self.size, self.tokens.dim)
        cosines = exact_products(vectors, vectors)
        cosines.diagonal(dim1=1, dim2=2).fill_(UNRELATED)
        return cosines

    def _edges(self, first: int, threshold: float) -> Tensor:
        """Which exact cosines of a block exceed a threshold: 1 or 0, (graphs, n, n)."""
        tokens = self.tokens
        if not pays(tokens):
            return self._above(first, self._block(first), threshold)
        coarse = Coarse(tokens)
        vectors, factors, zeros = coarse.scaled(slice(first, first + self._step))
        directions = Scaled(vectors.view(-1, self.size, tokens.dim), factors.view(-1, self.size), zeros)
        cosines = products(directions, directions)
        cosines.diagonal(dim1=1, dim2=2).fill_(UNRELATED)

        def decide(graph: Tensor, i: Tensor, j: Tensor) -> Tensor:
            before = first + graph * self.size
            return pairs_exceeding(tokens, before + i, tokens, before + j, threshold)

        def closer() -> Tensor:
            return self._above(first, self._block(first), threshold)

        return exceeding(cosines, threshold, coarse.doubt, decide, closer, CLOSE_COST, symmetric=True)

    def _above(self, first: int, cosines: Tensor, threshold: float) -> Tensor:
        """The same, written over the cosines in float32."""

        def decide(graph: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self._lookup(first + graph * self.size + i, first + graph * self.size + j) > threshold

        def exact() -> Tensor:
            return (self._exact(slice(first, first + self._step)) > threshold).to(cosines.dtype)

        return exceeding(cosines, threshold, self.doubt, decide, exact, LOOKUP_COST, symmetric=True)

    def _boruvka(self, first: int, cosines: Tensor, doubt: float, sampled: Tensor | None) -> Edges:
        """Edges numbered from the block's first vertex on; `cosines` are overwritten."""
        n = self.size
        if sampled is not None:
            ends = sampled.view(-1, n)
            cosines.masked_fill_(~(ends[:, :, None] | ends[:, None]), UNRELATED)
        functional.threshold(cosines, UNRELATED, -torch.inf, inplace=True)
        rows = cosines.view(-1, n)
        numbers = torch.arange(len(rows), device=rows.device)

        def exits(labels: Tensor) -> Edges:
            if labels is not numbers:
                own = labels.to(torch.int32).view(-1, n)
                cosines.masked_fill_(own[:, :, None] == own[:, None], -torch.inf)
            best = rows.amax(dim=1)
            lowest = torch.full_like(best, -torch.inf).scatter_reduce_(0, labels, best, "amax")[labels] - 2 * doubt
            ends = ((best >= lowest) & (best > -torch.inf)).nonzero().view(-1)
            everywhere = len(ends) == len(rows)  # in the first round, as a rule: then nothing need be copied
            near = rows >= lowest[:, None] if everywhere else rows[ends] >= lowest[ends, None]
            end, other = near.nonzero(as_tuple=True)
            u = ends[end]
            return Edges.between(u, u // n * n + other, rows[u, other], doubt)

        return boruvka(numbers, exits, lambda u, v: self._lookup(u + first, v + first), cosines.numel() // LOOKUP_COST)
