"""Generation from embedded prompts: padding side, rotary positions, greedy defaults without warnings."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, Qwen2ForCausalLM

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import ConfigError, UserError
from llava.model.items import Images, visual_items
from llava.model.language_model.inner_decoding import Decoding
from llava.model.language_model.inner_reading import ATTRIBUTE
from llava.model.language_model.prefix import VisualPrefix
from llava.model.newlines import VisualTokens
from llava.model.splice import PaddedBatch
from llava.token_compression.registry import get_method

CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
"""What the installed transformers calls the keys and values of earlier tokens; it was renamed in version 5.24."""

NEUTRAL_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Values at which transformers takes a setting as not given."""


class LlavaGenerationMixin:
    """`generate` for prompts with images and videos, on top of transformers' own generation loop."""

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        modalities: str | Sequence[str] = "image",
        prefix: VisualPrefix | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text, returning only the new tokens.

        The prompts are embedded and padded on the left whatever `tokenizer_padding_side` says, so that every row of
        a batch continues right after its own last token.

        Args:
            inputs: (rows, length) int64 prompt ids; padding, on either side, is what `attention_mask` hides.
            images, image_sizes, modalities: as in `forward`.
            prefix: what `read_prefix` returned for the beginning of this one prompt, in place of `images`.
            **kwargs: transformers' generation arguments, and `attention_mask` (rows, length).

        Returns:
            (rows, new tokens) int64, or transformers' output object with `return_dict_in_generate=True`.

        Raises:
            UserError: no prompt, prompt and images that do not fit, a prompt that does not begin with `prefix`,
                `position_ids` / `inputs_embeds` given, or what pruning inside the language model cannot do.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        for key in ("position_ids", "inputs_embeds"):
            if kwargs.pop(key, None) is not None:
                raise UserError(
                    f"generate derives {key} itself; pass the prompt's token ids, images and attention_mask."
                )
        if inputs is None:
            raise UserError("generate needs the prompt's token ids: model.generate(input_ids, images=...).")
        mask = kwargs.pop("attention_mask", None)
        kwargs = without_warnings(kwargs, self.generation_config)
        if prefix is None:
            return self._continue(self.splice(inputs, mask, None, images, modalities, image_sizes, "left"), kwargs)
        if images is not None:
            raise UserError("Give either images or the prefix that holds them, not both.")
        self._check_independent_of_question()
        prefix.check_begins(inputs, mask)
        prompt = self._spliced_row(inputs[0], prefix.items, prefix.source_positions)
        if prompt.embeds.shape[1] <= prefix.length:
            raise UserError(
                f"The prefix fills the {prefix.length} positions that the checkpoint reads; keep fewer video tokens."
            )
        with prefix.lent(_rows_per_prompt(kwargs, self.generation_config)) as cache:
            return self._continue(prompt, {**kwargs, CACHE: cache})

    @torch.no_grad()
    def read_prefix(
        self: Any,
        input_ids: torch.Tensor,
        images: Images,
        image_sizes: Sequence[Sequence[int]] | None = None,
        modalities: str | Sequence[str] = "image",
    ) -> VisualPrefix:
        """Read a prompt up to its last placeholder, so that each prompt that begins with it starts there.

            prefix = model.read_prefix(first, images=[frames], modalities=["video"])
            model.generate(first, prefix=prefix)
            model.generate(second, prefix=prefix)

        Args:
            input_ids: (1, length) int64 without padding. What follows the last placeholder is not looked at.
            images, image_sizes, modalities: as in `generate`.

        Raises:
            UserError: several prompts, none with a placeholder, or images that do not fit.
            ConfigError: the model prunes tokens by the question.
        """
        self._check_independent_of_question()
        places = (input_ids == IMAGE_TOKEN_INDEX).nonzero()
        if len(input_ids) != 1 or len(places) == 0:
            raise UserError("A prefix is read from a single prompt with an image or a video in it.")
        ids = input_ids[0, : int(places[-1, 1]) + 1]
        items = visual_items(images, modalities, image_sizes)
        if len(items) != len(places) or any(item.modality == "text" for item in items):
            raise UserError(f"The prompt has {len(places)} <image> placeholders but {len(items)} images were given.")
        encoded = self.encode_images(items)
        source_positions = self._source_positions()
        prompt = self._spliced_row(ids, encoded, source_positions)
        cache = DynamicCache(config=self.config)
        self(
            inputs_embeds=prompt.embeds,
            position_ids=prompt.position_ids,
            use_cache=True,
            logits_to_keep=1,
            past_key_values=cache,
        )
        return VisualPrefix(ids, encoded, source_positions, prompt.embeds.shape[1], cache)

    def _reorder_cache(self, cache: Any, beams: torch.Tensor) -> Any:
        """Let a cache and what it knows of pruning go on with these of its rows; beam search calls this."""
        cache.reorder_cache(beams)
        state = vars(cache).get(ATTRIBUTE)
        if isinstance(state, Decoding):
            state.reorder(beams)
        return cache

    def _check_independent_of_question(self: Any) -> None:
        config = self.compression_config()
        if config is not None and get_method(config.method).before is not None:
            raise ConfigError(
                f"Method {config.method!r} prunes the video by what comes after it, so that it cannot be read before "
                "the question: use VideoQA.ask, or generate without a prefix."
            )

    def _spliced_row(
        self: Any, ids: torch.Tensor, items: Sequence[VisualTokens], source_positions: bool
    ) -> PaddedBatch:
        """A batch of one row of ids (length,)."""
        labels = torch.full_like(ids, IGNORE_INDEX)
        return self.splice_encoded([ids], [labels], [items], "left", source_positions)

    def _continue(self: Any, prompt: PaddedBatch, kwargs: dict[str, Any]) -> Any:
        return super().generate(  # type: ignore[misc]
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention_mask.long(),
            prompt_position_ids=prompt.position_ids,
            prompt_videos=prompt.videos,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        prompt_position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs: the prompt keeps its own position ids, each new token takes the last one plus one.

        `prompt_position_ids` (rows, prompt length) int64 comes from `generate`; without it this is transformers'
        own method.
        """
        step = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if prompt_position_ids is None:
            return step
        inputs = step["input_ids"] if step.get("inputs_embeds") is None else step["inputs_embeds"]
        cache, places = step.get(CACHE), step.get("cache_position")
        if places is not None:  # older transformers, whose static caches guess their length
            done = int(places[0])
        else:
            done = 0 if cache is None else cache.get_seq_length()
        end = done + inputs.shape[1]
        new = torch.arange(1, end - prompt_position_ids.shape[1] + 1, device=prompt_position_ids.device)
        positions = torch.cat([prompt_position_ids, prompt_position_ids[:, -1:] + new], dim=1)
        step["position_ids"] = positions[:, done:end]
        return step


def _rows_per_prompt(kwargs: dict[str, Any], defaults: GenerationConfig) -> int:
    """Into how many rows generation expands each prompt."""
    defaults = kwargs.get("generation_config", defaults)
    beams, sequences = (
        kwargs.get(name, getattr(defaults, name)) or 1 for name in ("num_beams", "num_return_sequences")
    )
    return max(beams, sequences)


def without_warnings(kwargs: dict[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Generation arguments that mean the same and that transformers does not warn about.

    A run that does not sample loses its sampling settings (published checkpoints carry some, and scripts pass
    `temperature=0`), and a missing padding token becomes the first end-of-text token. A caller's own
    `generation_config` is left alone.
    """
    if "generation_config" in kwargs:
        return kwargs
    if kwargs.get("temperature") == 0:
        kwargs = {**kwargs, "do_sample": False}
    if not kwargs.get("do_sample", defaults.do_sample):
        kwargs = {**kwargs, **NEUTRAL_SAMPLING}
    eos = kwargs.get("eos_token_id", defaults.eos_token_id)
    if kwargs.get("pad_token_id", defaults.pad_token_id) is None and eos is not None:
        kwargs = {**kwargs, "pad_token_id": eos if isinstance(eos, int) else eos[0]}
    return kwargs
