"""One YAML file = one grid of measurements: which model, which settings, how often."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.efficiency.hf_shapes import SHAPES
from llava.errors import ConfigError
from llava.overrides import Override, parse_override
from llava.token_compression import CompressionConfig, list_methods
from llava.token_compression.registry import get_method
from llava.yaml_schema import build, did_you_mean, read_mapping


@dataclass(frozen=True)
class ModelSettings:
    """What is measured: exactly one of a checkpoint and a shape.

    Attributes:
        path: a folder, a hub name, or "tiny" for the bundled model.
        shape: random weights in the shape of LLaVA-OneVision "0.5b" or "7b", or of the bundled model ("tiny"), or in
            one of `hf_shapes`, such as "qwen2_5_vl-3b", for the model of transformers with that model_type.
        device: "auto" (the first CUDA device if there is one, else the CPU), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), "float32", "bfloat16" or "float16".
        attn_implementation: "auto" takes flash_attention_2 where it works, else sdpa, which chooses among the kernels
            of PyTorch.
    """

    path: str | None = None
    shape: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.shape is None):
            raise ConfigError("give exactly one of path (a checkpoint) and shape (random weights).")
        shapes = ["tiny", "0.5b", "7b", *SHAPES]
        if self.shape is not None and self.shape not in shapes:
            hint = did_you_mean(self.shape, shapes)
            raise ConfigError(f"shape: unknown value {self.shape!r}{hint}; known are {', '.join(shapes)}.")
        if self.device == "balanced":
            raise ConfigError("device: stages are timed on one device; name it, for example cuda:0.")


@dataclass(frozen=True)
class Grid:
    """Every combination is one cell. The uncompressed baseline is measured for all frames and batch sizes anyway.

    Attributes:
        frames: frames per video.
        retention_ratios: of all methods; 1.0 is the baseline.
        methods: names of `llava.token_compression.list_methods`.
        batch_sizes: videos per batch, all of them alike, with one prompt each.
    """

    frames: tuple[int, ...] = (32,)
    retention_ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
    methods: tuple[str, ...] = ("scissor",)
    batch_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("frames", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(f"{name}: give at least one number, all of them at least 1, got {list(values)}.")
        for ratio in self.retention_ratios:
            if not 0 < ratio <= 1:
                raise ConfigError(f"retention_ratios: {ratio} is outside (0, 1].")
        for method in self.methods:
            if method not in list_methods():
                raise ConfigError(f"methods: unknown method {method!r}{did_you_mean(method, list_methods())}.")
            if get_method(method).before is not None:
                raise ConfigError(
                    f"methods: {method!r} prunes inside the language model, of which the operations are not counted "
                    "here; choose a method that prunes before it."
                )


@dataclass(frozen=True)
class Measurement:
    """How it is measured, and where the results go.

    Attributes:
        runs: timed runs of each cell, after `warmup` runs that do not count.
        max_seconds: no further run of a cell begins after so many seconds of timed runs, though at least three do.
        new_tokens: tokens generated in each run, at least two.
        prompt_tokens: text tokens of the prompt beside the video.
        clip_width, clip_height: pixels of the H.264 clip that is decoded.
        seed: of weights, prompt and features.
        threads: CPU threads of PyTorch; its own choice when None.
        output_dir: results go to `<output_dir>/<name>/`.
        resume: keep the cells of an earlier run with the same settings, code and hardware.
    """

    runs: int = 20
    warmup: int = 3
    max_seconds: float | None = None
    new_tokens: int = 16
    prompt_tokens: int = 32
    clip_width: int = 640
    clip_height: int = 360
    seed: int = 0
    threads: int | None = None
    output_dir: str = "results/efficiency"
    resume: bool = True

    def __post_init__(self) -> None:
        lowest = {"runs": 1, "warmup": 0, "new_tokens": 2, "prompt_tokens": 2, "seed": 0, "threads": 1}
        for name, bound in lowest.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name}: {value} must be at least {bound}.")
        for name in ("clip_width", "clip_height"):
            value = getattr(self, name)
            if value < 16 or value % 2:
                raise ConfigError(f"{name}: {value} must be an even number of at least 16.")


@dataclass(frozen=True)
class Cell:
    """One combination of the grid; the method "none" is the uncompressed baseline."""

    frames: int
    batch_size: int
    method: str = "none"
    retention_ratio: float = 1.0

    @property
    def compression(self) -> CompressionConfig:
        """What `llava.token_compression.compression` takes."""
        if self.method == "none":
            return CompressionConfig(method="none")
        return CompressionConfig(method=self.method, retention_ratio=self.retention_ratio)

    @property
    def name(self) -> str:
        """As in "32 frames, batch 1, scissor 10 %"."""
        setting = "uncompressed" if self.method == "none" else f"{self.method} {100 * self.retention_ratio:g} %"
        return f"{self.frames} frames, batch {self.batch_size}, {setting}"


@dataclass(frozen=True)
class Harness:
    """The content of the file."""

    name: str
    model: ModelSettings
    grid: Grid = field(default_factory=Grid)
    measurement: Measurement = field(default_factory=Measurement)

    def cells(self) -> list[Cell]:
        """All cells, those with the same frames together, each baseline before what is compared with it."""
        return [
            cell
            for frames in dict.fromkeys(self.grid.frames)
            for batch in dict.fromkeys(self.grid.batch_sizes)
            for cell in (Cell(frames, batch), *self._compressed(frames, batch))
        ]

    def _compressed(self, frames: int, batch: int) -> list[Cell]:
        methods = [method for method in dict.fromkeys(self.grid.methods) if method != "none"]
        ratios = [ratio for ratio in dict.fromkeys(self.grid.retention_ratios) if ratio < 1]
        return [Cell(frames, batch, method, ratio) for method in methods for ratio in ratios]


def load_harness(path: str | Path, overrides: Sequence[str] = ()) -> Harness:
    """Read a file and apply `section.key=value` overrides, whose values are read as YAML.

    Raises:
        ConfigError: the file or an override has an unknown key, a wrong type or an impossible value.
    """
    mapping = read_mapping(path)
    harness = build(Harness, mapping, str(path))
    for override in map(parse_override, overrides):
        mapping = _with_override(mapping, override)
        harness = build(Harness, mapping, override.where)
    return harness


def _with_override(mapping: Mapping[str, Any], override: Override) -> dict[str, Any]:
    section, *keys = override.keys
    sections = [field.name for field in dataclasses.fields(Harness)]
    if not keys and section in sections[1:]:
        raise ConfigError(f"{override.where}: name a key of the section, as in {section}.key=value.")
    if section == "model" and keys[0] in ("path", "shape") and override.value is not None:  # each replaces the other
        inner = mapping.get(section)
        inner = {k: v for k, v in dict(inner or {}).items() if k not in ("path", "shape")}
        mapping = {**mapping, section: inner}
    return override.applied(mapping)
