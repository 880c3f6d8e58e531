from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from llava.errors import ConfigError
from llava.yaml_schema import build, read_mapping


@dataclass(frozen=True)
class Inner:
    rate: float | None = None
    mode: Literal["fast", "exact"] = "exact"

    def __post_init__(self):
        if self.rate is not None and self.rate < 0:
            raise ConfigError("rate must not be negative.")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    enabled: bool = True
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    span: tuple[float, float] | None = None
    tags: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    limit: int | Literal["auto"] = "auto"


def test_builds_nested_typed_values():
    mapping = {"name": "a", "inner": {"rate": 1}, "sizes": [1, 2], "span": [0, 1.5], "extra": {"x": [1]}, "limit": 3}
    outer = build(Outer, mapping, "f.yaml")
    assert outer == Outer("a", inner=Inner(1.0), sizes=(1, 2), span=(0.0, 1.5), extra={"x": [1]}, limit=3)
    assert isinstance(outer.inner.rate, float)
    assert isinstance(outer.span[0], float)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"name": "a", "cuont": 1}, ["f.yaml", "'cuont'", "did you mean 'count'"]),
        ({}, ["f.yaml", "'name'", "missing"]),
        ({"name": 1}, ["name", "text", "1 (int)"]),
        ({"name": "a", "count": True}, ["count", "whole number", "True (bool)"]),
        ({"name": "a", "count": 1.0}, ["count", "whole number"]),
        ({"name": "a", "count": None}, ["count", "nothing"]),
        ({"name": "a", "enabled": 1}, ["enabled", "true or false"]),
        ({"name": "a", "inner": {"rate": "1e-3"}}, ["inner: rate", "a number", "0.001"]),
        ({"name": "a", "inner": {"rate": True}}, ["inner: rate", "a number"]),
        ({"name": "a", "inner": {"rate": -1}}, ["inner", "must not be negative"]),
        ({"name": "a", "inner": {"mode": "exat"}}, ["inner: mode", "'exact'", "fast"]),
        ({"name": "a", "inner": None}, ["inner", "keys and values", "nothing"]),
        ({"name": "a", "sizes": 3}, ["sizes", "list"]),
        ({"name": "a", "sizes": [1, "2"]}, ["sizes[1]", "whole number"]),
        ({"name": "a", "span": [1]}, ["span", "2 values"]),
        ({"name": "a", "extra": [1]}, ["extra", "keys and values"]),
        ({"name": "a", "limit": 1.5}, ["limit", "1.5"]),
        ([1], ["f.yaml", "keys and values"]),
    ],
)
def test_mistakes_name_the_place_and_the_way_out(mapping, words):
    with pytest.raises(ConfigError) as caught:
        build(Outer, mapping, "f.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_read_mapping_returns_the_content(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\nb:\n  c: [1, 2]\n")
    assert read_mapping(path) == {"a": 1, "b": {"c": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not valid YAML"), ("a: 1\na: 2", "'a' appears twice"), ("", "nothing"), ("- 1", "keys and values")],
)
def test_bad_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_mapping(path)
    assert "bad.yaml" in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        read_mapping(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_mapping(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_mapping(tmp_path / "latin.yaml")
