"""Short vectors whose inner products bound cosines from above.

Split a unit vector u into its part within a subspace and the length of the rest: z(u) = (Q^T u, |u - Q Q^T u|), with
orthonormal columns Q. By the inequality of Cauchy and Schwarz, u . v <= z(u) . z(v). With a single column that is the
triangle inequality of angles, angle(u, v) >= |angle(u, q) - angle(v, q)|; more columns make the bound tighter. Pairs
whose bound is too low need no product of the whole vectors.
"""

import torch
from torch import Tensor

from llava.token_compression.cosine import CHUNK_ENTRIES, Scaled, Tokens

COLUMNS = 64
"""Dimensions of the subspace: costs 1/14 of a product of 896 dimensions and separates most regions of a video."""

SAMPLE = 512
"""Vectors from which the subspace is found."""


class Sketch:
    """The sketch for the subspace in which tokens vary most, found from some of them.

    Attributes:
        columns: of a sketch.
        margin: by how much rounding may take an inner product of sketches below the exact cosine.
    """

    def __init__(self, tokens: Tokens):
        rounding = tokens.doubt
        self.margin = 6 * rounding
        self._inflation = 4 * rounding
        some = torch.arange(0, tokens.count, max(1, tokens.count // SAMPLE), device=tokens.device)
        vectors, factors, _ = tokens.scaled(some)
        sample = vectors * factors[:, None]
        columns = min(COLUMNS, tokens.dim, len(sample))
        self.columns = columns + 1
        start = torch.randn(len(sample), columns, generator=torch.Generator().manual_seed(0)).to(sample.device)
        spread = sample.mT @ (sample @ (sample.mT @ start))  # one power iteration
        self._basis = torch.linalg.qr(spread.double()).Q.float()

    def of(self, directions: Scaled) -> Tensor:
        """Sketches (n, columns + 1) of n directions."""
        inside = (directions.vectors @ self._basis).mul_(directions.factors[:, None])
        rest = (1 - inside.square().sum(dim=1, keepdim=True)).clamp_min_(0).add_(self._inflation).sqrt_()
        return torch.cat([inside, rest], dim=1)

    def all(self, tokens: Tokens, rows: Tensor | None = None) -> Tensor:
        """Sketches (n, columns) of all tokens, or of those at (n,) int64 indices."""
        count = tokens.count if rows is None else len(rows)
        sketches = torch.empty(count, self.columns, device=tokens.device)
        step = max(1, CHUNK_ENTRIES // tokens.dim)
        for start in range(0, count, step):
            block = slice(start, start + step)
            sketches[block] = self.of(tokens.scaled(block if rows is None else rows[block]))
        return sketches
