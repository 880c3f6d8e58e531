"""Qwen2.5-VL of vLLM with compressed videos; see the package."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from llava.vllm import compression_of, shortened_items, tokens_of


class CompressedProcessor(Qwen2_5_VLMultiModalProcessor):
    """Writes as many placeholders of a video as it has tokens afterwards."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        hf_config = self.info.get_hf_config()
        config = compression_of(hf_config, self.info.ctx.get_mm_config().video_pruning_rate)
        merge = hf_config.vision_config.spatial_merge_size

        def placeholders(index: int) -> list[int]:
            grid = out_mm_kwargs["video"][index]["video_grid_thw"].data.tolist()
            return [hf_config.video_token_id] * tokens_of(grid, merge, config)

        return [
            PromptReplacement(modality="video", target=update.target, replacement=placeholders)
            if update.modality == "video"
            else update
            for update in updates
        ]


@MULTIMODAL_REGISTRY.register_processor(
    CompressedProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class LlavaScissorQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):  # noqa: N801  # vLLM's name with ours before it
    """Keeps the tokens of a video that the configuration asks for."""

    video_pruning_rate: float | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compression = compression_of(self.config, self.video_pruning_rate)
        self.video_pruning_rate = 0.0  # of vLLM's own pruning, which then only adds positions

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        return shortened_items(super().embed_multimodal(**kwargs), kwargs, self.compression)
