"""DivPrune keeps the tokens whose smallest cosine distance to each other is as large as a greedy choice makes it. It
starts with the token that is farthest from its nearest one, and adds the one farthest from all those added so far.

Source: DivPrune, arXiv 2503.02175, which runs it on the tokens of one image; here the set is the whole video.
Cost: O(T^2 D + K T D) operations, O(T D + T^2) memory, of whose squares no more than 2^21 numbers at a time.

What is changed: a token that was picked is never picked again. The released code does not exclude it, so that of
duplicated tokens one may be picked twice and fewer than K are kept. It also compares each token with every pick in each
step; a running minimum gives the same choice for one product per step.
"""

from torch import Tensor

from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.max_min import max_min, most_isolated
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select


@register("divprune", merge=False)
def divprune(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Greedy max-min choice among all tokens of the video."""
    unit = normalised(features.flatten(0, 1))
    return select(features, max_min(unit, budget, most_isolated(unit)).sort().values)
