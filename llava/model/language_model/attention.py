"""What pruning inside the language model needs of its attention: one row of it, and masks, for any kernel."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from llava.errors import UserError


def kernel(config: Any) -> str:
    """Which kind of masks the attention of a language model takes: "eager", "sdpa" or "flash".

    Raises:
        UserError: another one.
    """
    name = config._attn_implementation or "eager"
    if name.startswith("flash_attention"):
        return "flash"
    if name in ("eager", "sdpa"):
        return str(name)
    raise UserError(
        f"Methods that prune inside the language model work with the attention eager, sdpa and flash_attention_*, not "
        f"with {name!r}: load the model with another attn_implementation, or choose another method."
    )


@torch.no_grad()
def attention_rows(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    query: Tensor,
    valid: Tensor,
    keys: Tensor | None = None,
) -> Tensor:
    """What some tokens of each row pay in a layer to all tokens up to themselves.

    Args:
        layer: of the decoder.
        hidden: (rows, tokens, dim) that enter it.
        rotary: cosines and sines (rows or 1, tokens, dim of a head); None for no positions, and later tokens seen.
        query: (rows, queries) int64, the places of these tokens.
        valid: (rows, earlier tokens + tokens) bool, False for padding.
        keys: (rows, heads of keys, earlier tokens, dim of a head), rotated, of tokens before these.

    Returns:
        (rows, heads, queries, earlier tokens + tokens) float32, with the sum 1 over all of these tokens.
    """
    attention = layer.self_attn
    rows, tokens = hidden.shape[:2]
    weight = layer.input_layernorm.weight
    # A layer on another device moves what it is given, but only once this hook is done; offloaded parts do so here too.
    normed = layer.input_layernorm(hidden if weight.is_meta else hidden.to(weight.device))
    own = torch.arange(rows, device=normed.device)[:, None], query.to(normed.device)
    queries = attention.q_proj(normed[own]).view(rows, query.shape[1], -1, attention.head_dim).transpose(1, 2)
    new = attention.k_proj(normed).view(rows, tokens, -1, attention.head_dim).transpose(1, 2)
    if rotary is not None:
        cos, sin = (part.to(normed.device).expand(rows, -1, -1) for part in rotary)
        queries, _ = apply_rotary_pos_emb(queries, queries, cos[own], sin[own])
        _, new = apply_rotary_pos_emb(new, new, cos, sin)
    keys = new if keys is None else torch.cat([keys.to(new.device), new], dim=2)
    grouped = queries.reshape(rows, keys.shape[1], -1, attention.head_dim).float()  # heads that share their keys
    with torch.autocast(grouped.device.type, enabled=False):
        scores = (grouped @ keys.float().mT).view(rows, -1, query.shape[1], keys.shape[2]) * attention.scaling
    seen = valid.to(scores.device).unsqueeze(1)
    if rotary is not None:
        last = (own[1] + keys.shape[2] - tokens).unsqueeze(2)
        seen = seen & (torch.arange(keys.shape[2], device=last.device) <= last)
    return scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(dim=-1)


def mask_for(kind: str, valid: Tensor, full: bool, queries: int, hidden: Tensor) -> Tensor | None:
    """The mask that a layer takes for the last `queries` of its tokens, earlier ones included.

    Args:
        kind: what `kernel` returned.
        valid: (rows, tokens) bool, False for what none of them sees, or (rows, queries, tokens); not so for "flash".
        full: whether all are valid.
        hidden: what enters the layer, for dtype and device.
    """
    tokens = valid.shape[-1]
    if full and (kind == "flash" or queries == 1 or (kind == "sdpa" and queries == tokens)):
        return None
    valid = valid.to(hidden.device)
    if kind == "flash":
        return valid
    place = torch.arange(tokens, device=valid.device)
    own = place[tokens - queries :, None]
    seen = valid if valid.dim() == 3 else valid.unsqueeze(1)
    seen = ((seen & (place <= own)) | (place == own)).unsqueeze(1)  # itself, so that none sees nothing at all
    if kind == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, torch.finfo(hidden.dtype).min)
