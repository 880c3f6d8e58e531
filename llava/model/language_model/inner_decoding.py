"""Read prompts in full, and let each token after them see only some tokens of the videos in late layers.

Keys and values stay as they are; masks hide those that are not seen. Tokens after the prompt are taken one by one, also
where they come together, without a cache; several at once after a cache, as a next question, see everything.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError
from llava.model.language_model.attention import attention_rows, kernel, mask_for
from llava.model.language_model.inner_reading import ATTRIBUTE, Hooks, PromptPass, cache_in
from llava.token_compression.inner import DecodingStep
from llava.token_compression.registry import Method, get_method


@dataclass
class Decoding:
    """What a cache knows of the videos in it, and of the last token after them.

    Attributes:
        method, options, layer: from which layer on what is hidden.
        valid: (rows, prompt) bool, False for padding.
        videos: (rows, prompt) bool, where their tokens are.
        counts: (rows,) int64, how many of them a token sees.
        previous, seen: as in `DecodingStep`.
    """

    method: Method
    options: Any
    layer: int
    valid: Tensor
    videos: Tensor
    counts: Tensor
    previous: Tensor | None = None
    seen: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """Follow the rows of the cache."""
        self.valid, self.videos, self.counts = (
            part[rows.to(part.device)] for part in (self.valid, self.videos, self.counts)
        )
        if self.previous is not None and self.seen is not None:
            self.previous, self.seen = self.previous[rows], self.seen[rows]

    def visible(self, attention: Tensor) -> Tensor:
        """Which tokens of the prompt the next one sees.

        Args:
            attention: (rows, heads, prompt) float32, what it pays to them.
        """
        device = attention.device
        self.valid, self.videos, self.counts = (part.to(device) for part in (self.valid, self.videos, self.counts))
        mean = attention.mean(dim=1)
        step = DecodingStep(mean, self.previous, self.videos, self.counts, self.seen, self.options)
        self.previous, self.seen = mean, self.method.keep(step)
        return self.valid & (~self.videos | self.seen)

    def step(self, decoder: Any, cache: Any, mask: Tensor | None, length: int) -> Hooks:
        """Hooks for a pass over tokens that come after a cache.

        Args:
            decoder: the language model without its head.
            cache: the one that this belongs to.
            mask: (rows, tokens in the cache and of this pass) with 0 for padding, or None.
            length: tokens of this pass.

        Raises:
            UserError: the cache holds something else.
        """
        rows, prompt = self.valid.shape
        later, held = cache.get_seq_length() - prompt, cache.layers[self.layer - 1]
        if later < 0 or held.keys.shape[0] != rows or held.keys.shape[2] != prompt + later:
            raise UserError(
                "The cache was cut, its rows changed, or it is quantised, since a prompt was read whose video tokens "
                "are pruned while decoding; use the cache as it is, or another method."
            )
        if length > 1:
            self.previous = self.seen = None
            return []
        new = self.valid.new_ones((rows, later + 1))
        if mask is not None and mask.shape == (rows, prompt + later + 1):
            new = mask[:, prompt:].bool().to(new.device)
        found: dict[str, Any] = {}

        def look(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, query = args[0], torch.zeros(rows, 1, dtype=torch.int64)
            valid = torch.cat([self.valid, new.to(self.valid.device)], dim=1)
            attention = attention_rows(layer, hidden, kwargs["position_embeddings"], query, valid, held.keys)
            visible = self.visible(attention[:, :, 0, :prompt])
            found["mask"] = mask_for(
                kernel(decoder.config), torch.cat([visible, new.to(visible.device)], dim=1), False, 1, hidden
            )

        return [(decoder.layers[self.layer - 1], look), *_masked(decoder.layers[self.layer :], found)]


class Answering(PromptPass):
    """One pass over prompts, all tokens of which see each other, and over what comes after them in the same pass."""

    def hooks(self) -> Hooks:
        """To put on for the pass."""
        videos = torch.zeros_like(self.valid)
        for row, parts in enumerate(self.parts):
            for places, _ in parts:
                videos[row, places] = True
        counts = torch.tensor([self.options.left(self.config, total) for total in videos.sum(dim=1).tolist()])
        state = Decoding(get_method(self.config.method), self.options, self.layer, self.valid, videos, counts)
        found: dict[str, Any] = {}

        def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = cache_in(kwargs)
            if cache is not None:
                setattr(cache, ATTRIBUTE, state)

        def look(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query = self.last(0)[:, None] - torch.arange(self.continuation - 1, -1, -1, device=self.valid.device)
            attention = attention_rows(layer, args[0], kwargs["position_embeddings"], query, self.valid)
            rows, query = torch.arange(len(query), device=attention.device), query.to(attention.device)
            valid = self.valid.to(attention.device)
            visible = valid.unsqueeze(1).repeat(1, valid.shape[1], 1)  # (rows, queries, tokens)
            for new in range(self.continuation):
                visible[rows, query[:, new]] = state.visible(attention[:, :, new])
            found["mask"] = mask_for(self.kind, visible, False, valid.shape[1], args[0])

        noting: Hooks = [(self.layers[0], note)]
        if self.continuation == 0:
            return noting
        if self.kind == "flash":
            raise UserError(
                f"Method {self.config.method!r} gives each token of an answer another mask, which flash attention does "
                "not take for several at once: generate with a cache, or load the model with attn_implementation=sdpa."
            )
        return [*noting, (self.layers[self.layer - 1], look), *_masked(self.layers[self.layer :], found)]


def _masked(layers: Any, found: dict[str, Any]) -> Hooks:
    """Give layers the mask that is `found` meanwhile."""

    def mask(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": found["mask"]}

    return [(layer, mask) for layer in layers]
