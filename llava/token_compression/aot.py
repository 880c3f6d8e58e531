"""Anchors of each frame take in its other patches by optimal transport, before the patches are pooled; then the anchors
of a clip's first frame take in those of its later frames, of which the least alike are kept as well.

Source: AOT, arXiv 2603.01400, as its released code describes it.
Cost: O(F N^2 D) operations, O(T D + N^2) memory: before the pooling there are about 4 N patches.

What is changed: the budget is met exactly. The anchors of each clip's first frame are kept once, where the released
code puts them into the prompt before and after they have taken in the others. What they leave of the budget is shared
by the later frames in proportion to their anchors. Where there are too few anchors for it, tokens with most attention
in the deep layer become some; where there are too many, those with least are dropped. Clips of any length work, and any
number of frames.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError, UserError
from llava.token_compression.apportion import apportion
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.ranking import best
from llava.token_compression.registry import Kept, register

PUBLISHED = ((0.0, 0.0), (0.1, 126 / 729), (0.15, 144 / 729), (0.2, 196 / 729), (0.25, 205 / 729), (1.0, 1.0))
"""Share of tokens that are kept, and of patches that are anchors; between them in proportion."""

WINDOWS = 3
"""Rows and columns of windows in each of which equally many anchors are chosen by the shallow layer."""


@dataclass(frozen=True)
class AotOptions:
    """Settings of AOT.

    Attributes:
        anchors: patches of each frame that take in the others; None is what was published for the size.
        local_share: of them, those that are chosen in windows by the shallow layer.
        smoothness: of the transport plan (lambda).
        transported: weight of what the plan moves; the rest goes to the nearest anchor. 1 is the paper's rule.
        place: weight of the distance between places in the cost of a plan within a frame; 0 is the paper's rule.
        clip: frames of a clip; None is what was published, 4, or 8 from 64 frames on.
    """

    anchors: int | None = None
    local_share: float = 0.5
    smoothness: float = 0.1
    transported: float = 0.9
    place: float = 0.5
    clip: int | None = None

    def __post_init__(self) -> None:
        for name in ("local_share", "transported"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}.")
        for name in ("anchors", "clip"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if not 0 < self.smoothness < math.inf or not 0 <= self.place < math.inf:
            raise ConfigError(
                f"smoothness must be above 0 and place at least 0, got {self.smoothness!r} and {self.place!r}."
            )


@register("aot", inputs=("patches", "vision_attn_shallow", "vision_attn_deep"), options=AotOptions, merge=False)
def aot(
    features: Tensor,
    config: CompressionConfig,
    budget: int,
    patches: Tensor,
    vision_attn_shallow: Tensor,
    vision_attn_deep: Tensor,
) -> Kept:
    """See the module."""
    options, (frames, tokens, _) = config.options, features.shape
    total = frames * tokens
    count = options.anchors or round(_interpolated(budget / total) * patches.shape[1])
    anchor = chosen(vision_attn_shallow, vision_attn_deep, min(max(1, count), patches.shape[1]), options.local_share)
    moved = torch.stack([_taken_in(frame, own, options) for frame, own in zip(patches, anchor, strict=True)])
    changed = torch.cat([moved - patches, anchor.unsqueeze(2).to(patches)], dim=2)
    changed = pooled(changed, tokens)  # pooling is linear
    values, share = features + changed[..., :-1], changed[..., -1]
    deep = pooled(vision_attn_deep.unsqueeze(2), tokens)[..., 0]

    is_anchor = share >= 0.5
    missing = budget - int(is_anchor.sum())
    if missing > 0:
        is_anchor = is_anchor.view(-1).index_fill(0, best(deep.masked_fill(is_anchor, -1).view(-1), missing), True)
        is_anchor = is_anchor.view(frames, tokens)
    length = options.clip or (8 if frames >= 64 else 4)
    first = (torch.arange(frames, device=is_anchor.device) % length == 0).unsqueeze(1) & is_anchor
    spare = int(first.sum()) - budget
    if spare > 0:
        order = best(-deep.masked_fill(~first, torch.inf).view(-1), spare)
        stays = torch.ones_like(first).view(-1).index_fill_(0, order, False).view_as(first)
        is_anchor, first = is_anchor & stays, first & stays
    sizes = (is_anchor & ~first).sum(dim=1)
    room = budget - int(first.sum())
    residual = apportion(sizes, room, 0, sizes) if room else torch.zeros_like(sizes)

    source = torch.arange(total, device=features.device).view(frames, tokens)
    goal = torch.full_like(source, -1)
    kept = values.clone()
    for start in range(0, frames, length):
        held = source[start][first[start]]
        goal[start, first[start]] = held
        anchors = kept.view(total, -1)[held]
        for frame in range(start + 1, min(start + length, frames)):
            own = is_anchor[frame].nonzero().view(-1)
            taken, plan = _joining(values[frame, own], anchors, frame - start, int(residual[frame]), options.smoothness)
            goal[frame, own[~taken]] = source[frame, own[~taken]]
            if len(held) > 0 and taken.any():
                goal[frame, own[taken]] = held[plan[taken].argmax(dim=1)]
                weights = plan[taken]
                anchors = (anchors + weights.mT @ values[frame, own[taken]]) / (1 + weights.sum(dim=0).unsqueeze(1))
        kept.view(total, -1)[held] = anchors
    flat = goal.view(-1)
    positions = (flat == source.view(-1)).nonzero().view(-1)
    number = torch.full_like(flat, -1).index_copy_(0, positions, torch.arange(len(positions), device=flat.device))
    membership = torch.where(flat >= 0, number[flat], -1)
    return Kept(kept.view(total, -1)[positions], positions, membership, single_is_own=False)


def chosen(shallow: Tensor, deep: Tensor, count: int, local_share: float) -> Tensor:
    """Anchors (frames, patches) bool, `count` in each frame.

    Args:
        shallow, deep: (frames, patches) attention that each patch receives in two layers.
        local_share: of the count, those that are chosen by the shallow layer, equally many in each window.
    """
    side = math.isqrt(shallow.shape[1])
    line = torch.arange(side, device=shallow.device) * WINDOWS // side
    window = (line.unsqueeze(1) * WINDOWS + line).view(-1)
    local = int(count * local_share) // WINDOWS**2
    anchor = torch.zeros_like(shallow, dtype=torch.bool)
    for number in range(WINDOWS**2):
        inside = (window == number).nonzero().view(-1)
        order = shallow[:, inside].argsort(dim=1, descending=True, stable=True)[:, :local]
        anchor.scatter_(1, inside[order], True)
    ranked = deep.masked_fill(anchor, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return anchor.scatter_(1, ranked[:, : count - int(anchor[0].sum())], True)


def pooled(grid: Tensor, tokens: int) -> Tensor:
    """(frames, tokens, channels) of (frames, patches, channels), as the model pools: see `llava.model.pooling`.

    The bilinear rule rounds the side up; of an even side it is the average.

    Raises:
        UserError: neither is a square grid with half the side of the other.
    """
    frames, patches, channels = grid.shape
    side, half = math.isqrt(patches), math.isqrt(tokens)
    if side**2 != patches or half**2 != tokens or half not in (side // 2, (side + 1) // 2):
        raise UserError(f"Method 'aot' needs grids of patches and of half the side, got {patches} and {tokens} tokens.")
    image = grid.mT.reshape(frames, channels, side, side)
    if half == side // 2:
        image = functional.avg_pool2d(image, 2)
    else:
        image = functional.interpolate(image, size=(half, half), mode="bilinear", align_corners=False)
    return image.flatten(2).mT


def transport(cost: Tensor, smoothness: float) -> Tensor:
    """The plan (n, k) of least cost (n, k) between uniform marginals, smoothed by entropy: Sinkhorn's algorithm.

    As released it ends when the rows' scaling changes by less than 0.01 in the mean, or after 100 rounds.
    """
    kernel = (-cost / smoothness).exp().clamp_min(torch.finfo(cost.dtype).tiny)
    rows, columns = cost.shape
    left, right = kernel.new_ones(rows), kernel.new_ones(columns)
    for _ in range(100):
        before = left
        left = (1 / rows) / (kernel @ right)
        right = (1 / columns) / (kernel.mT @ left)
        if (left - before).abs().mean() < 0.01:
            break
    return left.unsqueeze(1) * kernel * right


def _interpolated(share: float) -> float:
    """The share of patches that are anchors where this share of tokens is kept."""
    for (low, start), (high, end) in itertools.pairwise(PUBLISHED):
        if share <= high:
            return start + (end - start) * (share - low) / (high - low)
    return 1.0


def _taken_in(frame: Tensor, anchor: Tensor, options: AotOptions) -> Tensor:
    """One frame's patches (patches, dim) after its anchors have taken in the others."""
    if anchor.all():
        return frame
    side, unit = math.isqrt(len(frame)), normalised(frame)
    line = torch.linspace(0, 1, side, dtype=frame.dtype, device=frame.device)
    place = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=2).view(-1, 2)
    cosine = unit[~anchor] @ unit[anchor].mT
    plan = transport(1 - cosine + options.place * torch.cdist(place[~anchor], place[anchor]), options.smoothness)
    nearest = functional.one_hot(cosine.argmax(dim=1), cosine.shape[1]).to(frame)
    new = torch.zeros_like(frame[anchor])
    for weight, share in ((plan, options.transported), (nearest, 1 - options.transported)):
        new += share * (frame[anchor] + weight.mT @ frame[~anchor]) / (1 + weight.sum(dim=0).unsqueeze(1))
    return frame.masked_scatter(anchor.unsqueeze(1), new)


def _joining(values: Tensor, anchors: Tensor, steps: int, residual: int, smoothness: float) -> tuple[Tensor, Tensor]:
    """Which tokens (n, dim) of a later frame join a clip's anchors (k, dim), all but `residual`, and shares (n, k)."""
    if len(anchors) == 0 or len(values) == 0:
        taken = torch.arange(len(values), device=values.device) >= residual
        return taken, values.new_zeros(len(values), len(anchors))
    cost = 1 - normalised(values) @ normalised(anchors).mT
    cost = (cost - cost.min()) * (1 - math.exp(-(steps**2) / (2 * 1.5**2)))
    plan = transport(cost, smoothness)
    plan = plan / plan.sum(dim=1, keepdim=True)
    stays = best(-plan.amax(dim=1), residual)
    return torch.ones_like(plan[:, 0], dtype=torch.bool).index_fill(0, stays, False), plan
