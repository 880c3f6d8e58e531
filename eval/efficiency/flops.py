"""Floating-point operations of the decoder: counted by PyTorch, by our formulas, and by the paper's.

A multiplication and an addition are two operations, as `torch.utils.flop_counter` counts them. The paper's Eq. 9
counts them as one. Norms, rotary positions, softmax and activations are left out by all three.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

PAPER_NEW_TOKENS = 100
"""R of Eq. 9: the answer's length that Table 5 assumes."""


@dataclass(frozen=True)
class DecoderShape:
    """What the count depends on; grouped-query attention has fewer key-value heads than heads.

    Of a mixture of experts, `intermediate` is that of all experts that one token goes through, and `experts` how many
    the router chooses from.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":
        """From the configuration of a Qwen2, Qwen3 or Llama decoder, with a mixture of experts or without."""
        experts = getattr(config, "num_experts", None) or 0
        chosen = config.num_experts_per_tok * config.moe_intermediate_size if experts else config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=chosen,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
            experts=experts,
        )


def linear_flops(shape: DecoderShape, tokens: int) -> int:
    """All matrix products with weights for so many new tokens, the vocabulary's for the last of them alone.

    Per layer: queries and output (hidden x heads * head_dim), keys and values (hidden x kv_heads * head_dim), and the
    three matrices of the gated MLP, or those of the chosen experts and the router (hidden x experts).
    """
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    mlp = shape.hidden * (3 * shape.intermediate + shape.experts)
    return 2 * tokens * shape.layers * (attention + mlp) + 2 * shape.hidden * shape.vocabulary


def attention_flops(shape: DecoderShape, tokens: int, causal: bool) -> int:
    """Products of queries with keys, and of probabilities with values, in the prefill.

    Args:
        causal: count only the pairs that the mask leaves, which is what a causal kernel computes; otherwise all
            pairs, as `flop_counter` counts whatever the kernel skips.
    """
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs


def paper_flops(layers: int, hidden: int, intermediate: int, tokens: int, new_tokens: int = PAPER_NEW_TOKENS) -> float:
    """Eq. 9 of LLaVA-Scissor, behind the FLOPs of its Table 5: prefill and `new_tokens` decoding steps.

    It takes every head for a key-value head, the MLP for two matrices and a multiplication with its addition for one
    operation, and leaves out the prompt's text and the vocabulary.
    """
    d, c, k, r = hidden, intermediate, tokens, new_tokens
    prefill = 4 * k * d**2 + 2 * k**2 * d + 2 * k * d * c
    step = 4 * d**2 + 2 * d * c + 2 * (d * k + d * (r + 1) / 2)
    return layers * (prefill + r * step)


FUSED_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
]
"""Kernels counted by `_attention`: PyTorch's own formulas leave out the first, and refuse grouped heads in older
versions."""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """`query` (rows, heads, length, width) and so on are shapes."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _experts(tokens: Any, weights: Any, *_: Any, **__: Any) -> int:
    """(tokens, in) by (experts, in, out): every token goes through one of the experts."""
    return 2 * tokens[0] * weights[1] * weights[2]


def count_flops(function: Any) -> tuple[Any, dict[str, int]]:
    """Call `function` under `torch.utils.flop_counter`.

    The kernel of the package flash-attn is no operator of PyTorch and is not counted: compare with `linear_flops`.

    Returns:
        What `function` returned, and operations by operator, as in {"aten.mm": 10}.
    """
    with flop_counter() as counter:
        result = function()
    return result, operators(counter)


def flop_counter() -> FlopCounterMode:
    """A context in which operations are counted, fused attention among them."""
    formulas: dict[Any, Any] = dict.fromkeys(FUSED_ATTENTION, _attention)
    if hasattr(torch.ops.aten, "_grouped_mm"):  # not in older versions of PyTorch
        formulas[torch.ops.aten._grouped_mm] = _experts
    return FlopCounterMode(display=False, custom_mapping=formulas)


def operators(counter: FlopCounterMode) -> dict[str, int]:
    """Operations by operator, as in {"aten.mm": 10}."""
    return {str(operator): count for operator, count in counter.get_flop_counts().get("Global", {}).items()}
