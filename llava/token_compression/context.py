"""Compression on one model: for the duration of a block, or until it is removed."""

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
        model: what `load_pretrained_model` returns, or a model of transformers of one of the families in `llava.hf`.
        config: what to do, or
        settings: the arguments of a `CompressionConfig`.

    Raises:
        UserError: `model` does not support compression.
        ConfigError: settings that `CompressionConfig` refuses, both a config and settings, or a configuration that
            models of transformers cannot follow.
    """
    config = _config(config, settings)
    if _is_own(model):
        before = model.token_compression
        model.token_compression = config
        try:
            yield config
        finally:
            model.token_compression = before
        return
    from llava.hf.attach import add, drop  # here, as it imports this package

    entry = add(model, config)
    try:
        yield config
    finally:
        drop(model, entry)


def apply(model: Any, config: CompressionConfig | None = None, **settings: Any) -> CompressionConfig:
    """Let `model` compress its video tokens until `remove(model)`; arguments and errors are those of `compression`."""
    config = _config(config, settings)
    if _is_own(model):
        model.token_compression = config
    else:
        from llava.hf.attach import add

        add(model, config)
    return config


def remove(model: Any) -> None:
    """Undo every `apply`; the model is as it was loaded, and one that compresses nothing stays as it is.

    Raises:
        UserError: `model` does not support compression.
    """
    if _is_own(model):
        model.token_compression = None
    else:
        from llava.hf.attach import drop_all

        drop_all(model)


def _config(config: CompressionConfig | None, settings: dict[str, Any]) -> CompressionConfig:
    if config is None:
        return CompressionConfig.from_dict(settings)
    if settings:
        raise ConfigError(f"Give either a config or settings, not both; got a config and {', '.join(settings)}.")
    return config


def _is_own(model: Any) -> bool:
    """Whether the model reads the attribute `token_compression`, as those of this package do."""
    if "token_compression" in vars(model) or hasattr(type(model), "token_compression"):
        return True
    if not hasattr(model, "config"):
        raise UserError(
            f"{type(model).__name__} does not support token compression: it is no model of transformers and has no "
            "attribute `token_compression` of its own. Pass the model itself, without a wrapper around it."
        )
    return False
