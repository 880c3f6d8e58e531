"""What the vision tower tells about its patches besides their features, for the methods that declare it as an input.

    vision_attn     (frames, patches, 1) attention that each patch receives: the mean over heads and queries of
                    softmax(Q K^T / sqrt(head_dim)); sums to 1 over the patches of a frame
    vision_keys     (frames, patches, head_dim) mean over heads of the keys, biases included

Both belong to the last layer that the tower keeps, and are float32. They are computed from that layer's input, beside
the tower's own pass, in blocks of queries: no layer has to give up its fused attention, and the attention matrix
(16 heads x 729 x 729 per frame, 34 MB) is never held for more than a block.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method

BLOCK_ENTRIES = 2**24
"""Entries of the attention matrices of one block of queries: 64 MB of float32."""


def received_attention(layer: Any, hidden: Tensor) -> Tensor:
    """The signal `vision_attn` (frames, patches, 1) of an encoder layer, given its input (frames, patches, width)."""
    attention = layer.self_attn
    normalised = layer.layer_norm1(hidden)
    queries = _heads(attention.q_proj(normalised), attention.num_heads)
    keys = _heads(attention.k_proj(normalised), attention.num_heads).mT
    frames, heads, patches, _ = queries.shape
    received = queries.new_zeros(frames, patches)
    for block in queries.split(max(1, BLOCK_ENTRIES // (frames * heads * patches)), dim=2):
        received += ((block @ keys) * attention.scale).softmax(dim=-1).sum(dim=(1, 2))
    return (received / (heads * patches)).unsqueeze(-1)


def mean_keys(layer: Any, hidden: Tensor) -> Tensor:
    """The signal `vision_keys` of an encoder layer, given its input (frames, patches, width)."""
    attention = layer.self_attn
    return _heads(attention.k_proj(layer.layer_norm1(hidden)), attention.num_heads).mean(dim=1)


SIGNALS: dict[str, Callable[[Any, Tensor], Tensor]] = {"vision_attn": received_attention, "vision_keys": mean_keys}
"""From an encoder layer and its input to a signal (frames, patches, channels)."""


def needed_signals(config: CompressionConfig | None) -> tuple[str, ...]:
    """Names of the signals that a compression needs; none for None.

    Raises:
        ConfigError: it needs an input that no vision tower gives.
    """
    if config is None:
        return ()
    needed = get_method(config.method).needed(config.options)
    for name in needed:
        if name not in SIGNALS:
            raise ConfigError(
                f"Method {config.method!r} needs the input {name!r}, which a model does not compute (it computes "
                f"{', '.join(SIGNALS)}); call compress(features, config, {name}=...) yourself."
            )
    return needed


def as_input(name: str, signal: Tensor) -> Tensor:
    """From (frames, tokens, channels) to the shape that llava/token_compression/inputs.py states."""
    return signal[..., 0] if name == "vision_attn" else signal


def observe(layer: nn.Module, names: tuple[str, ...], run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a tower, and compute signals from the input that one of its layers gets meanwhile.

    Args:
        layer: the encoder layer.
        names: keys of `SIGNALS`.
        run: calls the tower; the layer must be called once in it, by the calling thread.

    Returns:
        What `run` returns, and each signal.
    """
    if not names:
        return run(), {}
    thread, inputs = threading.get_ident(), []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            inputs.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        features = run()
    finally:
        handle.remove()
    (hidden,) = inputs
    return features, {name: SIGNALS[name](layer, hidden) for name in names}


def _heads(projected: Tensor, heads: int) -> Tensor:
    """(frames, patches, width) -> (frames, heads, patches, head_dim) float32."""
    return projected.float().unflatten(-1, (heads, -1)).transpose(1, 2)
