"""Shorten the prompt between a model's vision tower and its language model, by hooks on this one model.

`generate` and its caller go on seeing the whole prompt: ids, mask and positions of the full length. The language model
and its cache see the short one. What decoding needs to know about the difference is kept with the cache.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError
from llava.hf.arguments import cache_of, check_next_turn, shifted, valid_places
from llava.hf.families import family_of
from llava.hf.family import Family, VideoShape
from llava.hf.positions import close_gaps
from llava.hf.prompt import Cut, Video, compress_videos, cut, merged, merged_features
from llava.instrument import stage
from llava.token_compression.config import CompressionConfig

ATTRIBUTE = "_llava_compression"
"""Where a model keeps its `Mechanism`, and a cache its `Shortened`; absent while nothing is compressed."""

LATER_VIDEO = (
    "A video that is added to a cache cannot be compressed; give the whole conversation with a new cache, in one "
    "piece: without prefill_chunk_size."
)
FOREIGN_VIDEO = (
    "The prompt's video placeholders are not those of the videos that the model has just encoded. Encode the videos "
    "and read the prompt inside the same block and in one piece: without mm_encoder_outputs from elsewhere, and "
    "without prefill_chunk_size."
)


@dataclass
class Shortened:
    """What a cache knows about the prompt that it holds in short.

    Attributes:
        mask: (batch, short length) int64, 0 for padding.
        full: whether there is no padding.
        gap: tokens by which the cache is shorter than the prompt.
        shift: (batch,) int64, by how much positions after the prompt are lower than in the full one.
        next_position: (batch,) int64, the first of them in the full one, counted in tokens.
    """

    mask: Tensor
    full: bool
    gap: int
    shift: Tensor
    next_position: Tensor

    def grown(self, total: int) -> Tensor:
        """(batch, total) mask of so many short and new tokens."""
        mask = self.mask[:, :total]
        return torch.cat([mask, mask.new_ones(len(mask), total - mask.shape[1])], dim=1)


def _outside_of_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Run a hook between the graphs of a compiled model; not at all in a step that `generate` has prepared.

    A step with a single token needs nothing more than what its preparation did, so its graph stays in one piece.
    """
    interrupting = torch.compiler.disable(hook)

    def call(self: "Mechanism", module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if torch.compiler.is_compiling() and self.step_is_prepared and kwargs.get("position_ids") is not None:
            prompt = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
            if prompt is not None and prompt.shape[1] == 1:
                return None
        return interrupting(self, module, args, kwargs, *output)

    return call


class Mechanism:
    """The hooks on one model, and the configurations of its blocks, of which the innermost one counts."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model)
        self.model, self.base = model, model.base_model
        self.language_model = getattr(self.base, self.family.language_model)
        self.placeholder = getattr(model.config, self.family.placeholder)
        self.entries: list[tuple[CompressionConfig]] = []
        self.shapes: dict[str, list[VideoShape]] = {}
        self.encoding = False
        self.step_is_prepared = False
        self.encoded = False  # whether there are videos that no prompt has had yet
        self.found: Tensor | None = None
        self.found_images: Tensor | None = None
        self.ids: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.pending: Shortened | None = None
        self.removals: list[Callable[[], None]] = []

    @property
    def config(self) -> CompressionConfig:
        """What counts: that of the innermost block."""
        return self.entries[-1][0]

    def install(self) -> None:
        """Put the hooks on the model."""
        self.removals = [
            self.base.register_forward_pre_hook(self._before_base, with_kwargs=True).remove,
            self.base.register_forward_hook(self._after_base, with_kwargs=True).remove,
            self.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True).remove,
            self.language_model.register_forward_hook(self._after_language_model, with_kwargs=True).remove,
            *[self._wrap(self.base, name, self._observing) for name in self._encoders()],
            self._wrap(self.model, "prepare_inputs_for_generation", self._preparing),
        ]
        setattr(self.model, ATTRIBUTE, self)

    def remove(self) -> None:
        """Leave the model as it was."""
        for removal in reversed(self.removals):
            removal()
        self.removals = []
        delattr(self.model, ATTRIBUTE)

    def _encoders(self) -> list[str]:
        names = [self.family.features, self.family.image_features]
        return [name for name in names if name is not None and hasattr(self.base, name)]

    @staticmethod
    def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> Callable[[], None]:
        """Shadow a method on this instance; generation looks at its signature."""
        before = vars(owner).get(name)
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrapper(original)))
        return (lambda: delattr(owner, name)) if before is None else (lambda: setattr(owner, name, before))

    def _observing(self, original: Any) -> Any:
        signature = inspect.signature(original)

        def encode(*args: Any, **kwargs: Any) -> Any:
            if self.encoding:  # that of videos may call that of images
                return original(*args, **kwargs)
            self.encoding = True
            try:
                with stage("vision_tower", self.base.device):
                    output = original(*args, **kwargs)
            finally:
                self.encoding = False
            if original.__name__ == self.family.features:
                arguments = signature.bind(*args, **kwargs).arguments
                self.shapes["video"] = self.family.shapes(self.model.config, arguments, output)
                self.encoded = True
            else:
                self.shapes["image"] = self.family.image_shapes(output)
            return output

        return encode

    def _preparing(self, original: Any) -> Any:
        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = cache_of(kwargs)
            state = getattr(cache, ATTRIBUTE, None)
            old_style = kwargs.get("cache_position") is not None  # positions are computed here, from the full mask
            self.step_is_prepared = cache is not None and cache.get_seq_length() > 0 and not old_style
            if state is None:
                inputs = original(input_ids, *args, **kwargs)
                if cache is not None and cache.get_seq_length() == 0 and _lost_pixels(kwargs, inputs):
                    raise UserError(FOREIGN_VIDEO)
                return inputs
            if kwargs.get("is_first_iteration") and cache.get_seq_length() > 0:
                check_next_turn(input_ids, kwargs.get("attention_mask"))
            elif not old_style and (not state.full or kwargs.get("attention_mask") is not None):
                new = kwargs.get("next_sequence_length") or 1
                kwargs["attention_mask"] = state.grown(cache.get_seq_length() + new)
            inputs = original(input_ids, *args, **kwargs)
            positions = inputs.get("position_ids")
            if positions is not None and cache.get_seq_length() > 0:
                inputs["position_ids"] = shifted(positions, state.shift)
            return inputs

        return prepare

    @_outside_of_graphs
    def _before_base(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember where the placeholders are."""
        ids: Tensor | None = args[0] if args else kwargs.get("input_ids")
        self.ids, self.arguments = ids, kwargs
        self.step_is_prepared &= kwargs.get("position_ids") is not None  # loops by hand leave them out
        prompt = kwargs["inputs_embeds"] if ids is None else ids
        if self.step_is_prepared and prompt.shape[1] == 1:
            return None
        self.found = self._find(prompt, self.placeholder)
        images = self.family.image_placeholder if self.config.images else None
        self.found_images = None if images is None else self._find(prompt, getattr(self.model.config, images))
        cache = cache_of(kwargs)
        state = getattr(cache, ATTRIBUTE, None)
        if state is None or cache.get_seq_length() == 0:
            return None
        if kwargs.get("position_ids") is not None or kwargs.get("cache_position") is not None:
            return None
        # A loop written by hand leaves positions to the model, which would count from the cache's length.
        after = cache.get_seq_length() - state.mask.shape[1]
        new = torch.arange(self.found.shape[1], device=state.mask.device)
        positions = (state.next_position - state.shift + after)[:, None] + new
        delta = getattr(module, "rope_deltas", None)
        if self.family.rotary_axes and delta is not None:
            positions = (positions + delta.to(positions.device))[None].expand(3, -1, -1)
        return args, dict(kwargs, position_ids=positions)

    def _find(self, prompt: Tensor, placeholder: int) -> Tensor:
        """(batch, length) bool, where a prompt of ids or of embeddings has a placeholder."""
        if prompt.ndim == 2:
            return prompt == placeholder
        row = self.base.get_input_embeddings()(torch.tensor(placeholder, device=prompt.device))
        return (prompt == row).all(-1)

    @_outside_of_graphs
    def _after_base(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.ids, self.arguments = None, {}
        if self.found is not None:
            self.found = None
            raise UserError(
                f"{type(self.model).__name__} did not call its {self.family.language_model} as this version expects, "
                "so nothing was compressed; this version of transformers is not supported for this model."
            )

    @_outside_of_graphs
    def _before_language_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found, images, self.found, self.pending = self.found, self.found_images, None, None
        embeds, cache = kwargs["inputs_embeds"], cache_of(kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        if past > 0:
            if self.encoded and found is not None and found.any():
                raise UserError(LATER_VIDEO)
            return self._decoding(args, kwargs, cache, past + embeds.shape[1])
        if hasattr(cache, ATTRIBUTE):  # an emptied cache that is used again
            delattr(cache, ATTRIBUTE)
            vars(cache).pop("crop", None)
        if found is None or not (found.any() or (images is not None and images.any())):
            return None
        self.encoded = False
        valid = valid_places(kwargs.get("attention_mask"), embeds)
        places = self._places(found.to(embeds.device) & valid)
        if images is not None:
            of_images = self._places(images.to(embeds.device) & valid, "image")
            places = [videos + more for videos, more in zip(places, of_images, strict=True)]
        newline = getattr(self.base, "image_newline", None)
        with stage("compression", embeds.device):
            rows = compress_videos(embeds, places, self.config, newline)
            if all(video.result.stats.kept_tokens == video.places.numel() for row in rows for video in row):
                return None
            return args, self._shortened(kwargs, rows, cut(rows, valid), valid)

    def _places(self, found: Tensor, kind: str = "video") -> list[list[Tensor]]:
        """For each row of (batch, length) placeholders the places of its videos, or images."""
        if not found.any():
            return [[] for _ in found]
        shapes = self.shapes.get(kind, [])
        if kind == "video":
            shapes = self.family.in_prompt(shapes, self.arguments)
        total = sum(shape.placeholders for shape in shapes)
        if total == 0 or found.sum() % total:
            raise UserError(FOREIGN_VIDEO)
        copies = int(found.sum()) // total  # beams repeat each prompt, and not its videos
        in_order = iter(shapes)
        places: list[list[Tensor]] = []
        for group in found.split(copies):
            own = list(_first(in_order, int(group[0].sum())))
            for row in group:
                ids, here = None if self.ids is None else self.ids[len(places)], row.nonzero()[:, 0]
                if kind == "image":
                    places.append(Family.locate(self.family, here, iter(own), ids))
                    continue
                videos = self.family.locate(here, iter(own), ids)
                places.append(videos + (self.family.locate_images(here, videos) if self.config.images else []))
        return places

    def _shortened(
        self, kwargs: dict[str, Any], rows: list[list[Video]], shorter: Cut, valid: Tensor
    ) -> dict[str, Any]:
        """Arguments of the language model for the prompts that are left."""
        embeds = kwargs["inputs_embeds"]
        in_video = torch.zeros_like(valid)
        for index, videos in enumerate(rows):
            for video in videos:
                in_video[index, video.all_places] = True
        positions, shift = self._positions(kwargs.get("position_ids"), in_video, shorter, valid)
        changed = dict(
            kwargs,
            inputs_embeds=shorter.rows(merged(embeds, rows)),
            position_ids=positions,
            attention_mask=shorter.mask,  # also where it is all ones: without one, gaps look like separate sequences
        )
        if kwargs.get("visual_pos_masks") is not None:
            visual = kwargs["visual_pos_masks"].to(embeds.device)
            ranks = (visual.flatten().cumsum(0) - 1).view_as(visual)
            left = shorter.rows(visual) & shorter.mask.bool()
            chosen = shorter.rows(ranks)[left]
            changed["visual_pos_masks"] = left
            changed["deepstack_visual_embeds"] = [
                merged_features(features, ranks, rows)[chosen.to(features.device)]
                for features in kwargs["deepstack_visual_embeds"]
            ]
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = torch.arange(shorter.index.shape[1], device=embeds.device)
        self.pending = Shortened(
            mask=shorter.mask,
            full=bool(shorter.mask.all()),
            gap=shorter.length - shorter.index.shape[1],
            shift=shift,
            next_position=valid.sum(1),
        )
        return changed

    def _positions(
        self, positions: Tensor | None, in_video: Tensor, shorter: Cut, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Positions of the kept tokens, with as many axes as before, and (batch,) how far the end moved up."""
        batch = len(valid)
        if positions is None:
            positions = (valid.cumsum(1) - 1).clamp_min(0)
        positions = positions.expand(*positions.shape[:-2], batch, -1).to(in_video.device)
        choice = self.config.position_ids or ("source" if self.family.rotary_axes else "contiguous")
        if choice == "source":
            shift = torch.zeros(batch, dtype=torch.int64, device=positions.device)
        elif positions.ndim == 2:
            positions, shift = close_gaps(positions, in_video, shorter.keep)
        else:
            axes, shift = close_gaps(positions[-3:], in_video, shorter.keep)
            positions = torch.cat([positions[:-3], axes])
        if positions.ndim == 2:
            return shorter.rows(positions), shift
        kept = torch.stack([shorter.rows(axis) for axis in positions])
        if len(kept) == 4:  # the first axis is that of text, from which nothing but masks is made
            kept[0] = (shorter.mask.cumsum(1) - 1).clamp_min(0)
        return kept, shift

    def _decoding(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, total: int) -> Any:
        """Tokens after a prompt that was shortened."""
        state = getattr(cache, ATTRIBUTE, None)
        if state is None:
            return None
        if kwargs.get("cache_position") is not None:  # transformers 5.3 and older
            places = kwargs["cache_position"] - state.gap
            return args, dict(kwargs, cache_position=places, attention_mask=state.grown(total))
        mask: Any = kwargs.get("attention_mask")
        flat = torch.is_tensor(mask) and mask.ndim == 2
        if (mask is None and not state.full) or (flat and mask.shape[1] != total):
            return args, dict(kwargs, attention_mask=state.grown(total))
        return None

    @_outside_of_graphs
    def _after_language_model(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state, self.pending = self.pending, None
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = getattr(output, "cache", None)
        if state is None or cache is None:
            return
        setattr(cache, ATTRIBUTE, state)
        crop = getattr(cache, "crop", None)
        if crop is not None:  # to a length of the full prompt, which transformers 5.10 and older ask for

            @functools.wraps(crop)
            def crop_short(length: int) -> Any:
                return crop(length - state.gap if length > 0 else length)

            cache.crop = crop_short


def _lost_pixels(given: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a prompt is read without its pixels: in pieces, transformers 5.17 never encodes them."""
    names = [name for name, value in given.items() if name.startswith("pixel_values") and value is not None]
    return given.get("mm_encoder_outputs") is None and any(inputs.get(name) is None for name in names)


def _first(shapes: Iterator[VideoShape], placeholders: int) -> Iterator[VideoShape]:
    """Take the videos of so many placeholders."""
    while placeholders > 0 and (shape := next(shapes, None)) is not None:
        placeholders -= shape.placeholders
        yield shape
