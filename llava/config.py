"""One experiment as a YAML file: which model, how videos are read, what is compressed, what is measured.

    experiment = load_experiment("configs/onevision_7b.yaml", ["compression.retention_ratio=0.10"])

Every value can be overridden as `section.key=value`, where the value is read as YAML. A misspelt key, a value of the
wrong type or an impossible value is a `ConfigError` that names the file or the override, the key and the nearest
valid name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava.errors import ConfigError
from llava.overrides import Override, parse_override
from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method
from llava.video import VideoConfig
from llava.yaml_schema import build, did_you_mean, read_mapping

BUDGETS = ("similarity_threshold", "retention_ratio", "retained_tokens")

CHECKPOINT = "checkpoint"
"""The method, and the name of the setting, that follows the checkpoint's config.json."""

WITHOUT_BUDGET = (("method", "none"), ("method", CHECKPOINT))


@dataclass(frozen=True)
class ModelConfig:
    """What `load_pretrained_model` is asked for.

    Attributes:
        path: a folder in the original LLaVA layout, a hub name, or "tiny" for the bundled model.
        name: the model name that picks the class; derived from `path` when None.
        device: "auto" (the first CUDA device if there is one, else the CPU), "cpu", "cuda", "cuda:1" ...; "balanced"
            spreads one model over all CUDA devices.
        dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), "float32", "bfloat16" or "float16".
        attn_implementation: "auto", "sdpa", "eager" or "flash_attention_2".
        conv_template: a key of `llava.conversation.conv_templates`.
        mm_spatial_pool_mode, mm_newline_position: replace those of the checkpoint's config.json, where its authors
            evaluate it with others.
    """

    path: str = "tiny"
    name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    conv_template: str = "qwen_1_5"
    mm_spatial_pool_mode: Literal["bilinear", "average", "max"] | None = None
    mm_newline_position: Literal["one_token", "frame", "grid", "no_token"] | None = None

    @property
    def overwrite_config(self) -> dict[str, Any]:
        """Keys of the checkpoint's config.json to replace."""
        keys = ("mm_spatial_pool_mode", "mm_newline_position")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


@dataclass(frozen=True)
class JudgeConfig:
    """The language model that scores the free answers of some benchmarks, behind an OpenAI-compatible address.

    Its key is read from the environment variable OPENAI_API_KEY alone. Scores by different judges cannot be compared.

    Attributes:
        base_url: what comes before `/chat/completions`, for example http://127.0.0.1:8000/v1.
        model: the name by which that address knows the judge; by default the one that lmms-eval asks.
    """

    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o-2024-11-20"

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url: {self.base_url!r} must start with http:// or https://.")
        if "@" in self.base_url:
            raise ConfigError("base_url: leave user name and password out, as it is written to the results.")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and where the results go.

    Attributes:
        benchmark: one of those in `eval.benchmarks`, or any task of lmms-eval by its own name.
        data: "hub" reads the benchmark's own data as lmms-eval does; "standin" writes and reads procedural videos.
        data_dir: where stand-ins are written.
        videos: how many videos the stand-in has; seed: which ones.
        retention_ratios: the settings of a sweep, used when `compression` names no budget; 1.0 keeps everything.
        judge: who scores the answers of the benchmarks that need a judge.
        limit: evaluate only the first questions of each of the benchmark's tasks.
        max_new_tokens: at most so many tokens per answer; the benchmark's own number when None.
        num_processes: "auto" is one per CUDA device, or one on the CPU.
        threads: CPU threads of each process; PyTorch's own choice when None. Results on a CPU are the same for any
            number of processes if this is given: with another number of threads, sums round differently.
        output_dir: results go to `<output_dir>/<name>/<benchmark>/<setting>/`.
        resume: reuse finished answers of earlier runs with the same settings.
    """

    benchmark: str = "videomme"
    data: Literal["hub", "standin"] = "hub"
    data_dir: str = "data"
    videos: int = 60
    seed: int = 0
    retention_ratios: tuple[float, ...] = ()
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    limit: int | None = None
    max_new_tokens: int | None = None
    num_processes: int | Literal["auto"] = "auto"
    threads: int | None = None
    output_dir: str = "results"
    resume: bool = True

    def __post_init__(self) -> None:
        for ratio in self.retention_ratios:
            if not 0 < ratio <= 1:
                raise ConfigError(f"retention_ratios: {ratio} is outside (0, 1].")
        for name in ("videos", "limit", "max_new_tokens", "num_processes", "threads"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name}: {value} must be at least 1.")


@dataclass(frozen=True)
class Experiment:
    """One YAML file with its overrides.

    Attributes:
        compressions: one config per result file: the single budget that `compression` names, or one per entry of
            `evaluation.retention_ratios`. None follows the checkpoint's config.json: what `compression` means by
            method "checkpoint", and where neither says anything.
    """

    name: str
    compressions: tuple[CompressionConfig | None, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class _File:
    """The schema of the YAML file; `compression` is checked by `_compressions`, which may add the budget of a sweep."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    compression: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file or an override has an unknown key, a wrong type or an impossible value.
    """
    return build_experiment(read_mapping(path), overrides, str(path))


def build_experiment(mapping: Mapping[str, Any], overrides: Sequence[str], where: str) -> Experiment:
    """An experiment from the content of its file; `where` starts the messages about what it holds.

    Raises:
        ConfigError: the mapping or an override has an unknown key, a wrong type or an impossible value.
    """
    experiment = _experiment(mapping, where)
    for override in map(parse_override, overrides):
        mapping = _with_override(mapping, override)
        experiment = _experiment(mapping, override.where)
    return experiment


def setting_name(config: CompressionConfig | None) -> str:
    """A folder name that tells one compression from another: r10, t0.9, k64, uniform-r10, r10-temporal=False."""
    if config is None:
        return CHECKPOINT
    if config.method == "none":
        return "r100"
    budget = {
        "r": None if config.retention_ratio is None else 100 * config.retention_ratio,
        "t": config.similarity_threshold,
        "k": config.retained_tokens,
    }
    parts = [f"{letter}{value:g}" for letter, value in budget.items() if value is not None]
    if config.method != "scissor":
        parts.insert(0, config.method)
    for settings in (config, config.options):
        for option in dataclasses.fields(settings) if settings else ():
            value = getattr(settings, option.name)
            default = get_method(config.method).merge if option.name == "merge" else option.default
            if option.name not in ("method", "options", *BUDGETS) and value != default:
                parts.append(f"{option.name}={value}")
    return "-".join(parts)


def _experiment(mapping: Mapping[str, Any], where: str) -> Experiment:
    file = build(_File, mapping, where)
    return Experiment(
        name=file.name,
        compressions=_compressions(file, where),
        model=file.model,
        video=file.video,
        evaluation=file.evaluation,
    )


def _compressions(file: _File, where: str) -> tuple[CompressionConfig | None, ...]:
    """The budget that `compression` names, else one per retention ratio; a ratio of 1 is no compression at all."""
    options = file.compression
    ratios = file.evaluation.retention_ratios
    where = f"{where}: compression"
    if options.get("method") == CHECKPOINT:
        for key, value in options.items():
            if key != "method" and value is not None:
                raise ConfigError(
                    f'{where}: method "checkpoint" takes all settings from the checkpoint; leave out {key}.'
                )
        return (None,)
    if not options and not ratios:
        return (None,)
    if not ratios or options.get("method") == "none" or any(options.get(budget) is not None for budget in BUDGETS):
        return (CompressionConfig.from_dict(options, where),)
    sweep = {ratio: CompressionConfig.from_dict(options | {"retention_ratio": ratio}, where) for ratio in ratios}
    return tuple(CompressionConfig(method="none") if ratio == 1 else config for ratio, config in sweep.items())


def _with_override(mapping: Mapping[str, Any], override: Override) -> dict[str, Any]:
    """A copy of `mapping` with the value that `override`, `section.key=value` or `name=value`, asks for."""
    section, *keys = override.keys
    sections = [field.name for field in dataclasses.fields(_File)]
    if section not in sections:
        raise ConfigError(f"{override.where}: unknown section {section!r}{did_you_mean(section, sections)}.")
    if section != "name" and not any(keys):
        raise ConfigError(f"{override.where}: name a key of the section, as in {section}.key=value.")
    if section == "compression" and keys[0] in BUDGETS and override.value is not None:
        # A budget replaces the one that was there, and is nothing without a method that has one.
        values = dict(mapping.get(section, {}))
        kept = {k: v for k, v in values.items() if k not in BUDGETS and (k, v) not in WITHOUT_BUDGET}
        mapping = {**mapping, section: kept}
    return override.applied(mapping)
