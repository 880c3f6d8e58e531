"""A model of this package under measurement."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from eval.efficiency.config import Cell, Measurement
from eval.efficiency.flops import count_flops
from eval.efficiency.inputs import measure_inputs, plausible_features, prompts
from eval.efficiency.subject import Prefill
from eval.efficiency.timing import TokenClock
from llava.model.video_layout import longest_prompt, video_layout
from llava.serving import VideoTokens
from llava.token_compression import compression


class Tree:
    """See `Subject`; `synthetic` says that the weights are random."""

    stages: tuple[str, ...] = ("vision_tower", "projector", "compression", "prefill")
    has_block = False

    def __init__(self, model: Any, synthetic: bool) -> None:
        self.model, self.decoder, self._synthetic = model, model.config, synthetic
        self.longest_prompt = longest_prompt(model.config)

    def inputs(
        self, clip: Path, frames: int, settings: Measurement
    ) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
        return measure_inputs(clip, frames, self.model.get_vision_tower().image_processor, settings)

    def layout(self, frames: int) -> VideoTokens:
        layout = video_layout(self.model.config, frames)
        assert layout is not None  # `load_subject` takes no model without a vision tower
        return VideoTokens(layout.frames, layout.tokens_per_frame, layout.tokens, layout.newlines)

    def arguments(self, cell: Cell, pixels: torch.Tensor, settings: Measurement) -> tuple[dict[str, Any], int]:
        rows = cell.batch_size
        ids = prompts(self.model.config.vocab_size, settings.prompt_tokens, rows, settings.seed, self.model.device)
        positions = settings.prompt_tokens + self.layout(cell.frames).source
        return {"inputs": ids, "images": [pixels] * rows, "modalities": ["video"] * rows}, positions

    def features(self, cell: Cell, seed: int) -> contextlib.AbstractContextManager[int]:
        return plausible_features(self.model, cell.frames, seed) if self._synthetic else contextlib.nullcontext(0)

    @contextlib.contextmanager
    def setting(self, cell: Cell) -> Iterator[None]:
        with compression(self.model, cell.compression):
            yield

    def generate(self, arguments: dict[str, Any], **options: Any) -> Any:
        return self.model.generate(**arguments, **options)

    @torch.inference_mode()
    def further_question(self, arguments: dict[str, Any]) -> Callable[[], float] | None:
        ids, model = arguments["inputs"], self.model
        if len(ids) > 1:
            return None
        prefix = model.read_prefix(ids, images=arguments["images"], modalities=arguments["modalities"])

        @torch.inference_mode()
        def ask() -> float:
            clock = TokenClock(model.device)
            criteria = StoppingCriteriaList([clock])
            model.generate(ids, prefix=prefix, max_new_tokens=1, do_sample=False, stopping_criteria=criteria)
            return clock.intervals()[0]

        return ask

    @torch.no_grad()
    def prefill(self, arguments: dict[str, Any]) -> Prefill:
        images, modalities = arguments["images"], arguments["modalities"]
        prompt = self.model.splice(arguments["inputs"], None, None, images, modalities, None, "left")
        output, operators = count_flops(
            lambda: self.model(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.attention_mask.long(),
                position_ids=prompt.position_ids,
                logits_to_keep=1,
                use_cache=True,
            )
        )
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
        return Prefill(prompt.attention_mask.shape[1], size, operators)
