"""What a method is told that prunes inside the language model: attention as whole maps have it, groups, text."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from inner_cases import CLOSE, LAYERS

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import UserError
from llava.model.items import VisualItem
from llava.model.language_model.attention import attention_rows
from llava.model.splice import GROUPS
from llava.token_compression import CompressionConfig, compress, compression
from llava.token_compression.inner import InnerShareOptions, Survivors, before_model
from llava.token_compression.registry import Method, _methods

PROMPT = torch.tensor([[5, 6, IMAGE, 7, IMAGE, 8, 9]])


@dataclass(frozen=True)
class SpyOptions(InnerShareOptions):
    """Of a method that keeps the first tokens."""

    layer: int | None = 2
    text: bool = True

    looking: ClassVar[str] = "text"


@pytest.fixture
def model(make_llava):
    return make_llava(num_hidden_layers=LAYERS, mm_newline_position="frame")


@pytest.fixture
def seen(monkeypatch):
    """What a method called "spy" was given."""
    videos = []

    def spy(video, count):
        videos.append(video)
        return Survivors(torch.arange(count))

    monkeypatch.setitem(_methods, "spy", Method(spy, (), options=SpyOptions, merge=False, before="prunevid"))
    return videos


@torch.no_grad()
def test_attention_is_that_of_whole_maps(model, make_video, seen):
    model.set_attn_implementation("eager")
    images = [make_video(2), make_video(3, seed=1)]
    with compression(model, method="spy", retention_ratio=1.0):
        embeds = model.prepare_inputs_labels_for_multimodal(PROMPT, None, None, None, None, images, "video")[4]
        model(PROMPT, images=images, modalities="video")
    output = model.model(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True)
    maps, hidden = output.attentions[1][0], output.hidden_states[2][0]
    first = torch.tensor([2, 3, 4, 5, 7, 8, 9, 10])  # four tokens of each of two frames, and a newline after them
    second = torch.tensor([13, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 26])
    texts = torch.tensor([12, 28, 29]), torch.tensor([28, 29])
    assert embeds.shape[1] == 30
    for video, places, text in zip(seen, (first, second), texts, strict=True):
        torch.testing.assert_close(video.attention, maps[:, text][:, :, places], **CLOSE)
        torch.testing.assert_close(video.hidden, hidden[places], **CLOSE)
        torch.testing.assert_close(video.text, hidden[text], **CLOSE)


@torch.no_grad()
def test_attention_without_order_is_softmax_of_plain_products(model):
    layer, heads = model.model.layers[1], model.config.num_attention_heads
    hidden = torch.randn(1, 9, model.config.hidden_size)
    valid = torch.tensor([[False, True, True, True, True, True, True, True, False]])
    query = torch.tensor([[2, 5]])
    found = attention_rows(layer, hidden, None, query, valid)
    normed = layer.input_layernorm(hidden)[0]
    queries = layer.self_attn.q_proj(normed).view(9, heads, -1)
    keys = layer.self_attn.k_proj(normed).view(9, heads // 2, -1).repeat_interleave(2, dim=1)
    products = torch.einsum("qhd,khd->hqk", queries[query[0]], keys) * queries.shape[-1] ** -0.5
    expected = products.masked_fill(~valid[0], -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(found[0], expected, **CLOSE)


@torch.no_grad()
def test_groups_are_those_of_the_part_before(model, make_video, seen):
    """Also beside newlines, and where only some tokens are kept."""
    config = CompressionConfig(method="spy", retention_ratio=0.6)
    images = [make_video(2), make_video(3, seed=1)]
    with compression(model, config):
        batch = model.splice(PROMPT, None, None, images, "video", None, "left")
        model(PROMPT, images=images, modalities="video")
    for number, (video, image) in enumerate(zip(seen, images, strict=True), start=1):
        features, _ = model.encode_video(image, before_model(config))
        groups = compress(features, before_model(config)).groups
        assert groups is not None
        assert len(groups.unique()) > 1
        assert torch.equal(video.groups, groups)
        row = batch.videos[0]
        assert torch.equal(row[row // GROUPS == number] % GROUPS, groups)
    assert (batch.videos[0] == 0).sum() == PROMPT.shape[1] - 2
    assert (batch.videos[0] == -1).any()


def test_images_that_are_not_compressed_are_text(model, make_video):
    with compression(model, method="fastv", retention_ratio=0.5):
        (tokens,) = model.encode_images([VisualItem(make_video(1), "image", (32, 32))])
    assert tokens.groups is None


def test_a_prompt_without_text_after_its_video_is_refused(model, make_video, seen):
    with (
        compression(model, method="spy", retention_ratio=1.0),
        pytest.raises(UserError, match="goes by the text after a video, and there is none"),
    ):
        model(torch.tensor([[5, IMAGE]]), images=[make_video(2)], modalities="video")
