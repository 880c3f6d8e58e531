"""KiToke draws tokens at random, the more likely the fewer others are near, and cuts the video where frames change
much. Between cuts each token is averaged into the most similar drawn one, the less the more others are near.

Source: KiToke, arXiv 2604.03414, of which no code is published; details from notes on it and a re-implementation.
Cost: O(T^2 D + K T D) operations, O(T D + T^2) memory, of whose squares no more than 2^21 numbers at a time.

What is changed: the published scales are those of another model's tokens. Here they come from the video unless given:
distances count against the median between tokens at the same place in neighbouring frames, and a change is large if it
is twice the median change. A part of the video of which no token was drawn gets its least crowded one, in exchange for
the most crowded of those drawn from parts with several; of more parts than K the weakest cuts are dropped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.errors import ConfigError
from llava.token_compression.apportion import bounded_shares
from llava.token_compression.components import BLOCK_ENTRIES, normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.joining import most_similar
from llava.token_compression.means import add_groups
from llava.token_compression.registry import Kept, register

CERTAIN = 1 - 1e-9
"""A unit that is drawn with at least this probability is drawn."""


@dataclass(frozen=True)
class KiTokeOptions:
    """Options of "kitoke".

    Attributes:
        alpha: of the Gaussian exp(-squared distance / alpha) that counts how many tokens are near; None for that of the
            video. 800 in the re-implementation, for Qwen3-VL.
        large: a change of the frame that is a cut; None for twice the median one. 110 there.
        jump: a change that exceeds a neighbouring one by so much is a cut, too, if it does by `relative` of that one as
            well; None for 7 / 11 of `large`, the proportion there.
        relative: see `jump`.
    """

    alpha: float | None = None
    large: float | None = None
    jump: float | None = None
    relative: float = 0.4

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"alpha must be above 0, got {self.alpha!r}.")


@register("kitoke", options=KiTokeOptions, merge=False)
def kitoke(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """A draw by diversity; weighted means within parts of the video."""
    _, tokens, dim = features.shape
    vectors = features.flatten(0, 1)
    diversity = 1 / crowd(features, config.options.alpha)
    part = parts(features, config.options, budget).repeat_interleave(tokens)
    chances = bounded_shares(diversity.double().cpu(), budget, 0, torch.ones(len(part)))
    drawn = _in_every_part(pivotal(chances, config.seed).to(part.device), diversity, part)
    positions = drawn.nonzero().view(-1)
    slots = torch.empty_like(part)
    unit = normalised(vectors)
    ends = torch.bincount(part).cumsum(0).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        own = (drawn[start:end]).nonzero().view(-1)
        slots[start:end] = most_similar(unit[start:end], own) + drawn[:start].sum()
    weights = diversity.unsqueeze(1)
    sums = add_groups(vectors.new_zeros(budget, dim), Stored(vectors * weights), slots)
    totals = add_groups(vectors.new_zeros(budget, 1), Stored(weights), slots)
    alone = (torch.bincount(slots, minlength=budget) == 1).unsqueeze(1)
    return Kept(torch.where(alone, vectors[positions], sums / totals), positions, slots)


def crowd(features: Tensor, alpha: float | None) -> Tensor:
    """How many tokens are near each one, itself included: (frames * tokens_per_frame,), at least 1."""
    vectors = (features - features.mean(dim=(0, 1))).flatten(0, 1)
    squares = vectors.square().sum(dim=1)
    if alpha is None:
        step = features.shape[1] if len(features) > 1 else 1
        neighbours = (vectors[step:] - vectors[:-step]).square().sum(dim=1)
        typical = float(neighbours.median()) if len(neighbours) > 0 else 1.0
        alpha = max(typical, 1e-4 * float(squares.mean()), 1e-12)  # squared distances have rounding errors
    rows = max(1, BLOCK_ENTRIES // len(vectors))
    near = []
    for start in range(0, len(vectors), rows):
        block = slice(start, start + rows)
        apart = (squares[block, None] + squares - 2 * (vectors[block] @ vectors.mT)).clamp_min(0)
        apart.diagonal(start).fill_(0)
        near.append((-apart / alpha).exp().sum(dim=1))
    return torch.cat(near)


def parts(features: Tensor, options: KiTokeOptions, most: int) -> Tensor:
    """The part (frames,) int64, of at most `most` ones from 0 on, that each frame belongs to."""
    changes = frame_changes(features)
    if len(changes) == 0:
        return torch.zeros(1, dtype=torch.int64, device=features.device)
    large = 2 * changes.median() if options.large is None else options.large
    jump = 7 / 11 * large if options.jump is None else options.jump
    lower = torch.full_like(changes, torch.inf)
    lower[1:-1] = torch.minimum(changes[:-2], changes[2:])  # a change at an end has no two neighbours
    excess = changes - lower
    cut = (changes > large) | ((excess > jump) & (excess > options.relative * lower))
    order = torch.where(cut, changes, -1).argsort(descending=True, stable=True)
    cut[order[most - 1 :]] = False
    return pad(cut.long(), (1, 0)).cumsum(0)


def frame_changes(features: Tensor) -> Tensor:
    """How much each frame differs from the one before: (frames - 1,).

    The mean distance of tokens at the same place, plus that of the tokens of the one before from their nearest ones.
    """
    before, after = features[:-1], features[1:]
    at_place = (after - before).norm(dim=-1).mean(dim=1)
    step = max(1, BLOCK_ENTRIES // features.shape[1] ** 2)
    pairs = zip(before.split(step), after.split(step), strict=True)
    nearest = [torch.cdist(some, others).amin(dim=2).mean(dim=1) for some, others in pairs]
    return at_place + torch.cat(nearest) if nearest else at_place


def pivotal(chances: Tensor, seed: int) -> Tensor:
    """Draw units with given chances: (n,) bool, of which exactly `chances.sum()` are true.

    One unit after the other competes with the one that is undecided so far: they share what they have such that one of
    both is decided, and nobody's chances change (pivotal sampling). Neighbours therefore rarely both get in, or out.

    Args:
        chances: (n,) float64 in [0, 1] on the CPU, adding up to a whole number.
    """
    luck = torch.rand(len(chances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    drawn = [False] * len(chances)
    open_unit, open_chance = -1, 0.0
    for unit, (chance, random) in enumerate(zip(chances.tolist(), luck, strict=True)):
        if chance >= CERTAIN:
            drawn[unit] = True
            continue
        both = open_chance + chance
        if both < 1:
            if random * both >= open_chance:
                open_unit = unit
            open_chance = both
        else:
            stays = random * (2 - both) >= 1 - chance  # the open unit stays open, and this one is drawn
            drawn[unit if stays else open_unit] = True
            open_unit, open_chance = (open_unit if stays else unit), both - 1
    if open_chance > 0.5:
        drawn[open_unit] = True
    return torch.tensor(drawn)


def _in_every_part(drawn: Tensor, diversity: Tensor, part: Tensor) -> Tensor:
    """Exchange drawn tokens (n,) bool so that every part has one."""
    drawn = drawn.clone()
    for lacking in (torch.bincount(part[drawn], minlength=int(part[-1]) + 1) == 0).nonzero().view(-1):
        drawn_in = torch.bincount(part[drawn], minlength=int(part[-1]) + 1)
        spare = drawn & (drawn_in[part] > 1)
        drawn[torch.where(spare, diversity, torch.inf).argmin()] = False
        drawn[torch.where(part == lacking, diversity, -torch.inf).argmax()] = True
    return drawn
