"""What the vision tower tells about its patches besides their features, for the methods that declare it as an input.

    vision_attn     (frames, patches, 1) attention that each patch receives: the mean over heads and queries of
                    softmax(Q K^T / sqrt(head_dim)); sums to 1 over the patches of a frame
    vision_keys     (frames, patches, head_dim) mean over heads of the keys, biases included
    vision_attn_wide, vision_keys_wide
                    the same as if the layer had a single head: (frames, patches, 1) and (frames, patches, width)
    map_attn        (frames, patches, 1) attention of SigLIP's pooling head, the mean over heads
    map_embed       (frames, width) the embedding of the frame that this head makes of its patches
    vision_attn_shallow, vision_attn_deep
                    (frames, patches, 1) as vision_attn, of layers 5 and 24 of 26, or those at the same share of the
                    depth
    patches         (frames, patches, hidden) what the projector makes of them

The first four belong to the last layer that the tower keeps. Those of a layer are computed from its input, beside the
tower's own pass, in blocks of queries: no layer has to give up its fused attention, and the attention matrix (16 heads
x 729 x 729 per frame, 34 MB) is never held for more than a block. The head is applied to the tower's features after
SigLIP's last layer norm; LLaVA drops it, so that it has to be given back (`SigLipVisionTower.load_pooling_head`). All
but `patches` are float32. The last three are of videos alone, and not pooled.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method

BLOCK_ENTRIES = 2**24
"""Entries of the attention matrices of one block of queries: 64 MB of float32."""

HEAD = ("map_attn", "map_embed")
PER_FRAME = ("map_embed",)
"""Signals that have no patches."""

PATCHES = "patches"
UNPOOLED = (PATCHES, "vision_attn_shallow", "vision_attn_deep")
"""Signals of patches as they are before the 2x2 pooling."""

DEPTHS = {"vision_attn_shallow": 5 / 26, "vision_attn_deep": 24 / 26}
"""At which share of the tower's depth a signal is computed, if not in its last layer."""


def received_attention(layer: Any, hidden: Tensor, heads: int) -> Tensor:
    """Attention (frames, patches, 1) that each patch receives.

    Args:
        layer: an encoder layer.
        hidden: (frames, patches, width), its input.
        heads: into how many equal parts queries and keys are split.
    """
    attention, normalised = layer.self_attn, layer.layer_norm1(hidden)
    queries = _heads(attention.q_proj(normalised), heads)
    keys = _heads(attention.k_proj(normalised), heads).mT
    frames, _, patches, channels = queries.shape
    received = queries.new_zeros(frames, patches)
    for block in queries.split(max(1, BLOCK_ENTRIES // (frames * heads * patches)), dim=2):
        received += ((block @ keys) * channels**-0.5).softmax(dim=-1).sum(dim=(1, 2))
    return (received / (heads * patches)).unsqueeze(-1)


def mean_keys(layer: Any, hidden: Tensor, heads: int) -> Tensor:
    """Mean over heads (frames, patches, width / heads) of the keys; arguments are those of `received_attention`."""
    return _heads(layer.self_attn.k_proj(layer.layer_norm1(hidden)), heads).mean(dim=1)


LAYER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vision_attn": lambda layer, hidden: received_attention(layer, hidden, layer.self_attn.num_heads),
    "vision_keys": lambda layer, hidden: mean_keys(layer, hidden, layer.self_attn.num_heads),
    "vision_attn_wide": lambda layer, hidden: received_attention(layer, hidden, 1),
    "vision_keys_wide": lambda layer, hidden: mean_keys(layer, hidden, 1),
    **dict.fromkeys(DEPTHS, lambda layer, hidden: received_attention(layer, hidden, layer.self_attn.num_heads)),
}
"""From an encoder layer and its input (frames, patches, width) to a signal (frames, patches, channels)."""


def layer_of(name: str, layers: int) -> int:
    """The layer, of so many, to which a signal belongs."""
    return min(round(DEPTHS.get(name, 1.0) * layers), layers - 1)


def pooled_signals(vision_model: Any, head: Any, features: Tensor) -> dict[str, Tensor]:
    """The signals of the pooling head, given the tower's features (frames, patches, width)."""
    tokens = vision_model.post_layernorm(features.to(head.probe))
    embed, weights = head.attention(head.probe.expand(len(tokens), -1, -1), tokens, tokens)
    embed = embed + head.mlp(head.layernorm(embed))
    return {"map_attn": weights[:, 0].float().unsqueeze(-1), "map_embed": embed[:, 0].float()}


def needed_signals(config: CompressionConfig | None) -> tuple[str, ...]:
    """Names of the signals that a compression needs; none for None.

    Raises:
        ConfigError: it needs an input that no vision tower gives.
    """
    if config is None:
        return ()
    needed = get_method(config.method).needed(config.options)
    for name in needed:
        if name not in (*LAYER, *HEAD, PATCHES):
            raise ConfigError(
                f"Method {config.method!r} needs the input {name!r}, which a model does not compute (it computes "
                f"{', '.join((*LAYER, *HEAD, PATCHES))}); call compress(features, config, {name}=...) yourself."
            )
    return needed


def as_input(name: str, signal: Tensor) -> Tensor:
    """From (frames, tokens, channels) to the shape that llava/token_compression/inputs.py states."""
    return signal[..., 0] if name in ("vision_attn", "vision_attn_wide", "map_attn", *DEPTHS) else signal


def check_head(tower: Any, names: Iterable[str]) -> None:
    """Refuse signals of the pooling head with a ConfigError where a `SigLipVisionTower` has none."""
    missing = [name for name in names if name in HEAD]
    if missing and tower.pooling_head is None:
        raise ConfigError(
            f"The compression method needs {' and '.join(missing)} of SigLIP's pooling head (vision_model.head), which "
            "LLaVA's checkpoints leave out; load it with model.get_vision_tower().load_pooling_head(folder of the "
            'SigLIP checkpoint), or let fastvid do without by its option signals="vision_attn".'
        )


@contextlib.contextmanager
def input_of(layer: Any) -> Iterator[list[Tensor]]:
    """A list to which the layer's input is added whenever this thread calls it inside the block."""
    inputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            inputs.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()


def _heads(projected: Tensor, heads: int) -> Tensor:
    """(frames, patches, width) -> (frames, heads, patches, head_dim) float32."""
    return projected.float().unflatten(-1, (heads, -1)).transpose(1, 2)
