"""The projector from vision features to language-model embeddings."""

import re
from typing import Any

from torch import nn

from llava.errors import ConfigError


def build_vision_projector(config: Any) -> nn.Module:
    """Linear layer ("linear") or `mlp{N}x_gelu`: N linear layers with exact (erf) GELU between them.

    Maps (..., mm_hidden_size) to (..., hidden_size).

    Raises:
        ConfigError: unknown `mm_projector_type`.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ConfigError(f'mm_projector_type is {kind!r}; supported are "linear" and "mlp2x_gelu".')
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
