"""Methods that prune inside the language model: the hooks that one forward pass needs, if any."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from llava.errors import UserError
from llava.model.language_model.inner_decoding import Answering, Decoding
from llava.model.language_model.inner_reading import ATTRIBUTE, Continuing, Hook, Hooks, Prompt, Reading
from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method


@contextlib.contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    """Put hooks in front of layers for the passes of this thread inside the block."""
    thread = threading.get_ident()

    def guarded(hook: Hook) -> Hook:
        return lambda *arguments: hook(*arguments) if threading.get_ident() == thread else None

    handles = [layer.register_forward_pre_hook(guarded(hook), with_kwargs=True) for layer, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inner_pass(
    decoder: Any,
    config: CompressionConfig | None,
    prompt: Prompt | None,
    mask: Tensor | None,
    cache: Any,
    length: int,
    labels: Tensor | None,
) -> contextlib.AbstractContextManager[None]:
    """A block for one pass, in which tokens are pruned inside the language model if that is asked for.

    Args:
        decoder: the language model without its head.
        config: None for no compression.
        prompt: the prompts, as long as they can be told from text.
        mask: (rows, tokens in the cache and of this pass) with 0 for padding, or None.
        cache: of earlier tokens, or None.
        length: tokens of this pass.
        labels: of a loss, or None.

    Raises:
        UserError: this kind of attention, cache or prompt does not work with it, or there are labels.
        ConfigError: a layer or a size that there is not.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if cache is not None and past == 0:
        vars(cache).pop(ATTRIBUTE, None)  # emptied, and used again
    asked = config is not None and get_method(config.method).before is not None
    if config is not None and asked and prompt is not None and _has_videos(prompt, past):
        if labels is not None:
            raise UserError(
                f"Method {config.method!r} leaves no place for the labels of dropped tokens: train without it."
            )
        if past > 0 or prompt.videos.shape[1] > length:
            raise UserError(
                f"Method {config.method!r} takes a prompt in one piece, and no video after others in a cache: give "
                "the whole conversation with a new cache, without prefill_chunk_size."
            )
        if cache is not None and cache.is_compileable:
            raise UserError(
                f"Method {config.method!r} leaves fewer tokens in some layers, which a static cache has no place for: "
                "leave out cache_implementation."
            )
        reading = (Answering if config.options.while_decoding else Reading)(decoder, config, prompt, length)
        return hooked(reading.hooks()) if reading.prunes else contextlib.nullcontext()
    state = None if cache is None else vars(cache).get(ATTRIBUTE)
    if isinstance(state, Decoding):
        return hooked(state.step(decoder, cache, mask, length))
    return contextlib.nullcontext() if state is None else hooked(Continuing(decoder, cache, mask, length).hooks())


def _has_videos(prompt: Prompt, past: int) -> bool:
    """Whether there are any after the first `past` tokens."""
    return prompt.videos.shape[1] > past and bool((prompt.videos[:, past:] > 0).any())
