"""Start and end compression on a model of transformers."""

from typing import Any

import transformers

from llava.errors import ConfigError
from llava.hf.mechanism import ATTRIBUTE, Mechanism
from llava.token_compression.config import CompressionConfig
from llava.token_compression.inner import refuse_inner
from llava.token_compression.registry import get_method
from llava.versions import warn_if_untested


def add(model: Any, config: CompressionConfig) -> object:
    """Start compressing; what is returned is for `drop`.

    Raises:
        UserError: the model is not supported.
        ConfigError: its family does not give what the configuration asks for.
    """
    _check_config(config)
    warn_if_untested(transformers.__version__)
    mechanism = vars(model).get(ATTRIBUTE)
    if mechanism is None:
        mechanism = Mechanism(model)
        mechanism.install()
    entry = (config,)
    mechanism.entries.append(entry)
    return entry


def drop(model: Any, entry: object) -> None:
    """End what `add` started; nothing where `drop_all` has done so."""
    mechanism = vars(model).get(ATTRIBUTE)
    if mechanism is None:
        return
    mechanism.entries = [other for other in mechanism.entries if other is not entry]
    if not mechanism.entries:
        mechanism.remove()


def drop_all(model: Any) -> None:
    """End everything that `add` started on a model."""
    mechanism = vars(model).get(ATTRIBUTE)
    if mechanism is not None:
        mechanism.remove()


def _check_config(config: CompressionConfig) -> None:
    refuse_inner(config)
    needed = get_method(config.method).needed(config.options)
    if needed:
        raise ConfigError(
            f"Method {config.method!r} needs {', '.join(needed)}, which the models of transformers do not give; choose "
            "one that needs no inputs, or a model of llava.model.builder.load_pretrained_model."
        )
