"""LLaVA on Qwen2, under the class names and parameter names of the original checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.errors import UserError
from llava.instrument import stage
from llava.model.items import Images
from llava.model.language_model.generation import CACHE, LlavaGenerationMixin
from llava.model.language_model.inner import inner_pass
from llava.model.language_model.inner_reading import Prompt
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenConfig(Qwen2Config):
    """Qwen2's configuration plus LLaVA's `mm_*` keys, which are kept as plain attributes."""

    model_type = "llava_qwen"
    mm_spatial_pool_mode = "bilinear"  # of checkpoints that do not name one, as LLaVA-OneVision is evaluated

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: also `rope_theta` and `torch_dtype`, for programs that read the older names."""
        fields = super().to_diff_dict()
        fields["rope_theta"] = (self.rope_parameters or {}).get("rope_theta")
        fields["torch_dtype"] = fields.get("dtype")
        return fields


class LlavaQwenZipConfig(LlavaQwenConfig):
    """Configuration of the published LLaVA-Scissor baselines: the same model with `mm_use_zip` keys."""

    model_type = "llava_qwen_zip"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    """Qwen2's decoder with a vision tower, a projector and a newline embedding."""

    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig) -> None:
        super().__init__(config)
        self.build_multimodal()


class LlavaQwenForCausalLM(LlavaGenerationMixin, LlavaMetaForCausalLM, Qwen2ForCausalLM):  # type: ignore[misc]
    """The model that reads images and videos and writes text."""

    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.token_compression = None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        modalities: str | Sequence[str] = "image",
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        continuation: int = 0,
        prompt_videos: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Qwen2's forward pass after inserting `images` into the prompt.

        `images`, `image_sizes` and `modalities` are those of
        `llava.model.llava_arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal`. With `inputs_embeds` this
        is exactly Qwen2's forward pass: 4-D masks and position ids are passed on. The loss is the same for left and
        right padding.

        `logits_to_keep` is named because generation looks for the name: with it, the vocabulary's logits are computed
        for the last position of a prompt alone and not for all of its thousands of visual tokens. So is `cache`, the
        name of `past_key_values` since transformers 5.24.

        A method that prunes inside the language model goes by the last token of the prompt. `continuation` says how
        many tokens at the end come after it, where an answer is given too. Its logits are those of the positions that
        are left. `prompt_videos` is what generation knows of the prompt: `videos` of `llava.model.splice.Row`.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        prompt = None
        if inputs_embeds is None:
            if input_ids is None:
                raise UserError("The model needs input_ids or inputs_embeds.")
            batch = self.spliced(input_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes)
            if batch is not None:
                position_ids, attention_mask, labels = self.as_given(batch, position_ids, attention_mask, labels)
                input_ids, inputs_embeds = None, batch.embeds
                before = 0 if past_key_values is None else past_key_values.get_seq_length()
                prompt = Prompt(pad(batch.videos, (before, 0)), batch.attention_mask, continuation)
            if labels is not None and attention_mask is not None and attention_mask.shape == labels.shape:
                labels = _without_first_after_padding(labels, attention_mask)
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        length = tokens.shape[1]
        if prompt_videos is not None:
            prompt = Prompt(prompt_videos, attention_mask, length - prompt_videos.shape[1])
        pruning = inner_pass(
            self.model, self.compression_config(), prompt, attention_mask, past_key_values, length, labels
        )
        with stage("prefill" if length > 1 else "decode", self.device), pruning:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE: past_key_values},
                **kwargs,
            )


def _without_first_after_padding(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Ignore the label of each row's first token: in a left-padded row it would be predicted from padding."""
    after_padding = attention_mask.roll(1, dims=1) == 0
    after_padding[:, 0] = False
    return labels.masked_fill(after_padding, IGNORE_INDEX)


AutoConfig.register("llava_qwen", LlavaQwenConfig, exist_ok=True)
AutoConfig.register("llava_qwen_zip", LlavaQwenZipConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM, exist_ok=True)
