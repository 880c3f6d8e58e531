"""Turn a mapping, such as a YAML file, into a typed dataclass: strictly, and with errors that name the way out.

    settings = build(Settings, read_mapping("settings.yaml"), "settings.yaml")

Unknown keys, missing keys and wrong types are `ConfigError`s that name the place, the key and the nearest valid name.
Nothing is converted silently, except an int where a float is asked for and a list where a tuple is asked for;
in particular a bool is not a number and text is not a number.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from llava.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], mapping: object, where: str) -> T:
    """An instance of dataclass `cls` from `mapping`, whose keys must be fields of `cls`.

    Args:
        cls: a dataclass; its annotations may use nested dataclasses, unions, `Literal`, `list[X]`, `tuple[X, ...]`,
            `tuple[X, Y]`, `dict[str, X]`, `Any` and plain types.
        mapping: keys and values, as read from YAML.
        where: what error messages start with, for example the file name.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or a value that `cls` itself refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {_shown(mapping)}.")
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise ConfigError(f"{where}: the key {name!r} is missing.")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in mapping.items()}
    try:
        return typing.cast(T, cls(**values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, repeats a key, or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the configuration file {path}: {reason}.") from None
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, got {_shown(content)}.")
    return content


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """The end of an error message: the valid name nearest to `name`, if one is near, and the whole list."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return f"{guess} Valid names: {', '.join(valid)}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let a repeated key overwrite the first one, made to refuse it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `hint`, or a ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
        raise ConfigError(f"{where}: unknown value {value!r}{did_you_mean(value, map(str, arguments))}.")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else build(typing.cast(type, hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected keys and values, got {_shown(value)}.")
        return {
            _convert(arguments[0], key, where): _convert(arguments[1], item, f"{where}: {key}")
            for key, item in value.items()
        }
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint or (isinstance(value, hint) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {_named(hint)}, got {_shown(value)}{_exponent_hint(hint, value)}.")


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    if any(type(value) is option for option in options):
        return value
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, where)
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where}: expected {' or '.join(map(_named, options))}, got {_shown(value)}.")


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {_shown(value)}.")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: expected a list of {len(arguments)} values, got {len(value)}.")
        hints = arguments
    else:
        hints = (arguments[0],) * len(value)
    return origin(
        _convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _named(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _exponent_hint(hint: Any, value: Any) -> str:
    """PyYAML reads 1e-3 as text; say so instead of leaving the reader to wonder."""
    if hint is float and isinstance(value, str):
        try:
            return f"; write it as {float(value)!r}, without quotes"
        except ValueError:
            pass
    return ""
