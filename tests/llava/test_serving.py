"""Token counts from sizes alone are those of the prompt, and merge maps those of `compress`."""

import pytest
import torch
from conftest import tiny_llava, video
from tiny_hf import TINY

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import ConfigError, UserError
from llava.serving import compress_video, video_tokens
from llava.token_compression import CompressionConfig, compress, compression

BUDGETS = [{"retention_ratio": 0.3}, {"retained_tokens": 3}, {"method": "none"}, {"retention_ratio": 0.01}]


@pytest.mark.parametrize("settings", BUDGETS, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_count_is_that_of_the_prompt(name, settings):
    tiny = TINY[name]
    model, prompts = tiny.model(), tiny.prompts([[4]])
    frames = 8 if name.startswith("qwen") else 4  # two to a part
    count = video_tokens(model.config, CompressionConfig(**settings), frames=frames, height=16, width=16)
    placeholders = prompts.videos[0][0].numel() + count.always_kept
    assert count.source == placeholders
    with torch.no_grad(), compression(model, **settings):
        length = model(**prompts.inputs).logits.shape[1]
    assert prompts.inputs["input_ids"].shape[1] - length == count.source - count.prompt


@pytest.mark.parametrize("settings", BUDGETS, ids=str)
def test_count_of_this_package(settings):
    llava = tiny_llava()
    count = video_tokens(llava.config, CompressionConfig(**settings), frames=3)
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]])
    with torch.no_grad(), compression(llava, **settings):
        assert llava(ids, images=[video(3)], modalities=["video"]).logits.shape[1] == 2 + count.prompt


def test_published_sizes():
    """As transformers' processors count them: 196 a frame and a newline, 144, 256, and squares of 28 pixels."""
    from transformers import InternVLConfig, LlavaNextVideoConfig, LlavaOnevisionConfig, Qwen2_5_VLConfig

    keep = CompressionConfig(retention_ratio=0.1)
    onevision = video_tokens(LlavaOnevisionConfig(), keep, frames=32)
    assert (onevision.source, onevision.kept, onevision.prompt) == (6273, 627, 628)
    assert video_tokens(LlavaNextVideoConfig(), keep, frames=8).source == 8 * 144
    assert video_tokens(InternVLConfig(), keep, frames=8).source == 8 * 256
    assert video_tokens(Qwen2_5_VLConfig(), keep, frames=5, height=280, width=420).source == 3 * 150


def test_merge_map():
    features, config = (
        torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)),
        CompressionConfig(retained_tokens=5),
    )
    result, found = compress(features, config), compress_video(features, config, always_kept=1)
    assert torch.equal(found.embeds, result.tokens)
    assert found.keep.nonzero()[:, 0].tolist() == [*result.positions.tolist(), 12]
    assert torch.equal(found.source, result.positions)
    assert found.assignment.tolist() == [*result.assignment.flatten().tolist(), -1]


@pytest.mark.parametrize(
    ("config", "settings", "size", "error", "message"),
    [
        (TINY["qwen2_vl"], {"similarity_threshold": 0.5}, (4, 16, 16), ConfigError, "retention_ratio"),
        (TINY["qwen2_vl"], {"retention_ratio": 0.5}, (4, 15, 16), UserError, "15 x 16"),
        (TINY["qwen2_vl"], {"retention_ratio": 0.5}, (0, 16, 16), UserError, "at least one frame"),
        (TINY["qwen2_vl"], {"retained_tokens": 500}, (4, 16, 16), ConfigError, "500"),
    ],
)
def test_counts_that_nobody_can_know(config, settings, size, error, message):
    with pytest.raises(error, match=message):
        video_tokens(config.model().config, CompressionConfig(**settings), *size)


def test_newlines_that_depend_on_the_video(make_llava):
    with pytest.raises(UserError, match="mm_newline_position"):
        video_tokens(make_llava(mm_newline_position="grid").config, CompressionConfig(retention_ratio=0.5), frames=3)


def test_other_models():
    from transformers import Qwen2Config

    with pytest.raises(UserError, match="qwen2_5_vl"):
        video_tokens(Qwen2Config(), CompressionConfig(retention_ratio=0.5), frames=3)
