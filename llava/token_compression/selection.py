"""Methods that keep source tokens as they are: everything, and the selection rules of the paper's Table 4b."""

import torch
from torch import Tensor

from llava.token_compression.config import CompressionConfig
from llava.token_compression.registry import Kept, register


@register("none", any_dtype=True)
def none(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Every token is kept: the uncompressed model, which the others are measured against.

    Source: no method.
    Cost: O(T D) operations, O(T D) memory.
    """
    return select(features, torch.arange(budget, device=features.device))


@register("random", any_dtype=True)
def random(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Tokens are drawn without replacement. The draw depends on `config.seed` alone, not on the device.

    Source: a rule of LLaVA-Scissor's Table 4b, arXiv 2506.21862.
    Cost: O(T + K D) operations, O(T + K D) memory.
    """
    total = features.shape[0] * features.shape[1]
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed))[:budget]
    return select(features, drawn.sort().values.to(features.device))


@register("uniform", any_dtype=True)
def uniform(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Tokens at equal distances in source order, the first and (from two tokens on) the last included.

    Source: a rule of LLaVA-Scissor's Table 4b, arXiv 2506.21862.
    Cost: O(T + K D) operations, O(T + K D) memory.
    """
    total = features.shape[0] * features.shape[1]
    steps = torch.arange(budget, device=features.device)
    return select(features, steps * (total - 1) // max(1, budget - 1))


@register("l2norm")
def l2norm(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Tokens with the largest Euclidean norm are kept; of equal norms those with the lowest source index.

    Source: a rule of LLaVA-Scissor's Table 4b, arXiv 2506.21862.
    Cost: O(T D) operations, O(T D) memory.
    """
    norms = features.flatten(0, 1).norm(dim=-1)
    return select(features, norms.argsort(descending=True, stable=True)[:budget].sort().values)


def select(features: Tensor, positions: Tensor) -> Kept:
    """Keep the source tokens at these flat indices, in ascending order; no other token is part of a kept one."""
    flat = features.flatten(0, 1)
    membership = torch.full((len(flat),), -1, dtype=torch.int64, device=features.device)
    membership[positions] = torch.arange(len(positions), device=features.device)
    return Kept(flat[positions], positions, membership)
