"""The table of compression methods. A method is one function in one file of this folder:

    @register("first")
    def first(features, config, budget):
        frames, tokens, dim = features.shape
        positions = torch.arange(budget, device=features.device)
        return select(features, positions)

Every file of this folder is imported with the package, so that is all there is to adding one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava.errors import ConfigError
from llava.yaml_schema import did_you_mean


@dataclass(frozen=True)
class Kept:
    """What a method keeps, before the final merge.

    Attributes:
        tokens: (kept, dim), float32 or float64, or in the dtype of the features.
        positions: (kept,) int64, strictly increasing flat source index of each kept token's representative.
        membership: (frames * tokens_per_frame,) int64, the kept token each source token is part of, -1 for none.
        spatial_tokens: tokens left by a first step within frames, if the method has one.
        similarity_threshold: the threshold that was applied, if the method has one.
        single_is_own: whether a kept token with one member is that member, so that the final merge need not look where
            else it belongs; not so where tokens are averaged that are not members.
        groups: (kept,) int64 from 0 on, which kept tokens compete with each other where a method prunes further inside
            the language model; None for all of them.
    """

    tokens: Tensor
    positions: Tensor
    membership: Tensor
    spatial_tokens: int | None = None
    similarity_threshold: float | None = None
    single_is_own: bool = True
    groups: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        keep: called as `keep(features, config, budget, **inputs)` with features (frames, tokens_per_frame, dim),
            finite, and the exact number of tokens to keep, or None if the configuration gives a threshold.
        inputs: names of the further inputs that it needs, with its default options.
        takes_threshold: whether `similarity_threshold` means something to it.
        any_dtype: whether it takes features of any floating dtype, and converts blocks of them as it goes; if not, it
            gets them in float32, or float64 if they are, and contiguous.
        takes_tokens: whether it also takes them as `tokens`, a `Stored` whose lengths and the like are used again.
        options: a frozen dataclass of the settings that only this method has, all with defaults; `keep` finds an
            instance of it in `config.options`.
        merge: whether the final merge of all source tokens is part of it; `CompressionConfig(merge=...)` overrides it.
        before: for a method that prunes inside the language model, the one that shortens the video before it; then
            `keep` is called as inner.py says.
    """

    keep: Callable[..., Any]
    inputs: tuple[str, ...] = ()
    takes_threshold: bool = False
    any_dtype: bool = False
    takes_tokens: bool = False
    options: type | None = None
    merge: bool = True
    before: str | None = None

    def needed(self, options: object) -> tuple[str, ...]:
        """Names of the further inputs under these options, whose class has an attribute `inputs` where they matter."""
        return getattr(options, "inputs", self.inputs)


_methods: dict[str, Method] = {}


def register(
    name: str,
    inputs: tuple[str, ...] = (),
    takes_threshold: bool = False,
    any_dtype: bool = False,
    takes_tokens: bool = False,
    options: type | None = None,
    merge: bool = True,
    before: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as compression method `name`; the arguments are described at `Method`."""

    def add(keep: Callable[..., Any]) -> Callable[..., Any]:
        if name in _methods:
            raise ValueError(f"A compression method named {name!r} exists already.")
        _methods[name] = Method(keep, inputs, takes_threshold, any_dtype, takes_tokens, options, merge, before)
        return keep

    return add


def list_methods() -> list[str]:
    """Names that `CompressionConfig(method=...)` accepts, sorted."""
    return sorted(_methods)


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in _methods:
        raise ConfigError(f"Unknown compression method {name!r}{did_you_mean(name, list_methods())}.")
    return _methods[name]


def docstring(name: str) -> str:
    """What is written about the method called `name`: by its file, if that has no other method, else by its function.

    Raises:
        ConfigError: there is none.
    """
    keep = get_method(name).keep
    alone = [method.keep.__module__ for method in _methods.values()].count(keep.__module__) == 1
    return inspect.getdoc(inspect.getmodule(keep) if alone else keep) or ""
