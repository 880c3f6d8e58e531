"""One YAML file = one run of the suite: which models, methods and ratios, on how many videos."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava.config import setting_name
from llava.errors import ConfigError
from llava.overrides import parse_override
from llava.token_compression import CompressionConfig
from llava.yaml_schema import build, read_mapping


@dataclass(frozen=True)
class Suite:
    """The content of the file.

    Attributes:
        name: results go to `<output_dir>/<name>/`.
        methods: names of methods, or keys of `CompressionConfig` without a size: `{method: uniform, merge: false}`.
        reference: the one of `methods` that all others are compared with, as it is named in the tables.
        retention_ratios: of every method; the uncompressed model is always measured.
        models: folders of tiny checkpoints, or names of bundled ones.
        videos: how many; `split` and `seed`: which ones. Nothing is trained on DEV or EVAL, choices of ours are made
            on DEV, and seed 0 of EVAL is that of the stand-ins.
        batch: videos in a forward pass.
        threads: CPU threads of PyTorch.
        output_dir: where results go.
    """

    name: str
    methods: tuple[Any, ...]
    reference: str = "scissor"
    retention_ratios: tuple[float, ...] = (0.5, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)
    models: tuple[str, ...] = ("tiny",)
    videos: int = 400
    split: Literal["DEV", "EVAL"] = "EVAL"
    seed: int = 1
    batch: int = 8
    threads: int = 1
    output_dir: str = "results/suite"

    def __post_init__(self) -> None:
        for name in ("methods", "retention_ratios", "models"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: give at least one.")
        for ratio in self.retention_ratios:
            if not 0 < ratio < 1:
                raise ConfigError(
                    f"retention_ratios: {ratio} is outside (0, 1); the uncompressed model is always there."
                )
        for name, least in (("videos", 2), ("batch", 1), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least {least}.")
        folders = [Path(model).name for model in self.models]
        if len(set(folders)) < len(folders):
            raise ConfigError(f"models: the names of the folders must differ, got {', '.join(folders)}.")
        names = [label(config) for config in self.compressions(0.5)]
        if self.reference not in names:
            raise ConfigError(f"reference: {self.reference!r} is none of the methods {', '.join(names)}.")

    def compressions(self, ratio: float) -> list[CompressionConfig]:
        """Every method at this ratio, in the order of the file."""
        return [_compression(method, ratio) for method in self.methods]

    def settings(self) -> list[CompressionConfig]:
        """Everything that is measured, the uncompressed model first."""
        return [
            CompressionConfig(method="none"),
            *(config for ratio in self.retention_ratios for config in self.compressions(ratio)),
        ]


def label(config: CompressionConfig) -> str:
    """What tells a method with its options from others, whatever the ratio: scissor, uniform-merge=False."""
    if config.method == "none":
        return "uncompressed"
    whole = setting_name(dataclasses.replace(config, retention_ratio=0.5))
    return f"{config.method}{whole.removeprefix(config.method + '-').removeprefix('r50')}"


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a file and apply `key=value` overrides, whose values are read as YAML.

    Raises:
        ConfigError: the file or an override has an unknown key, a wrong type or an impossible value.
    """
    mapping = read_mapping(path)
    suite = build(Suite, mapping, str(path))
    for override in map(parse_override, overrides):
        mapping = override.applied(mapping)
        suite = build(Suite, mapping, override.where)
    return suite


def _compression(method: object, ratio: float) -> CompressionConfig:
    keys = {"method": method} if isinstance(method, str) else method
    if not isinstance(keys, Mapping):
        raise ConfigError(f"methods: {method!r} is neither a name nor keys and values.")
    return CompressionConfig.from_dict({**keys, "retention_ratio": ratio}, "methods")
