"""How much memory a model needs, computed from shapes alone."""

from typing import Any

from torch import nn

from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.quantized import BLOCK, quantized_layers

BLOCKS_PER_SCALE = 256
"""Scales of 4-bit blocks that are themselves stored in 8 bits under one float32 scale (double quantisation)."""


def parameter_counts(model: LlavaQwenForCausalLM) -> dict[str, int]:
    """Parameters of each part; tied embeddings count once, and the newline with the projector."""
    counts = {"language model": 0, "vision tower": 0, "projector": 0}
    for name, parameter in _parameters(model).items():
        if name.startswith("model.vision_tower."):
            part = "vision tower"
        elif name.startswith(("model.mm_projector.", "model.image_newline")):
            part = "projector"
        else:
            part = "language model"
        counts[part] += parameter.numel()
    return counts


def parameter_bytes(model: LlavaQwenForCausalLM, itemsize: int, bits: int | None = None) -> dict[str, int]:
    """Bytes of every parameter once loaded.

    Args:
        itemsize: bytes of an element that is not quantised.
        bits: None, or 8 or 4 for quantised loading. 8 bits add a float32 scale per row; 4 bits an 8-bit scale per
            block of 64 and a float32 scale per 256 blocks.
    """
    rows = {f"{name}.weight": layer.out_features for name, layer in quantized_layers(model)} if bits else {}
    sizes = {}
    for name, parameter in _parameters(model).items():
        count = parameter.numel()
        if name not in rows:
            sizes[name] = count * itemsize
        elif bits == 8:
            sizes[name] = count + 4 * rows[name]
        else:
            sizes[name] = count // 2 + count // BLOCK + 4 * count // (BLOCK * BLOCKS_PER_SCALE)
    return sizes


def weight_bytes(model: LlavaQwenForCausalLM) -> dict[str, int]:
    """Bytes of all weights as float32, as bfloat16, and quantised to 8 and 4 bits with the rest in 16."""
    loaded = {"float32": (4, None), "bfloat16": (2, None), "8-bit": (2, 8), "4-bit": (2, 4)}
    return {name: sum(parameter_bytes(model, *arguments).values()) for name, arguments in loaded.items()}


def cache_bytes(config: Any, tokens: int) -> int:
    """Bytes of the key-value cache for so many tokens of one sequence, in 16 bits."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2


def _parameters(model: LlavaQwenForCausalLM) -> dict[str, nn.Parameter]:
    """Every parameter once, without the head where it is the embedding."""
    parameters = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)
    return parameters
