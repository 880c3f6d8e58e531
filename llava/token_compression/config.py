"""What to compress, by how much, and by which method."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from llava.errors import ConfigError
from llava.token_compression.presets import expand_preset
from llava.token_compression.registry import get_method
from llava.yaml_schema import build, did_you_mean, read_mapping


@dataclass(frozen=True)
class CompressionConfig:
    """One compression setting. Exactly one of the three sizes is given, except for method "none", which needs none.

    Attributes:
        method: one of `list_methods()`; "none" keeps everything.
        similarity_threshold: tau in [-1, 1]; tokens are joined where their cosine similarity is above it. The token
            count is an outcome.
        retention_ratio: r in (0, 1]; exactly max(1, round(r * source tokens)) tokens are kept.
        retained_tokens: exactly so many tokens are kept.
        error_tolerance: epsilon of the paper's vertex sampling (Eq. 2), 0 for exact components.
        temporal: run the second step, over all frames.
        merge: run the final merge of all source tokens (Eq. 7 and 8); None becomes what the method is published with:
            true for "scissor".
        images: compress images as well as videos. What counts as an image's source tokens is what it would put into
            the prompt: its crops after merging, black borders cut off, newlines left out. These are one frame; the
            crops are the frames where nothing is merged (a flat merge type, `mm_use_zip`). Then, as in a video, a
            newline follows the last kept token of every row that kept any. Images without `images=True`, and those
            given as one 4-D tensor, are left as they are.
        position_ids: "contiguous" numbers the kept tokens one after the other, as published; "source" leaves each at
            the rotary position of its representative, and each newline at its own. None follows the model: "source"
            where positions are triples of frame, row and column (the Qwen-VL models), else "contiguous".
        seed: of everything random.
        options: settings that only this method has, as keys and values or as its own dataclass, which is what they
            become; None where it has none.

    Raises:
        ConfigError: an unknown method or option, a value out of range or of the wrong type, no size or more than one.
    """

    method: str = "scissor"
    similarity_threshold: float | None = None
    retention_ratio: float | None = None
    retained_tokens: int | None = None
    error_tolerance: float = 0.0
    temporal: bool = True
    merge: bool | None = None
    images: bool = False
    position_ids: Literal["contiguous", "source"] | None = None
    seed: int = 0
    options: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ConfigError(f"method must be text, got {self.method!r}.")
        method = get_method(self.method)
        for name in ("similarity_threshold", "retention_ratio", "error_tolerance"):
            self._normalise(name, Real, float, "a number")
        for name in ("retained_tokens", "seed"):
            self._normalise(name, Integral, int, "a whole number")
        if self.merge is None:
            object.__setattr__(self, "merge", method.merge)
        for name in ("temporal", "merge", "images"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        choices = ("contiguous", "source")
        if self.position_ids is not None and self.position_ids not in choices:
            raise ConfigError(f"Unknown position_ids {self.position_ids!r}{did_you_mean(self.position_ids, choices)}.")
        self._check_ranges()
        self._check_size(method.takes_threshold)
        self._build_options(method.options)
        if self.merge and method.before == "none":
            raise ConfigError(f"Method {self.method!r} keeps all tokens before the language model: nothing to merge.")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "compression") -> "CompressionConfig":
        """Build from keys and values; `where` starts every error message.

        The key `preset` stands for those of `llava.token_compression.presets.PRESETS`; other keys override them.

        Raises:
            ConfigError: an unknown key or preset, or anything that the constructor refuses.
        """
        return build(cls, expand_preset(mapping, where) if isinstance(mapping, Mapping) else mapping, where)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "CompressionConfig":
        """Read a YAML file that holds these keys, or the `compression` section of an experiment's file.

        Raises:
            ConfigError: the file cannot be read, or its content is refused as by `from_dict`.
        """
        mapping = read_mapping(path)
        if "compression" in mapping:
            return cls.from_dict(mapping["compression"], f"{path}: compression")
        return cls.from_dict(mapping, str(path))

    def budget(self, source_tokens: int) -> int | None:
        """The exact number of tokens to keep of `source_tokens`, or None where a threshold decides.

        Raises:
            ConfigError: more tokens are asked for than there are.
        """
        if self.similarity_threshold is not None:
            return None
        if self.retained_tokens is None:
            return max(1, round((1.0 if self.retention_ratio is None else self.retention_ratio) * source_tokens))
        if self.retained_tokens > source_tokens:
            raise ConfigError(
                f"retained_tokens is {self.retained_tokens}, but the input has only {source_tokens} tokens; "
                "ask for fewer, or give a retention_ratio."
            )
        return self.retained_tokens

    def _normalise(self, name: str, kind: type, convert: type, expected: str) -> None:
        """Check a number's type, and turn a NumPy number into Python's own so that it can be written to JSON."""
        value = getattr(self, name)
        optional = {field.name: field.default for field in fields(self)}[name] is None
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ConfigError(f"{name} must be {expected}, got {value!r}.")
        object.__setattr__(self, name, convert(value))

    def _build_options(self, kind: type | None) -> None:
        if kind is None:
            if self.options:
                raise ConfigError(f"Method {self.method!r} has no options, got {self.options!r}.")
            object.__setattr__(self, "options", None)
        elif not isinstance(self.options, kind):
            given = {} if self.options is None else self.options
            object.__setattr__(self, "options", build(kind, given, f"options of method {self.method!r}"))

    def _check_ranges(self) -> None:
        tau, ratio, tokens = self.similarity_threshold, self.retention_ratio, self.retained_tokens
        if tau is not None and not -1 <= tau <= 1:
            raise ConfigError(f"similarity_threshold is a cosine and must lie in [-1, 1], got {tau!r}.")
        if ratio is not None and not 0 < ratio <= 1:
            raise ConfigError(f"retention_ratio must be above 0 and at most 1 (0.1 keeps 10 %), got {ratio!r}.")
        if tokens is not None and tokens < 1:
            raise ConfigError(f"retained_tokens must be at least 1, got {tokens!r}.")
        if not 0 <= self.error_tolerance < math.inf:
            raise ConfigError(f"error_tolerance must be 0 (exact) or a positive number, got {self.error_tolerance!r}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed!r}.")

    def _check_size(self, takes_threshold: bool) -> None:
        sizes = ("similarity_threshold", "retention_ratio", "retained_tokens")
        given = [name for name in sizes if getattr(self, name) is not None]
        if self.method == "none":
            if given and (given != ["retention_ratio"] or self.retention_ratio != 1):
                raise ConfigError(f'Method "none" keeps every token; leave out {given[0]}, or choose another method.')
        elif len(given) != 1:
            raise ConfigError(f"Give exactly one of {', '.join(sizes)}; got {' and '.join(given) or 'none of them'}.")
        elif given == ["similarity_threshold"] and not takes_threshold:
            raise ConfigError(
                f"Method {self.method!r} has no similarity_threshold; give a retention_ratio or retained_tokens."
            )
