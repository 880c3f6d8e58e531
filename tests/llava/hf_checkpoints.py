"""Checkpoints of transformers on disk, as users have them: a tiny random model, its processors, a chat template.

Their tokens are bytes. The processors are those of transformers; those of videos need torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eval.efficiency.hf_shapes import hf_config

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGED = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 56 * 84}}


@dataclass(frozen=True)
class Checkpoint:
    """One family.

    Attributes:
        tokens: special tokens by the name that the processor knows them by.
        image, video: what the chat template writes.
        processor: makes the processor of a tokenizer.
        vision: fields of the tower, so that it fits the processor.
        fields: other fields of the configuration.
    """

    tokens: dict[str, str]
    image: str
    video: str
    processor: Callable[..., Any]
    vision: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


def _qwen(processor: str, video: str, patch: int, image: str = "Qwen2VL") -> Callable[..., Any]:
    def make(tokenizer: Any, template: str) -> Any:
        sizes = {"patch_size": patch, "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": 6 * (2 * patch) ** 2}}
        images = _named(f"{image}ImageProcessor")(**sizes)
        videos = _named(f"{video}VideoProcessor")(**sizes)
        return _named(f"{processor}Processor")(images, tokenizer, videos, chat_template=template)

    return make


def _named(name: str) -> Any:
    return getattr(transformers, name)


def _squares(processor: str, image: str, video: str, **more: Any) -> Callable[..., Any]:
    def make(tokenizer: Any, template: str) -> Any:
        square = {"size": {"height": 16, "width": 16}}
        images, videos = _named(f"{image}ImageProcessor")(**square), _named(f"{video}VideoProcessor")(**square)
        return _named(f"{processor}Processor")(
            image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=template, **more
        )

    return make


def _llava_next_video(tokenizer: Any, template: str) -> Any:
    square = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**square),
        transformers.LlavaNextImageProcessor(**square),
        tokenizer,
        chat_template=template,
        patch_size=4,
        vision_feature_select_strategy="default",
    )


def _smolvlm(tokenizer: Any, template: str) -> Any:
    largest = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**largest),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**largest),
        image_seq_len=4,
        chat_template=template,
    )


QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "label": "Frame",  # one token, as in theirs
}

CHECKPOINTS = {
    "llava_onevision": Checkpoint(
        LLAVA,
        "<image>",
        "<video>",
        _squares(
            "LlavaOnevision",
            "LlavaOnevision",
            "LlavaOnevision",
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        ),
    ),
    "qwen2_vl": Checkpoint(QWEN, QWEN_IMAGE, QWEN_VIDEO, _qwen("Qwen2VL", "Qwen2VL", 14), {"patch_size": 14}),
    "qwen2_5_vl": Checkpoint(
        QWEN, QWEN_IMAGE, QWEN_VIDEO, _qwen("Qwen2_5_VL", "Qwen2VL", 14), {"patch_size": 14, "window_size": 56}
    ),
    "qwen3_vl": Checkpoint(QWEN, QWEN_IMAGE, QWEN_VIDEO, _qwen("Qwen3VL", "Qwen3VL", 16), {"patch_size": 16}),
    "qwen3_vl_moe": Checkpoint(QWEN, QWEN_IMAGE, QWEN_VIDEO, _qwen("Qwen3VL", "Qwen3VL", 16), {"patch_size": 16}),
    "llava_next_video": Checkpoint(
        LLAVA,
        "<image>",
        "<video>",
        _llava_next_video,
    ),
    "video_llama_3": Checkpoint(
        {"image_token": "<image>", "video_token": "<video>"},
        "<image>",
        "<video>",
        _qwen("VideoLlama3", "VideoLlama3", 14, "VideoLlama3"),
        {"patch_size": 14},
    ),
    "smolvlm": Checkpoint(
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
            "label": "Frame from ",  # in bytes, it would be longer than any label of theirs
        },
        "<image>",
        "<video>",
        _smolvlm,
    ),
    "internvl": Checkpoint(
        INTERN,
        "<IMG_CONTEXT>",
        "<video>",
        _squares("InternVL", "GotOcr2", "InternVL", image_seq_length=4),
    ),
}


def write_checkpoint(kind: str, folder: Path) -> Path:
    """Write the checkpoint of a model_type, and return its folder."""
    checkpoint = CHECKPOINTS[kind]
    tokenizer = _tokenizer(checkpoint.tokens)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in checkpoint.tokens.items()}
    config = hf_config(f"{kind}-tiny")
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 32768
    for name, value in {**_special_ids(config, ids), **checkpoint.fields}.items():
        setattr(config, name, value)
    for name, value in checkpoint.vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config.suppress_tokens = sorted(ids.values())  # a random model would write placeholders
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    template = TEMPLATE.replace("IMAGE", checkpoint.image).replace("VIDEO", checkpoint.video)
    checkpoint.processor(tokenizer, template).save_pretrained(folder)
    return folder


def decode_with_pyav(monkeypatch: Any) -> None:
    """Transformers reads files with torchcodec, which needs FFmpeg's libraries; without it, let PyAV do that."""
    from transformers.video_processing_utils import BaseVideoProcessor
    from transformers.video_utils import load_video

    def fetch(self: Any, videos: Any, sample_indices_fn: Any = None) -> Any:
        return zip(
            *(load_video(name, backend="pyav", sample_indices_fn=sample_indices_fn) for name in videos), strict=True
        )

    if find_spec("torchcodec") is None:
        monkeypatch.setattr(BaseVideoProcessor, "fetch_videos", fetch)


def _special_ids(config: Any, ids: dict[str, int]) -> dict[str, int]:
    named = {
        "image_token_id": ids.get("image_token", ids.get("context_image_token")),
        "video_token_id": ids.get("video_token"),
        "image_token_index": ids.get("image_token"),
        "video_token_index": ids.get("video_token"),
        "vision_start_token_id": ids.get("vision_start"),
        "vision_end_token_id": ids.get("vision_end"),
    }
    return {name: value for name, value in named.items() if value is not None and hasattr(config, name)}


def _tokenizer(special: dict[str, str]) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    return fast
