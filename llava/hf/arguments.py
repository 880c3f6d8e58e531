"""Masks, positions and caches among the arguments of a model, in the forms that versions of transformers give them."""

from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache, under its name or that since transformers 5.24."""
    return kwargs.get("past_key_values", kwargs.get("cache"))


def valid_places(mask: Any, embeds: Tensor) -> Tensor:
    """(batch, length) bool, false for padding, of whatever mask the language model was to get."""
    batch, length = embeds.shape[:2]
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if not torch.is_tensor(mask):
        raise UserError(f"Masks of type {type(mask).__name__} are not supported; load with another attention.")
    if mask.ndim == 4:
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    return mask[:, :length].bool().to(embeds.device)


def shifted(positions: Tensor, shift: Tensor) -> Tensor:
    """Positions of new tokens, of as many axes as the model has, moved up; that of text alone stays."""
    moved = positions - shift.to(positions.device)[:, None]
    return torch.cat([positions[:1].expand_as(moved[:1]), moved[1:]]) if moved.ndim == 3 and len(moved) == 4 else moved


def check_next_turn(input_ids: Tensor, mask: Tensor | None) -> None:
    if mask is None or mask.shape[1] <= input_ids.shape[1]:
        raise UserError(
            "A cache with a compressed video is shorter than its prompt, so it cannot be continued with the whole "
            "conversation again; pass the new tokens only, with an attention_mask of full length, or a new cache."
        )
