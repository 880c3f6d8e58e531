"""Newline tokens: where they go in an image or video, also when only some of its tokens were kept."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from llava.errors import ConfigError


@dataclass(frozen=True)
class SourceTokens:
    """All tokens of one image or video, and where newlines go among them.

    Attributes:
        tokens: (frames, tokens per frame, dim).
        base: so many tokens at the beginning are followed by no newline.
        period: after them a newline follows every `period` tokens; None for no newline at all.
    """

    tokens: torch.Tensor
    base: int = 0
    period: int | None = None


@dataclass(frozen=True)
class VisualTokens:
    """What one image or video puts into the prompt.

    Attributes:
        embeds: (kept, dim) kept tokens and newlines, in order.
        positions: (kept,) int64, the place each one has in the item's uncompressed sequence.
        length: tokens and newlines of the uncompressed sequence.
        groups: (kept,) int64, the group of each token of what is compressed, from 0 on; -1 for newlines. Or None.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    length: int
    groups: torch.Tensor | None


def merge_type(config: Any) -> str:
    """`mm_patch_merge_type`, which is "flat" by default and in the published LLaVA-Scissor baselines (`mm_use_zip`).

    Raises:
        ConfigError: neither "flat" nor a kind of "spatial".
    """
    if getattr(config, "mm_use_zip", False):
        return "flat"
    merge = getattr(config, "mm_patch_merge_type", "flat")
    if merge != "flat" and not merge.startswith("spatial"):
        raise ConfigError(f'mm_patch_merge_type is {merge!r}; it must be "flat" or start with "spatial".')
    return merge


def newline_period(config: Any, frames: int, tokens_per_frame: int) -> int | None:
    """Number of video tokens between two newlines under this checkpoint's config, or None for no newline at all.

    `mm_newline_position` asks for one newline after the whole video ("one_token", only if the merge type unpads),
    after each frame ("frame"), after each row of each frame ("grid"), or for none ("no_token"). A flat merge type
    has none.

    Raises:
        ConfigError: unknown merge type or newline position.
    """
    merge = merge_type(config)
    if merge == "flat":
        return None
    position = getattr(config, "mm_newline_position", "one_token")
    if position == "one_token":
        return frames * tokens_per_frame if "unpad" in merge else None
    periods = {"frame": tokens_per_frame, "grid": math.isqrt(tokens_per_frame), "no_token": None}
    if position not in periods:
        raise ConfigError(f'mm_newline_position is {position!r}; use "one_token", "frame", "grid" or "no_token".')
    return periods[position]


def insert_newlines(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    source: SourceTokens,
    newline: torch.Tensor | None,
    groups: torch.Tensor | None = None,
) -> VisualTokens:
    """Put a newline after the last kept token of every period that kept any.

    With all tokens kept this is exactly the uncompressed layout.

    Args:
        tokens: (kept, dim).
        positions: (kept,) int64, strictly increasing index of each token among the source's.
        source: what the tokens were kept of.
        newline: (dim,) the newline's embedding; may be None where `source.period` is.
        groups: (kept,) int64, the group of each token, from 0 on, or None.
    """
    total = source.tokens.shape[0] * source.tokens.shape[1]
    if source.period is None or newline is None:
        return VisualTokens(tokens, positions, total, groups)
    row = (positions - source.base).div(source.period, rounding_mode="floor")  # (kept,), negative in the base
    ends = row >= 0
    ends[:-1] &= row[1:] != row[:-1]  # is this the last kept token of its row?
    earlier = ends.cumsum(0) - ends.long()  # newlines before each token
    token_at = torch.arange(len(row), device=row.device) + earlier
    newline_at = token_at[ends] + 1

    length = len(row) + len(newline_at)
    embeds = tokens.new_empty(length, tokens.shape[1])
    embeds[token_at] = tokens
    embeds[newline_at] = newline.to(tokens)
    places = positions.new_empty(length)
    places[token_at] = positions + row.clamp_min(0)  # every earlier row has a newline in the source
    places[newline_at] = source.base + (row[ends] + 1) * source.period + row[ends]
    if groups is not None:
        groups = torch.full_like(places, -1).index_copy_(0, token_at, groups)
    return VisualTokens(embeds, places, total + (total - source.base) // source.period, groups)
