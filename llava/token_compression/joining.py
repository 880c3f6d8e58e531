"""What the other tokens become when some are kept: each joins the most similar kept one, and is averaged into it."""

import torch
from torch import Tensor

from llava.token_compression.components import BLOCK_ENTRIES
from llava.token_compression.cosine import Stored
from llava.token_compression.means import add_groups


def most_similar(unit: Tensor, anchors: Tensor) -> Tensor:
    """The anchor (n,) int64 in [0, k) most similar to each vector by cosine, of equals the first; an anchor has itself.

    Args:
        unit: (n, dim) vectors of length 1, or 0: a zero vector has similarity 0 with everything.
        anchors: (k,) int64, the distinct indices of the anchors.
    """
    _, found = highest_products(unit, unit[anchors])
    found[anchors] = torch.arange(len(anchors), device=unit.device)
    return found


def highest_products(vectors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Highest product (n,) of each vector (n, dim) with a target (k, dim), and its index (n,), the first of equals."""
    rows = max(1, BLOCK_ENTRIES // len(targets))
    found = [(block @ targets.mT).max(dim=1) for block in vectors.split(rows)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def mean_of_joined(vectors: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (count, dim) of the vectors of each slot, 0 where there are none, and their number (count, 1).

    A published rule is one line of an anchor a, this mean m and this number n: `(a + n m) / (1 + n)`
    for the mean of anchor and joined, `a + m` (VisionZip), `where(n > 0, b a + (1 - b) m, a)` (HoliTom).

    Args:
        vectors: (n, dim) float32 or float64.
        slots: (n,) int64, from -1 for a vector that joins nothing to count - 1.
    """
    some = slots >= 0
    sizes = torch.bincount(slots[some], minlength=count).unsqueeze(1)
    sums = add_groups(vectors.new_zeros(count, vectors.shape[1]), Stored(vectors[some]), slots[some])
    return sums / sizes.clamp_min(1), sizes


def first_members(slots: Tensor, count: int) -> Tensor:
    """The lowest index (count,) int64 of the tokens of each slot; slots (n,) int64, -1 for none, every other occurs."""
    index = torch.arange(len(slots), device=slots.device)
    none = torch.full((count + 1,), len(slots), device=slots.device)
    return none.scatter_reduce(0, slots + 1, index, "amin")[1:]
