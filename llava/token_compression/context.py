"""Compression for the duration of a block, on one model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from llava.errors import ConfigError, UserError
from llava.token_compression.config import CompressionConfig


@contextlib.contextmanager
def compression(model: Any, config: CompressionConfig | None = None, **settings: Any) -> Iterator[CompressionConfig]:
    """Let `model` compress its video tokens inside the block; afterwards it is as before.

        with compression(model, retention_ratio=0.1):
            model.generate(...)

    Blocks nest (the innermost one counts), and nothing but this model is touched.

    Args:
        model: a model with a `token_compression` attribute, such as `load_pretrained_model` returns.
        config: what to do, or
        settings: the arguments of a `CompressionConfig`.

    Raises:
        UserError: `model` does not support compression.
        ConfigError: settings that `CompressionConfig` refuses, or both a config and settings.
    """
    if config is None:
        config = CompressionConfig.from_dict(settings)
    elif settings:
        raise ConfigError(f"Give either a config or settings, not both; got a config and {', '.join(settings)}.")
    if "token_compression" not in vars(model) and not hasattr(type(model), "token_compression"):
        raise UserError(
            f"{type(model).__name__} does not support token compression: it has no attribute `token_compression` of "
            "its own. Pass a model from llava.model.builder.load_pretrained_model, without a wrapper around it."
        )
    before = model.token_compression
    model.token_compression = config
    try:
        yield config
    finally:
        model.token_compression = before
