"""Read prompts whose video tokens are pruned between two layers of the language model, and go on after them.

From the pruning layer on, fewer tokens are left, with the rotary positions that they had; the caches of these layers
are shorter than those before. The cache remembers which of their places are padding, and nothing is pruned while it is
continued: later tokens only need masks of the right length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError
from llava.model.language_model.attention import attention_rows, kernel, mask_for
from llava.model.splice import GROUPS
from llava.token_compression import CompressionConfig
from llava.token_compression.inner import InnerVideo
from llava.token_compression.registry import get_method

ATTRIBUTE = "_llava_inner"
"""Where a cache keeps what it knows of pruning; absent where there was none."""

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
Hooks = list[tuple[Any, Hook]]
"""What to put in front of which layers."""


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache that a layer is given, under its name up to transformers 5.23 or since; None without one."""
    return kwargs.get("past_key_values", kwargs.get("cache"))


@dataclass(frozen=True)
class Prompt:
    """The prompts of a batch.

    Attributes:
        videos: (rows, length) int64, as `llava.model.splice.Row` has them.
        mask: (rows, length + continuation), 0 for padding, or None.
        continuation: tokens of the pass that come after the prompt.
    """

    videos: Tensor
    mask: Tensor | None
    continuation: int = 0


@dataclass(frozen=True)
class Shorter:
    """What a cache knows of its layers that hold fewer tokens.

    Attributes:
        layer: the first of them.
        prompt: tokens in the layers before it when the others were pruned.
        valid: (rows, short) bool, those left of them; False for padding.
        full: whether there is no padding.
    """

    layer: int
    prompt: int
    valid: Tensor
    full: bool


class PromptPass:
    """One pass over prompts with videos, under a method that prunes inside the language model.

    Args:
        decoder: the language model without its head.
        config: with the method.
        prompt: the prompts.
        length: tokens of the pass.

    Raises:
        UserError: the attention has a kernel, or the model layers, for which this does not work.
        ConfigError: a layer or a size that there is not.
    """

    def __init__(self, decoder: Any, config: CompressionConfig, prompt: Prompt, length: int):
        self.config, self.options, self.continuation = config, config.options, prompt.continuation
        self.layers, self.kind = decoder.layers, kernel(decoder.config)
        if any(kind != "full_attention" for kind in decoder.config.layer_types):
            raise UserError(f"Method {config.method!r} does not work with layers of sliding attention.")
        self.layer = self.options.layer_of(len(self.layers))
        self.valid = prompt.videos.new_ones((len(prompt.videos), length), dtype=torch.bool)
        if prompt.mask is not None:
            self.valid = prompt.mask.bool()
        self.videos = prompt.videos
        self.parts: list[list[tuple[Tensor, int]]] = []  # by row and video: places of its tokens, how many are left
        for row in prompt.videos // GROUPS:
            places = [(row == video).nonzero()[:, 0] for video in range(1, int(row.max()) + 1)]
            self.parts.append([(place, self.options.left(config, len(place))) for place in places if len(place)])

    @property
    def prunes(self) -> bool:
        """Whether any token is dropped."""
        return any(count < len(places) for row in self.parts for places, count in row)

    def last(self, continuation: int) -> Tensor:
        """(rows,) int64, the place in each row of the last token but so many."""
        place = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (place * self.valid).amax(dim=1) - continuation


class Reading(PromptPass):
    """One pass over prompts in which video tokens are pruned."""

    def hooks(self) -> Hooks:
        """To put on for the pass."""
        later = [(layer, self._replace) for layer in self.layers[self.layer + 1 :]]
        return [(self.layers[self.layer - 1], self._look), (self.layers[self.layer], self._shorten), *later]

    def _look(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what tokens after the videos attend to."""
        rotary = kwargs["position_embeddings"]
        self.looking, self.attention = [], []
        for row, last in enumerate(self.last(self.continuation).tolist()):
            own, query = slice(row, row + 1), self._looking(row, last)
            valid = self.valid[own].clone()
            valid[:, last + 1 :] = False  # an answer in the same pass
            order = None
            if self.options.looking != "text without order":
                order = tuple(part[own] if len(part) > 1 else part for part in rotary)
            self.looking.append(query)
            self.attention.append(attention_rows(layer, args[0][own], order, query[None], valid)[0])

    def _looking(self, row: int, last: int) -> Tensor:
        """The places (n,) int64 of a row's tokens whose attention counts, up to the last one of the prompt."""
        if self.options.looking == "last" or not self.parts[row]:
            return torch.tensor([last])
        text = (self.videos[row, : last + 1] == 0) & self.valid[row, : last + 1]
        (first, _), (last_one, _) = self.parts[row][0], self.parts[row][-1]
        if not text[int(last_one[-1]) :].any():
            raise UserError(f"Method {self.config.method!r} goes by the text after a video, and there is none.")
        text[: int(first[0])] = False
        return text.nonzero()[:, 0].cpu()

    def _shorten(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop tokens, and adapt everything else to those that are left."""
        hidden = args[0].clone()
        kept = [self._kept(row, hidden[row]) for row in range(len(hidden))]
        longest = max(len(places) for places in kept)
        index = hidden.new_zeros((len(kept), longest), dtype=torch.int64)
        valid = torch.zeros_like(index, dtype=torch.bool)
        for row, places in enumerate(kept):  # a row with fewer tokens than others is padded on the left
            index[row, longest - len(places) :] = places
            valid[row, longest - len(places) :] = self.valid[row].to(places.device)[places]
        rows = torch.arange(len(kept), device=index.device)[:, None]
        full = bool(valid.all())
        cache = cache_in(kwargs)
        if cache is not None:
            setattr(cache, ATTRIBUTE, Shorter(self.layer, args[0].shape[1], valid, full))
        rotary = tuple(part.expand(len(kept), -1, -1)[rows, index] for part in kwargs["position_embeddings"])
        mask = mask_for(self.kind, valid, full, longest, hidden)
        # Position ids are used up by now, but kernels take gaps in them for the beginning of another text.
        self.replaced = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return (hidden[rows, index], *args[1:]), {**kwargs, **self.replaced}

    def _replace(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **self.replaced}

    def _kept(self, row: int, hidden: Tensor) -> Tensor:
        """The places (left,) int64 of a row's tokens that go on, whose hidden states (length, dim) are changed."""
        keep = get_method(self.config.method).keep
        dropped = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for places, count in self.parts[row]:
            if count == len(places):
                continue
            groups, places = self.videos[row][places] % GROUPS, places.to(hidden.device)
            after = (self.looking[row] > int(places[-1])) | (self.options.looking == "last")
            attention = self.attention[row].to(hidden.device)[:, after][:, :, places]
            text = hidden[self.looking[row][after]]
            video = InnerVideo(attention, hidden[places], groups.to(hidden.device), text, self.options)
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                survivors = keep(video, count)
            dropped[places] = True
            dropped[places[survivors.kept]] = False
            if survivors.hidden is not None:
                hidden[places[survivors.kept]] = survivors.hidden.to(hidden)
        return (~dropped).nonzero()[:, 0]


class Continuing:
    """One pass over tokens that come after what a cache of unequal layers holds.

    Args:
        decoder: the language model without its head.
        cache: with a `Shorter`.
        mask: (rows, tokens in the cache and of this pass) with 0 for padding, or None.
        length: tokens of this pass.

    Raises:
        UserError: the cache was changed meanwhile.
    """

    def __init__(self, decoder: Any, cache: Any, mask: Tensor | None, length: int):
        self.state: Shorter = vars(cache)[ATTRIBUTE]
        self.layers, self.kind, self.length = decoder.layers[self.state.layer :], kernel(decoder.config), length
        later = cache.get_seq_length() - self.state.prompt
        rows, short = self.state.valid.shape
        held = cache.layers[self.state.layer]
        if later < 0 or held.get_seq_length() != short + later or len(held.keys) != rows:
            raise UserError(
                "The cache was cut, its rows changed, or it is quantised, since tokens were pruned inside the language "
                "model, where its layers hold different numbers of tokens; use it as it is, and generate without an "
                "assistant model and prompt_lookup."
            )
        new = self.state.valid.new_ones((rows, later + length))
        if mask is not None and mask.shape == (rows, self.state.prompt + later + length):
            new = mask[:, self.state.prompt :].bool().to(new.device)
        self.full = self.state.full and bool(new.all())
        self.valid = torch.cat([self.state.valid, new], dim=1)
        self.mask: Any = None

    def hooks(self) -> Hooks:
        """To put on for the pass."""
        first, *later = self.layers
        return [(first, self._build), *[(layer, self._replace) for layer in later]]

    def _build(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.mask = mask_for(self.kind, self.valid, self.full, self.length, args[0])
        return self._replace(layer, args, kwargs)

    def _replace(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": self.mask, "position_ids": None}
