"""Newline tokens of a video: where they go, also when only some of the video's tokens were kept."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from llava.errors import ConfigError


@dataclass(frozen=True)
class VisualTokens:
    """What one image or video puts into the prompt.

    Attributes:
        embeds: (kept, dim) kept tokens and newlines, in order.
        positions: (kept,) int64, the place each one has in the item's uncompressed sequence.
        length: tokens and newlines of the uncompressed sequence.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    length: int


def newline_period(config: Any, frames: int, tokens_per_frame: int) -> int | None:
    """Number of video tokens between two newlines under this checkpoint's config, or None for no newline at all.

    `mm_newline_position` asks for one newline after the whole video ("one_token", only if the merge type unpads),
    after each frame ("frame"), after each row of each frame ("grid"), or for none ("no_token"). A flat merge type
    and the published LLaVA-Scissor baselines (`mm_use_zip`) have none.

    Raises:
        ConfigError: unknown merge type or newline position.
    """
    merge_type = getattr(config, "mm_patch_merge_type", "flat")
    if merge_type == "flat" or getattr(config, "mm_use_zip", False):
        return None
    if not merge_type.startswith("spatial"):
        raise ConfigError(f'mm_patch_merge_type is {merge_type!r}; it must be "flat" or start with "spatial".')
    position = getattr(config, "mm_newline_position", "one_token")
    if position == "one_token":
        return frames * tokens_per_frame if "unpad" in merge_type else None
    periods = {"frame": tokens_per_frame, "grid": math.isqrt(tokens_per_frame), "no_token": None}
    if position not in periods:
        raise ConfigError(f'mm_newline_position is {position!r}; use "one_token", "frame", "grid" or "no_token".')
    return periods[position]


def insert_newlines(
    tokens: torch.Tensor, positions: torch.Tensor, source_tokens: int, newline: torch.Tensor | None, period: int | None
) -> VisualTokens:
    """Put a newline after the last kept token of every group of `period` source tokens that kept any.

    With all tokens kept this is exactly the uncompressed layout.

    Args:
        tokens: (kept, dim).
        positions: (kept,) int64, strictly increasing source index of each token.
        source_tokens: tokens before compression, newlines not counted.
        newline: (dim,) the newline's embedding; may be None where period is.
        period: see `newline_period`.
    """
    if period is None or newline is None:
        return VisualTokens(tokens, positions, source_tokens)
    group = positions // period  # (kept,)
    ends = torch.ones_like(group, dtype=torch.bool)  # is this the last kept token of its group?
    ends[:-1] = group[1:] != group[:-1]
    token_at = torch.arange(len(group), device=group.device) + ends.cumsum(0) - ends.long()
    newline_at = token_at[ends] + 1

    total = len(group) + len(newline_at)
    embeds = tokens.new_empty(total, tokens.shape[1])
    embeds[token_at] = tokens
    embeds[newline_at] = newline.to(tokens)
    places = positions.new_empty(total)
    places[token_at] = positions + group  # every earlier group has added one newline
    places[newline_at] = (group[ends] + 1) * period + group[ends]
    return VisualTokens(embeds, places, source_tokens + source_tokens // period)
