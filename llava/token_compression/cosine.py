"""Cosine similarities that are the same number however they are computed.

Whether two tokens are joined, and which of two edges is the stronger one, is decided by exact cosines: computed in
float64 and rounded to `RESOLUTION` (components.py), so that the order of summation, the block and the device do not
matter. Fast paths compute products in float32, which are within `slack` of the exact value, and look the exact value
up where that is not enough to decide. Their results are therefore those of the plain path, not merely near to them.

What this rests on: float32 products err by less than `slack` (see there); and no decision hangs on two values closer
to each other than the rounding of float64 (1e-15) that lie on two sides of a boundary of the rounding.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llava.token_compression.components import UNRELATED, normalised, rounded

CHUNK_ENTRIES = 2**20
"""Vector entries converted at a time where whole vectors are visited: 8 MB of float64."""

ROUNDED_ENTRIES = 2**25
"""Up to so many entries (64 MB) the roundings of vectors are kept."""

PAIR_ENTRIES = 2**17
"""Vector entries looked up at a time: 1 MB of float64 stays in the cache, and in memory that is used again."""

LOOKUP_COST = 16
"""How many cosines of a float64 matrix product take about as long as one looked up."""

CLOSE_COST = 64
"""How many cosines of a float32 matrix product take about as long as one by itself."""


class Vectors(Protocol):
    """Vectors that are handed out in blocks, converted or computed on the way.

    Attributes:
        count: number of vectors.
        dim: entries per vector.
        device: where they are handed out.
    """

    count: int
    dim: int
    device: torch.device

    def rows(self, index: Tensor | slice) -> Tensor:
        """The vectors at (k,) int64 indices, or in a slice: (k, dim) float32, or float64 if their source is."""
        ...


class Tokens(Vectors, Protocol):
    """Vectors whose directions are at hand.

    Attributes:
        doubt: how far a cosine from a float32 product of two directions may be from the exact one.
    """

    doubt: float

    def scaled(self, index: Tensor | slice) -> "Scaled":
        """The directions of the vectors that `Vectors.rows` hands out."""
        ...


class Scaled(NamedTuple):
    """Directions in float32, or rounded off as coarse.py says, whose products neither under- nor overflow.

    Attributes:
        vectors: (..., dim).
        factors: (...), what makes their length 1; 0 for a zero vector.
        zeros: whether there may be zero vectors.
    """

    vectors: Tensor
    factors: Tensor
    zeros: bool

    @classmethod
    def of(cls, vectors: Tensor) -> "Scaled":
        """The directions of any vectors."""
        vectors = normalised(vectors).float()
        return cls(vectors, vectors.ne(0).any(dim=-1).float(), True)


class Stored:
    """The rows of a tensor (n, dim) of any floating dtype."""

    def __init__(self, values: Tensor):
        self.values = values
        self.count, self.dim = values.shape
        self.device = values.device
        self.doubt = slack(self.dim, self.device)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(n,) float32 or float64; not finite for a vector with NaN or infinity in it, or a very long one."""
        step = self.count if self.values.element_size() > 2 else max(1, CHUNK_ENTRIES // self.dim)
        parts = (self.rows(slice(start, start + step)) for start in range(0, self.count, step))
        return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])

    @functools.cached_property
    def _inverse_lengths(self) -> Tensor | None:
        """Where no vector is 0, or so short or long that products in float32 might under- or overflow."""
        moderate = self.values.dtype != torch.float64 and ((self.lengths > 1e-15) & (self.lengths < 1e15)).all()
        return 1 / self.lengths if moderate else None

    def rows(self, index: Tensor | slice) -> Tensor:
        rows = self.values[index] if isinstance(index, slice) else self.values.index_select(0, index)
        return rows.to(torch.promote_types(self.values.dtype, torch.float32))

    def scaled(self, index: Tensor | slice) -> Scaled:
        if self._inverse_lengths is None:
            return Scaled.of(self.rows(index))
        return Scaled(self.rows(index), self._inverse_lengths[index], False)

    @functools.cached_property
    def _rounded(self) -> Tensor | None:
        return self.values.bfloat16() if self.values.numel() <= ROUNDED_ENTRIES else None

    def rounded_off(self, index: Tensor | slice) -> Scaled:
        """The same with vectors in bfloat16, see coarse.py."""
        if self._inverse_lengths is None or self._rounded is None:
            directions = self.scaled(index)
            return directions._replace(vectors=directions.vectors.bfloat16())
        return Scaled(self._rounded[index], self._inverse_lengths[index], False)


class Halved:
    """Vectors that are expensive to hand out, with their directions held in half precision.

    Its rounding moves an entry by up to 2^-11 of it, and a cosine by the sum of so many small errors, in proportion to
    the entries of the other vector: by a small multiple of 2^-11 sqrt(sum x^2 y^2) <= 2^-11 |x|_4^2 for the vector x
    of largest 4-norm. The multiple taken is 8 again, and the factor of two vectors and of roundings that are uniformly
    distributed below their limit is 0.58.
    """

    def __init__(self, source: Vectors):
        self.count, self.dim, self.device = source.count, source.dim, source.device
        self.rows = source.rows
        self._directions = torch.empty(self.count, self.dim, dtype=torch.float16, device=self.device)
        self._factors = torch.empty(self.count, device=self.device)
        fourth = torch.empty(self.count, device=self.device)
        step = max(1, CHUNK_ENTRIES // self.dim)
        for start in range(0, self.count, step):
            block = slice(start, start + step)
            vectors, factors, _ = Scaled.of(source.rows(block))
            self._directions[block], self._factors[block] = vectors, factors
            fourth[block] = vectors.square().square_().sum(dim=1).sqrt_()
        self.doubt = slack(self.dim, self.device) + 8 * 0.58 * 2.0**-11 * float(fourth.max())

    def scaled(self, index: Tensor | slice) -> Scaled:
        if isinstance(index, slice):
            return Scaled(self._directions[index].float(), self._factors[index], True)
        return Scaled(self._directions.index_select(0, index).float(), self._factors[index], True)


def products(x: Scaled, y: Scaled) -> Tensor:
    """Cosines (..., n, m) float32 of n and m directions, within their doubt; `UNRELATED` where a vector is 0."""
    cosines = (x.vectors @ y.vectors.mT).float().mul_(x.factors.unsqueeze(-1)).mul_(y.factors.unsqueeze(-2))
    if x.zeros or y.zeros:
        cosines.masked_fill_(x.factors.eq(0).unsqueeze(-1) | y.factors.eq(0).unsqueeze(-2), UNRELATED)
    return cosines


def exact_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines (k,) float64 of pairs of rows (k, dim), rounded to `RESOLUTION`; `UNRELATED` where one of them is 0."""
    x, y = _doubled(x), _doubled(y)
    lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    return rounded((x * y).sum(dim=-1) / lengths).masked_fill_(lengths == 0, UNRELATED)


def pair_cosines(x: Vectors, i: Tensor, y: Vectors, j: Tensor) -> Tensor:
    """`exact_cosines` of the pairs (x[i], y[j]), for (k,) int64 indices i and j."""
    step = max(1, PAIR_ENTRIES // x.dim)
    pairs = zip(i.split(step), j.split(step), strict=True)
    return torch.cat([exact_cosines(x.rows(u), y.rows(v)) for u, v in pairs])


def close_cosines(x: Tokens, i: Tensor, y: Tokens, j: Tensor) -> Tensor:
    """The same cosines (k,) in float32, within `slack`."""
    step = max(1, PAIR_ENTRIES // 2 // x.dim)
    parts = []
    for u, v in zip(i.split(step), j.split(step), strict=True):
        one, other = x.scaled(u), y.scaled(v)
        factors = one.factors * other.factors
        cosines = one.vectors.mul_(other.vectors).sum(dim=1).mul_(factors)  # vectors that are indexed are copies
        parts.append(cosines.masked_fill_(factors == 0, UNRELATED) if one.zeros or other.zeros else cosines)
    return torch.cat(parts)


def pairs_exceeding(x: Tokens, i: Tensor, y: Tokens, j: Tensor, threshold: float) -> Tensor:
    """Which exact cosines (k,) of the pairs (x[i], y[j]) exceed a threshold, as bool."""
    margins = close_cosines(x, i, y, j).sub_(threshold)
    above = margins > 0
    unsure = (margins.abs() <= max(x.doubt, y.doubt)).nonzero().view(-1)
    if len(unsure) > 0:
        above[unsure] = pair_cosines(x, i[unsure], y, j[unsure]) > threshold
    return above


def exact_products(x: Tensor, y: Tensor) -> Tensor:
    """`exact_cosines` of every row of x (..., n, dim) with every row of y (..., m, dim): (..., n, m) float64."""
    x, y = normalised(x.double()), normalised(y.double())
    absent = x.eq(0).all(dim=-1).unsqueeze(-1) | y.eq(0).all(dim=-1).unsqueeze(-2)
    return rounded(x @ y.mT).masked_fill_(absent, UNRELATED)


def exceeding(
    cosines: Tensor,
    threshold: float,
    doubt: float,
    decide: Callable[..., Tensor],
    otherwise: Callable[[], Tensor],
    cost: int,
    symmetric: bool = False,
) -> Tensor:
    """Which exact cosines exceed a threshold: 1 or 0, written over approximate cosines, which saves passes over memory.

    Args:
        cosines: (..., rows, columns), off by at most `doubt`.
        decide: given the indices of some of them, one (k,) int64 tensor per dimension, tells which ones do, as bool.
        otherwise: finds out about all of them; called if there are more to decide on than that is worth.
        cost: how many times as long as `otherwise` takes for one, `decide` does.
        symmetric: rows and columns are the same vectors, so that every decision counts twice.
    """
    margins = cosines.sub_(threshold)
    unsure = margins.abs()
    rows = (unsure.amin(dim=-1) <= doubt).nonzero()
    if len(rows) > 0:
        which, column = (unsure[rows.unbind(1)] <= doubt).nonzero(as_tuple=True)
        if len(which) * cost > cosines.numel():
            return otherwise()
        indices = (*rows[which].unbind(1), column)
        if symmetric:
            asked = (indices[-2] < column) | (margins[_mirrored(indices)].abs() > doubt)
            indices = tuple(index[asked] for index in indices)
        margins[indices] = decide(*indices).to(margins.dtype)
        if symmetric:
            margins[_mirrored(indices)] = margins[indices]
    return margins.gt_(0)


def _mirrored(indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *graph, row, column = indices
    return (*graph, column, row)


def slack(dim: int, device: torch.device) -> float:
    """How far a cosine from a float32 matrix product may be from the exact one.

    The rounding errors of a sum of `dim` products of two unit vectors are below dim * 2^-24, and below a small
    multiple of sqrt(dim) * 2^-24 unless they conspire (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); the multiple
    taken here is 8. Where PyTorch has been told to multiply float32 matrices in TF32 or bfloat16, what that rounds off
    the factors is added.
    """
    of_factors = {"tf32": 2.0**-9, "bf16": 2.0**-6}.get(_matmul_precision(device), 0.0)
    return 8 * (math.sqrt(dim) + 1) * 2.0**-24 + of_factors


def _matmul_precision(device: torch.device) -> str:
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # since PyTorch 2.9
    if precision is None:
        return {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
    return precision


def _doubled(vectors: Tensor) -> Tensor:
    """In float64, scaled if they were before, so that squares neither under- nor overflow."""
    if vectors.dtype != torch.float64:
        return vectors.double()
    largest = torch.linalg.vector_norm(vectors, ord=float("inf"), dim=-1, keepdim=True)
    return vectors / torch.where(largest > 0, largest, 1)
