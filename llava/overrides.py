"""What is written on the command line to replace a value of a YAML file: `key=value`, `section.key=value`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llava.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """One of them, taken apart.

    Attributes:
        where: what error messages about it start with.
        keys: the names that lead to the value, outermost first.
        value: what replaces it, read as YAML.
    """

    where: str
    keys: tuple[str, ...]
    value: Any

    def applied(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of nested mappings with the value in its place."""
        return _replaced(mapping, self.keys, self.value)


def parse_override(text: str) -> Override:
    """Read `section.key=value`.

    Raises:
        ConfigError: there is no `=`, or the value is not YAML.
    """
    keys, equals, value = text.partition("=")
    where = f"command line ({text})"
    if not equals:
        raise ConfigError(f"{where}: write key=value or section.key=value, for example video.num_frames=16.")
    try:
        return Override(where, tuple(keys.strip().split(".")), yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"{where}: the value {value!r} is not valid YAML.") from None


def _replaced(values: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = keys
    inner = values.get(first)
    return {**values, first: _replaced(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}
