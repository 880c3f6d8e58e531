"""What the methods have in common that prune inside the language model, between two of its layers.

Such a method is registered with the name of the one that shortens the video before the language model; "none" where it
sees all tokens. The decorated function then chooses among the tokens that entered:

    @register("recent", options=RecentOptions, merge=False, before="none")
    def recent(video, count):
        return Survivors(torch.arange(len(video.hidden))[-count:])

with options that derive from `InnerOptions`, where `while_decoding` is for methods that prune for each new token. The
method before takes from them what it knows by name.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from llava.errors import ConfigError
from llava.instrument import active
from llava.token_compression.config import CompressionConfig
from llava.token_compression.registry import get_method


@dataclass(frozen=True)
class InnerVideo:
    """One video in the language model, between two layers.

    Attributes:
        attention: (heads, looking, tokens) float32, what tokens after the video pay to each of its tokens in the layer
            before: the last one of the prompt, or those that `InnerOptions.looking` says. With what such a token pays
            to the text the sum over a head is 1.
        hidden: (tokens, dim) hidden states that enter the layer, in the model's dtype.
        groups: (tokens,) int64 from 0 on, as in `Kept`.
        text: (looking, dim) hidden states of the tokens that look, like `hidden`.
        options: those of the method.
    """

    attention: Tensor
    hidden: Tensor
    groups: Tensor
    text: Tensor
    options: Any


@dataclass(frozen=True)
class Survivors:
    """What goes on.

    Attributes:
        kept: (count,) int64, strictly increasing, among the tokens of the video.
        hidden: (count, dim) their hidden states, where they are changed.
    """

    kept: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class DecodingStep:
    """One new token in each row of a batch, before a layer of the language model.

    Attributes:
        attention: (rows, tokens) float32, what it pays to each token of the prompt in the layer before, the mean over
            its heads.
        previous: the same of the token before it, if that came after the prompt too.
        videos: (rows, tokens) bool, where the tokens of videos are.
        counts: (rows,) int64, how many of them it is to see.
        seen: (rows, tokens) bool, which ones the token before it saw, None like `previous`.
        options: those of the method.
    """

    attention: Tensor
    previous: Tensor | None
    videos: Tensor
    counts: Tensor
    seen: Tensor | None
    options: Any


@dataclass(frozen=True)
class InnerOptions:
    """Options of a method that prunes inside the language model.

    Attributes:
        layer: the first one, counted from 0, that sees fewer tokens. None is the published one, at the same share of
            the depth in models that have not as many layers as the published one.
    """

    layer: int | None = None

    published: ClassVar[tuple[int, int]]
    """The layer, and how many there are."""

    looking: ClassVar[Literal["last", "text", "text without order"]] = "last"
    """Whose attention counts: that of the prompt's last token, or of all text after the video; without rotary positions
    and causal mask, if "without order"."""

    while_decoding: ClassVar[bool] = False
    """Whether the prompt is read in full, and each new token sees fewer tokens: the decorated function is then called
    with a `DecodingStep` alone, and returns (rows, tokens) bool, which tokens of videos it sees."""

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 1:
            raise ConfigError(f"layer must be at least 1, as it is chosen by the layer before; got {self.layer!r}.")

    def layer_of(self, layers: int) -> int:
        """The layer in a model of so many.

        Raises:
            ConfigError: it has not so many.
        """
        layer = self.layer
        if layer is None:
            published, of = self.published
            layer = max(1, min(round(published * layers / of), layers - 1))
        if layer >= layers:
            raise ConfigError(f"layer is {layer}, but the language model has only {layers}, counted from 0.")
        return layer

    def entering(self, config: CompressionConfig) -> CompressionConfig:
        """The configuration with the size of what enters the language model."""
        return config

    def left(self, config: CompressionConfig, entered: int) -> int:
        """How many of a video's tokens that entered the language model are left from the layer on."""
        raise NotImplementedError


@dataclass(frozen=True)
class InnerShareOptions(InnerOptions):
    """Options of a method that leaves a share of what enters the language model.

    Attributes:
        inner_share: of the tokens that enter, those that are left from `layer` on.
    """

    inner_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.inner_share <= 1:
            raise ConfigError(f"inner_share must be above 0 and at most 1, got {self.inner_share!r}.")

    def left(self, config: CompressionConfig, entered: int) -> int:
        """The share of those that entered, at least one."""
        return max(1, round(self.inner_share * entered))


def before_model(config: CompressionConfig) -> CompressionConfig:
    """What of a configuration is done before the language model; all of it, if the method does nothing inside."""
    method = get_method(config.method)
    if method.before is None:
        return config
    if method.before == "none":
        return replace(config, method="none", retention_ratio=None, retained_tokens=None, options=None)
    kind = get_method(method.before).options
    names = [field.name for field in fields(kind)] if kind else []
    given = {name: getattr(config.options, name) for name in names if hasattr(config.options, name)}
    return replace(config.options.entering(config), method=method.before, options=given)


def refuse_inner(config: CompressionConfig) -> None:
    """Refuse, with a ConfigError, a method that prunes inside the language model where there is none of ours."""
    method = get_method(config.method)
    if method.before is not None:
        first = "" if method.before == "none" else f" {method.before!r} is what it does before."
        raise ConfigError(
            f"Method {config.method!r} prunes inside the language model, which only works with the models of "
            f"llava.model.builder.load_pretrained_model: with model.generate or VideoQA.ask.{first}"
        )


def note_inner(config: CompressionConfig, layers: int) -> None:
    """Add to the figures of the video that was compressed last what a language model of so many layers does with it.

    Raises:
        ConfigError: the method prunes inside it, and is asked for a layer or a number of tokens that there is not.
    """
    method, recorder = get_method(config.method), active()
    if method.before is None:
        return
    layer = config.options.layer_of(layers)
    if recorder is not None:
        stats = recorder.compressions[-1]
        left = config.options.left(config, stats.kept_tokens)
        average = (layer * stats.kept_tokens + (layers - layer) * left) / layers
        if left < stats.kept_tokens and not config.options.while_decoding:
            recorder.compressions[-1] = replace(stats, layer=layer, final_tokens=left, average_tokens=average)
