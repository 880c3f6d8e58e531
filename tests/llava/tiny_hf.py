"""A tiny random model of each family of transformers, with prompts of text, videos and images for it.

Weights are scaled so that logits differ by whole units: a wrong mask or position shows up far above rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, START, END = 120, 121, 122, 123
SPECIAL = [0, 119, IMAGE, VIDEO, START, END]
"""Ids that no generated text may hold: a random model would write placeholders."""

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 119,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


Rows = list[list[tuple[int, int]]]
"""For each prompt the frames and the seed of each of its videos."""


@dataclass(frozen=True)
class Prompts:
    """A batch: arguments of `forward` and `generate`, and where the videos' tokens are.

    Attributes:
        inputs: by name.
        videos: for each row the places of each video's tokens, (frames, tokens per frame).
    """

    inputs: dict[str, Any]
    videos: list[list[Tensor]]


@dataclass(frozen=True)
class Tiny:
    """One family.

    Attributes:
        name: its model_type.
        build: makes the model.
        segment: ids of a video of so many frames, and the offsets of its tokens in them, (frames, tokens).
        pixels: arguments for the videos of each row, each video given by its frames and seed.
        image: arguments for one image, and its number of placeholders; None where it is several groups of them.
    """

    name: str
    build: Callable[[], Any]
    segment: Callable[[int], tuple[list[int], Tensor]]
    pixels: Callable[[Rows], dict[str, Any]]
    image: Callable[[int], tuple[dict[str, Any], int]] | None = None

    def model(self, seed: int = 0, **attributes: Any) -> Any:
        """The model, with weights of its own for each seed."""
        torch.manual_seed(seed)
        model = self.build(**attributes).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.6 / weight.shape[-1] ** 0.5 if "embed_tokens" not in name else 1.0)
            model.get_output_embeddings().weight.normal_(std=0.3)
        model.generation_config.suppress_tokens = SPECIAL
        return model

    def prompts(self, rows: list[list[int]], words: int = 6, seed: int = 0, image: bool = False) -> Prompts:
        """Prompts that hold videos of so many frames each, padded on the left.

        With `image`, the only row starts with an image.
        """
        assert not image or len(rows) == 1
        ids: list[list[int]] = []
        videos: list[list[Tensor]] = []
        counter, pictures = 0, []
        clips: Rows = []
        text = torch.Generator().manual_seed(seed)
        for row, frames_of_row in enumerate(rows):
            sequence, found = _words(2 + row, text), []
            clips.append([])
            if image:
                assert self.image is not None
                arguments, count = self.image(seed + 50 + row)
                pictures.append(arguments)
                sequence += [START, *[IMAGE] * count, END]
            for frames in frames_of_row:
                segment, offsets = self.segment(frames)
                found.append(offsets + len(sequence))
                sequence += segment + _words(3, text)
                clips[-1].append((frames, 10 * seed + counter))
                counter += 1
            ids.append(sequence + _words(words, text))
            videos.append(found)
        longest = max(map(len, ids))
        pads = [longest - len(row) for row in ids]
        tensor = torch.tensor([[0] * pad + row for pad, row in zip(pads, ids, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, ids, strict=True)])
        inputs: dict[str, Any] = {"input_ids": tensor, "attention_mask": mask}
        if counter:
            inputs |= self.pixels(clips)
        for arguments in pictures:
            for name, value in arguments.items():
                inputs[name] = torch.cat([value, inputs[name]]) if name in inputs else value
        if "video_grid_thw" in inputs and self.name.startswith("qwen"):
            inputs["mm_token_type_ids"] = (tensor == IMAGE).long() + 2 * (tensor == VIDEO).long()
        shifted = [[places + pad for places in row] for pad, row in zip(pads, videos, strict=True)]
        return Prompts(_known(self.name, inputs), shifted)


def _known(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Without what an older transformers does not take."""
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 3)
    if old and name.startswith("qwen"):
        inputs.pop("mm_token_type_ids", None)
    return inputs


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 110, (count,), generator=generator).tolist()


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _contiguous(per_frame: int, extra: int = 0, token: int = VIDEO) -> Callable[[int], tuple[list[int], Tensor]]:
    """Segments without anything between frames."""

    def segment(frames: int) -> tuple[list[int], Tensor]:
        count = frames * per_frame
        return [token] * (count + extra), torch.arange(count).view(frames, per_frame)

    return segment


def _model(kind: str, **fields: Any) -> Callable[..., Any]:
    """Builds `{kind}ForConditionalGeneration` from the fields of its configuration."""

    def build(**attributes: Any) -> Any:
        config = getattr(transformers, f"{kind}Config")(**fields)
        attention = attributes.pop("attn_implementation", None)
        if attention is not None:
            config._attn_implementation = attention
        for name, value in attributes.items():
            setattr(config, name, value)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _text(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **fields}


def _frames(rows: Rows) -> Tensor:
    """(videos, frames, 3, 16, 16) of videos of equally many frames."""
    return torch.stack([_noise(seed, frames, 3, 16, 16) for clips in rows for frames, seed in clips])


TINY: dict[str, Tiny] = {}


def _add(tiny: Tiny) -> None:
    TINY[tiny.name] = tiny


_add(
    Tiny(
        "llava_onevision",
        _model(
            "LlavaOnevision",
            text_config=_text("qwen2"),
            vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16]],
        ),
        _contiguous(4, extra=1),
        lambda rows: {"pixel_values_videos": _frames(rows)},
        lambda seed: (
            {"pixel_values": _noise(seed, 1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])},
            16 + 4 * 5,
        ),
    )
)


def _grids(rows: Rows, channels: int) -> dict[str, Any]:
    """Patches and grids of videos of 4x4 patches a frame."""
    clips = [clip for row in rows for clip in row]
    return {
        "pixel_values_videos": torch.cat([_noise(seed, frames * 16, channels) for frames, seed in clips]),
        "video_grid_thw": torch.tensor([[frames, 4, 4] for frames, _ in clips]),
    }


def _grid_image(seed: int) -> tuple[dict[str, Any], int]:
    return {"pixel_values": _noise(seed, 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}, 4


def _groups(label: int, token: int, end: bool = True) -> Callable[[int], tuple[list[int], Tensor]]:
    """Segments of frames of 4 tokens, each after a label of so many tokens and a start token."""

    def segment(frames: int) -> tuple[list[int], Tensor]:
        ids: list[int] = []
        offsets = []
        for frame in range(frames):
            ids += [*range(10, 8 + label), 20 + frame, 16, START]
            offsets.append(torch.arange(4) + len(ids))
            ids += [token] * 4 + [END] * end
        return ids, torch.stack(offsets)

    return segment


def _between(start: int, token: int, end: int) -> Callable[[int], tuple[list[int], Tensor]]:
    def segment(frames: int) -> tuple[list[int], Tensor]:
        return [start, *[token] * (4 * frames), end], 1 + torch.arange(4 * frames).view(frames, 4)

    return segment


CLIP = {"model_type": "clip_vision_model", **TOWER}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
DEEPSTACK = {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

_add(
    Tiny(
        "llava_next_video",
        _model(
            "LlavaNextVideo",
            text_config=_text("llama"),
            vision_config=CLIP,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16]],
            spatial_pool_mode="average",
            spatial_pool_stride=2,
        ),
        _contiguous(4),
        lambda rows: {"pixel_values_videos": _frames(rows)},
        lambda seed: (
            {"pixel_values": _noise(seed, 1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])},
            16 + 4 * 5,
        ),
    )
)
_add(
    Tiny(
        "qwen2_vl",
        _model(
            "Qwen2VL",
            text_config={**TEXT, "rope_parameters": ROTARY},
            vision_config={**QWEN_TOWER, "embed_dim": 32, "mlp_ratio": 2},
            **QWEN_IDS,
        ),
        _between(START, VIDEO, END),
        lambda rows: _grids(rows, 96),
        _grid_image,
    )
)
_add(
    Tiny(
        "qwen2_5_vl",
        _model(
            "Qwen2_5_VL",
            text_config={**TEXT, "rope_parameters": ROTARY},
            vision_config={**QWEN_TOWER, **WINDOWS, "intermediate_size": 64, "out_hidden_size": 32},
            **QWEN_IDS,
        ),
        _between(START, VIDEO, END),
        lambda rows: _grids(rows, 96),
        _grid_image,
    )
)
for kind, experts in (("Qwen3VL", {}), ("Qwen3VLMoe", {"num_experts": 4, "num_experts_per_tok": 2})):
    _add(
        Tiny(
            "qwen3_vl_moe" if experts else "qwen3_vl",
            _model(
                kind,
                text_config={
                    **TEXT,
                    "rope_parameters": ROTARY,
                    "head_dim": 8,
                    **experts,
                    **({"moe_intermediate_size": 16} if experts else {}),
                },
                vision_config={**QWEN_TOWER, **DEEPSTACK, "intermediate_size": 64, "out_hidden_size": 32},
                **QWEN_IDS,
            ),
            _groups(2, VIDEO),
            lambda rows: _grids(rows, 96),
            _grid_image,
        )
    )
_add(
    Tiny(
        "internvl",
        _model(
            "InternVL",
            text_config=_text("qwen2"),
            vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=IMAGE,
            image_seq_length=4,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
        ),
        _groups(3, IMAGE),
        lambda rows: {"pixel_values": _frames(rows).flatten(0, 1)},
        lambda seed: ({"pixel_values": _noise(seed, 3, 3, 16, 16)}, 12),  # three tiles
    )
)
_add(
    Tiny(
        "video_llama_3",
        _model(
            "VideoLlama3",
            text_config=_text("qwen2"),
            vision_config={key: TOWER[key] for key in TOWER if key != "image_size"},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        _groups(2, VIDEO, end=False),
        lambda rows: {**_grids(rows, 48), "video_merge_sizes": torch.tensor([2] * sum(map(len, rows)))},
        lambda seed: (
            {
                "pixel_values": _noise(seed, 16, 48),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "image_merge_sizes": torch.tensor([2]),
            },
            4,
        ),
    )
)
_add(
    Tiny(
        "smolvlm",
        _model("SmolVLM", text_config=_text("llama"), vision_config=TOWER, image_token_id=IMAGE, scale_factor=2),
        _groups(6, IMAGE),
        lambda rows: {"pixel_values": _padded(rows)},
    )
)


def _padded(rows: Rows) -> Tensor:
    """(rows, most frames of a row, 3, 16, 16); missing frames are zero."""
    pixels = torch.zeros(len(rows), max(sum(frames for frames, _ in clips) for clips in rows), 3, 16, 16)
    for row, clips in zip(pixels, rows, strict=True):
        own = torch.cat([_noise(seed, frames, 3, 16, 16) for frames, seed in clips])
        row[: len(own)] = own
    return pixels
