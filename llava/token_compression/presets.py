"""Names for settings that were found to work best, to be used as `preset: recommended`."""

from collections.abc import Mapping
from typing import Any

from llava.errors import ConfigError
from llava.yaml_schema import did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"method": "scissor_placed", "position_ids": "source"},
}
"""Keys of `CompressionConfig` by the name of the preset; docs/results.md says what they were chosen by."""


def expand_preset(mapping: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`mapping` with the keys that its `preset` stands for in the place of it; the other keys override them.

    Raises:
        ConfigError: there is no preset of that name; the message starts with `where`.
    """
    preset = mapping.get("preset")
    rest = {key: value for key, value in mapping.items() if key != "preset"}
    if preset is None:
        return rest
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"{where}: unknown preset {preset!r}{did_you_mean(preset, PRESETS)}.")
    return PRESETS[preset] | rest
