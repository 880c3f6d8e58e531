"""A model of transformers under measurement, with the parts and the baseline that `llava.hf` knows it by.

The baseline is the bare model, without `compression`: what the block itself costs is measured beside it.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from eval.bench_compress import synthetic_features
from eval.efficiency.config import Cell, Measurement
from eval.efficiency.flops import flop_counter, operators
from eval.efficiency.hf_prompts import layout, pixel_arguments, placeholder_of, prompt_ids, token_types
from eval.efficiency.subject import Prefill
from eval.efficiency.timing import repeat, spread
from llava.hf.arguments import cache_of
from llava.hf.families import family_of
from llava.instrument import stage
from llava.serving import VideoTokens
from llava.token_compression import compression
from llava.video import VideoConfig, load_video


class HfModel:
    """See `Subject`; `synthetic` says that the weights are random, and pixels are those of the clip."""

    stages: tuple[str, ...] = ("vision_tower", "compression", "prefill")
    has_block = True

    def __init__(self, model: Any, synthetic: bool, settings: Measurement) -> None:
        self.model, self.decoder, self._synthetic = model, model.config.get_text_config(), synthetic
        self.longest_prompt = self.decoder.max_position_embeddings
        self._size = settings.clip_height, settings.clip_width
        self._family = family_of(model)
        self._language_model = getattr(model.base_model, self._family.language_model)
        if synthetic:  # weights that were not trained may write placeholders, of which there must be none but a video's
            special = {placeholder_of(model.config), model.config.image_token_id}
            model.generation_config.suppress_tokens = sorted(special)

    def inputs(
        self, clip: Path, frames: int, settings: Measurement
    ) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
        """Frames of the clip; their processor needs files of a checkpoint, and its time is not measured."""

        def run() -> tuple[float, Any]:
            start = time.perf_counter()
            decoded = load_video(clip, VideoConfig(num_frames=frames)).frames
            return 1000 * (time.perf_counter() - start), decoded

        times, decoded = zip(*repeat(run, settings), strict=True)
        return {"decode_video": spread(times)}, torch.as_tensor(decoded[-1])

    def layout(self, frames: int) -> VideoTokens:
        return layout(self.model.config, frames, *self._size)

    def arguments(self, cell: Cell, pixels: torch.Tensor, settings: Measurement) -> tuple[dict[str, Any], int]:
        config, rows = self.model.config, cell.batch_size
        ids = prompt_ids(config, self.layout(cell.frames), settings.prompt_tokens, settings.seed).repeat(rows, 1)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **token_types(self.model, ids)}
        return {**texts, **pixel_arguments(config, pixels, rows)}, ids.shape[1]

    @contextlib.contextmanager
    def features(self, cell: Cell, seed: int) -> Iterator[int]:
        """The tower runs as always; what it gives is overwritten in place, and that counts as the tower's time."""
        base, name, video = self.model.base_model, self._family.features, self.layout(cell.frames)
        plain = getattr(base, name)
        prepared = (
            _features(video.frames, video.tokens_per_frame, self.decoder.hidden_size, seed) if self._synthetic else None
        )
        if prepared is not None:
            prepared = prepared.to(self.model.device, self.model.dtype)

        @functools.wraps(plain)
        def encode(*args: Any, **kwargs: Any) -> Any:
            with stage("vision_tower", self.model.device):
                output = plain(*args, **kwargs)
                if prepared is not None:
                    _overwrite(output.pooler_output, prepared, cell.batch_size)
            return output

        setattr(base, name, encode)
        try:
            yield 0 if prepared is None else prepared.nbytes
        finally:
            delattr(base, name)

    @contextlib.contextmanager
    def setting(self, cell: Cell) -> Iterator[None]:
        block = contextlib.nullcontext() if cell.method == "none" else compression(self.model, cell.compression)
        with block, self._reading_in(lambda: stage("prefill", self.model.device)):
            yield

    def generate(self, arguments: dict[str, Any], **options: Any) -> Any:
        moved = {name: value.to(self.model.device, non_blocking=True) for name, value in arguments.items()}
        floating = {name: value.to(self.model.dtype) for name, value in moved.items() if value.is_floating_point()}
        return self.model.generate(**{**moved, **floating}, **options)

    def further_question(self, arguments: dict[str, Any]) -> Callable[[], float] | None:
        return None

    @torch.no_grad()
    def prefill(self, arguments: dict[str, Any]) -> Prefill:
        with self._reading_in(flop_counter) as counters:
            options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
            cache = cache_of(self.generate(arguments, **options))
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Prefill(cache.get_seq_length(), size, operators(counters[0]))

    @contextlib.contextmanager
    def _reading_in(self, block: Callable[[], Any]) -> Iterator[list[Any]]:
        """Run each prefill, from the language model's own to the logits, inside of `block()`; all that these gave.

        The hook comes after those of the compression, where there is one.
        """
        entered: list[Any] = []
        with contextlib.ExitStack() as stack:

            def begin(module: Any, args: Any, kwargs: Any) -> None:
                if kwargs["inputs_embeds"].shape[1] > 1:
                    entered.append(stack.enter_context(block()))

            hooks = [
                self._language_model.register_forward_pre_hook(begin, with_kwargs=True),
                self.model.register_forward_hook(lambda *_: stack.close()),
            ]
            try:
                yield entered
            finally:
                for hook in hooks:
                    hook.remove()


def _features(frames: int, tokens: int, dim: int, seed: int) -> torch.Tensor:
    """(frames, tokens, dim) float32; the first tokens of a square where their number is none."""
    return synthetic_features(frames, math.ceil(tokens**0.5) ** 2, dim, seed)[:, :tokens]


def _overwrite(features: Any, prepared: torch.Tensor, rows: int) -> None:
    """Let each video of a batch have `prepared`, (frames, tokens, dim), before what else it has."""
    videos = features.view(rows, -1, features.shape[-1]) if torch.is_tensor(features) else features
    for video in videos:
        video.view(-1, video.shape[-1])[: prepared.shape[:2].numel()].copy_(prepared.flatten(0, 1))
