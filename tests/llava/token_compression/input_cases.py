"""Inputs that a vision tower might give, random, for tests of the methods that need them."""

import torch

from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method

HEAD_DIM, WIDTH = 6, 10


def inputs_for(config: CompressionConfig, frames: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What `config`'s method needs, for so many frames and tokens per frame."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "vision_attn": torch.randn(frames, tokens, generator=generator).softmax(dim=-1),
        "vision_keys": torch.randn(frames, tokens, HEAD_DIM, generator=generator),
        "vision_attn_wide": torch.randn(frames, tokens, generator=generator).mul(2).softmax(dim=-1),
        "vision_keys_wide": torch.randn(frames, tokens, WIDTH, generator=generator),
        "map_attn": torch.randn(frames, tokens, generator=generator).softmax(dim=-1),
        "map_embed": torch.randn(frames, WIDTH, generator=generator),
    }
    return {name: made[name] for name in get_method(config.method).needed(config.options)}
