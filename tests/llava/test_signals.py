"""What the vision tower tells about its patches, and how it reaches the methods that ask for it."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from llava.errors import CheckpointError, ConfigError
from llava.instrument import record
from llava.model.items import VisualItem
from llava.model.multimodal_encoder import signals
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.pooling import pool_2x2
from llava.token_compression import compress, compression, register
from llava.token_compression.registry import _methods
from llava.token_compression.selection import select

METHODS = ["visionzip", "holitom", "fastvid", "flashvid", "prunevid", "prumerge", "ustc"]
OF_VIDEOS = ["aot"]
PROMPT = torch.tensor([[5, 6, -200, 7, 8]])


@pytest.fixture(scope="module")
def siglip(make_llava, tmp_path_factory):
    """A folder with the pooling head of a tower of the tiny model's size, as SigLIP's checkpoint holds it."""
    folder, config = tmp_path_factory.mktemp("siglip"), make_llava().get_vision_tower().config
    torch.manual_seed(1)
    head = SiglipMultiheadAttentionPoolingHead(config)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    weights = {f"vision_model.head.{name}": weight for name, weight in head.state_dict().items()}
    save_file({**weights, "text_model.head.weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def with_head(llava, siglip):
    """A tiny model whose tower has its pooling head."""
    llava.get_vision_tower().load_pooling_head(siglip)
    return llava


def eager_attention(tower, pixels, layer=-2):
    """The attention (frames, heads, patches, patches) of a layer, the last one kept, from transformers' own model."""
    config = type(tower.config)(**tower.config.to_dict())
    config._attn_implementation = "eager"
    whole = SiglipVisionModel(config).eval()
    weights = tower.vision_tower.state_dict()
    if not hasattr(whole, "vision_model"):  # as in transformers of late
        weights = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    assert not whole.load_state_dict(weights, strict=False).unexpected_keys
    output = whole(pixels, output_attentions=True, output_hidden_states=True)
    return output.attentions[layer]  # the last layer of all is not kept


@pytest.mark.parametrize("block", [1, 200, 2**24])
def test_attention_in_blocks_is_the_attention_of_transformers(llava, make_video, monkeypatch, block):
    monkeypatch.setattr(signals, "BLOCK_ENTRIES", block)
    pixels, tower = make_video(3), llava.get_vision_tower()
    features, layer_input = tower.observe(pixels)
    seen = tower.signals(("vision_attn",), features, layer_input)
    expected = eager_attention(tower, pixels)
    assert expected.shape == (3, 2, 16, 16)
    torch.testing.assert_close(seen["vision_attn"][..., 0], expected.mean(dim=(1, 2)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["vision_attn"].sum(dim=1), torch.ones(3, 1))
    assert torch.equal(features, tower(pixels))


def test_keys_are_those_of_the_last_layer_kept(llava, make_video):
    tower, caught = llava.get_vision_tower(), []
    layer = tower.vision_tower.vision_model.encoder.layers[-1]
    handle = layer.self_attn.k_proj.register_forward_hook(lambda module, given, keys: caught.append(keys))
    tower(make_video(2))
    handle.remove()
    seen = tower.signals(("vision_keys",), *tower.observe(make_video(2)))
    torch.testing.assert_close(seen["vision_keys"], caught[0].view(2, 16, 2, 8).mean(dim=2))


def test_the_pooling_head_is_that_of_transformers(with_head, make_video):
    tower = with_head.get_vision_tower()
    features, layer_input = tower.observe(make_video(3))
    seen = tower.signals(("map_attn", "map_embed"), features, layer_input)
    normalised = tower.vision_tower.vision_model.post_layernorm(features)
    torch.testing.assert_close(seen["map_embed"], tower.pooling_head(normalised))
    torch.testing.assert_close(seen["map_attn"].sum(dim=1), torch.ones(3, 1))
    before = seen["map_attn"]
    assert before.std() > 1e-3
    with torch.no_grad():  # a patch that the values, but not the keys see twice as large counts as before
        width = tower.hidden_size
        tower.pooling_head.attention.in_proj_weight[2 * width :] *= 2
    torch.testing.assert_close(tower.signals(("map_attn",), features, layer_input)["map_attn"], before)


def test_a_head_that_is_missing_or_of_another_tower_is_named(llava, make_llava, make_video, siglip, tmp_path):
    with (
        compression(llava, method="fastvid", retention_ratio=0.5),
        pytest.raises(ConfigError, match=r"needs map_attn and map_embed of .*vision_model\.head.*load_pooling_head"),
    ):
        llava.encode_images([VisualItem(make_video(2), "video")])
    options = {"signals": "vision_attn"}
    with compression(llava, method="fastvid", retention_ratio=0.5, options=options):
        assert len(llava.encode_images([VisualItem(make_video(2), "video")])[0].embeds) == 5
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold the pooling head"):
        llava.get_vision_tower().load_pooling_head(tmp_path)
    other = make_llava(
        mm_hidden_size=32, vision_config={**llava.config.vision_config, "hidden_size": 32, "num_attention_heads": 4}
    )
    with pytest.raises(CheckpointError, match="does not hold the pooling head of this vision tower"):
        other.get_vision_tower().load_pooling_head(siglip)


def test_nothing_is_computed_or_left_behind_unless_asked_for(llava, make_video, monkeypatch):
    monkeypatch.setattr(SigLipVisionTower, "observe", None)
    monkeypatch.setattr(SigLipVisionTower, "signals", None)
    layer = llava.get_vision_tower().vision_tower.vision_model.encoder.layers[-1]
    with compression(llava, retention_ratio=0.5):
        llava.generate(PROMPT, images=[make_video(2)], modalities=["video"], max_new_tokens=1)
    monkeypatch.undo()
    with compression(llava, method="visionzip", retention_ratio=0.5), record() as recorder:
        llava.generate(PROMPT, images=[make_video(2)], modalities=["video"], max_new_tokens=1)
    assert not layer._forward_pre_hooks
    assert recorder.milliseconds["compression"] > recorder.compressions[0].milliseconds


def test_signals_are_pooled_and_chunked_as_the_features_are(llava, make_video, monkeypatch):
    monkeypatch.setattr("llava.model.llava_arch.PATCHES_PER_CHUNK", 32)
    collected = {"vision_attn": [], "vision_keys": []}
    features = llava.encode_frames(make_video(5), True, collected)
    assert [len(chunk) for chunk in collected["vision_attn"]] == [2, 2, 1]
    assert features.shape[:2] == torch.cat(collected["vision_keys"]).shape[:2] == (5, 4)
    tower = llava.get_vision_tower()
    seen = tower.signals(("vision_attn",), *tower.observe(make_video(5)))
    torch.testing.assert_close(torch.cat(collected["vision_attn"]), pool_2x2(seen["vision_attn"], "bilinear"))


@pytest.mark.parametrize("method", [*METHODS, *OF_VIDEOS])
def test_a_model_answers_with_exactly_as_many_tokens(with_head, make_video, method):
    llava, pixels = with_head, make_video(6)
    with compression(llava, method=method, retention_ratio=0.25) as config:
        (item,) = llava.encode_images([VisualItem(pixels, "video")])
        answer = llava.generate(PROMPT, images=[pixels], modalities=["video"], max_new_tokens=3, do_sample=False)
    assert len(item.embeds) == 6 + 1  # a quarter of 6 x 4, and a newline
    assert answer.shape[1] > 0
    features, inputs = llava.encode_video(pixels, config)
    expected = compress(features, config, **inputs)
    assert torch.equal(item.embeds[:-1], expected.tokens)
    assert torch.equal(item.positions[:-1], expected.positions)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [False, True])
def test_videos_and_images_of_one_batch(make_llava, make_video, siglip, method, images):
    model = make_llava(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres_max_9",
                       image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])  # fmt: skip
    model.get_vision_tower().load_pooling_head(siglip)
    items = [
        VisualItem(make_video(4), "video"),
        VisualItem(make_video(1, 1), "image"),
        VisualItem(make_video(3, 2), "image", (64, 30)),
        VisualItem(make_video(2, 3), "video"),
    ]
    plain = model.encode_images(items)
    with compression(model, method=method, retention_ratio=0.5, images=images):
        mixed = model.encode_images(items)
        single = [model.encode_images([item])[0] for item in items]
    for index, (one, other) in enumerate(zip(mixed, single, strict=True)):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.embeds, other.embeds)
        if items[index].modality == "image" and not images:
            assert torch.equal(one.embeds, plain[index].embeds)
        else:
            assert len(one.embeds) < len(plain[index].embeds)


@torch.no_grad()
def test_patches_and_their_attention_are_given_as_they_are(make_llava, make_video, monkeypatch):
    """Of the layers at the published share of the depth, in chunks, for a video among others."""
    llava, pixels = make_llava(), make_video(5)
    monkeypatch.setattr("llava.model.llava_arch.PATCHES_PER_CHUNK", 32)
    with compression(llava, method="aot", retention_ratio=0.5) as config:
        features, inputs = llava.encode_video(pixels, config)
    tower = llava.get_vision_tower()
    projected = llava.model.mm_projector(tower(pixels))
    torch.testing.assert_close(inputs["patches"], projected)
    torch.testing.assert_close(pool_2x2(inputs["patches"], "bilinear"), features)
    layers = len(tower.vision_tower.vision_model.encoder.layers)
    for name in ("vision_attn_shallow", "vision_attn_deep"):
        maps = eager_attention(tower, pixels, signals.layer_of(name, layers))
        torch.testing.assert_close(inputs[name], maps.mean(dim=(1, 2)))


def test_layers_of_signals():
    names = ("vision_attn", "vision_attn_shallow", "vision_attn_deep")
    assert [signals.layer_of(name, 26) for name in names] == [25, 5, 24]
    assert [signals.layer_of(name, 2) for name in names] == [1, 0, 1]


def test_methods_of_videos_leave_images_alone_or_say_so(llava, make_video):
    image = [VisualItem(make_video(1), "image")]
    with compression(llava, method="aot", retention_ratio=0.5):
        assert len(llava.encode_images(image)[0].embeds) == 16 + 1  # and a newline
    with (
        compression(llava, method="aot", retention_ratio=0.5, images=True),
        pytest.raises(ConfigError, match="needs patches of videos"),
    ):
        llava.encode_images(image)


def test_an_input_that_no_tower_gives_is_named(llava, make_video):
    @register("needy", inputs=("scores",))
    def needy(features, config, budget, scores):
        return select(features, torch.arange(budget))

    try:
        with compression(llava, method="needy", retention_ratio=0.5), pytest.raises(
            ConfigError, match=r"'needy' needs the input 'scores', which a model does not compute.*vision_attn"
        ):  # fmt: skip
            llava.encode_images([VisualItem(make_video(2), "video")])
    finally:
        del _methods["needy"]
