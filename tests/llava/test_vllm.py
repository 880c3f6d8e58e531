"""The plugin for vLLM: with vLLM itself where it is installed, which needs no GPU for what is tested, else on its own.

Nothing here loads a model into vLLM's engine: that takes a GPU.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.vllm import ARCHITECTURE, compression_of, register, shortened, shortened_items, tokens_of

GRID = [3, 4, 6]  # three parts of 2 x 3 tokens


def video(seed=0):
    """(18, 8 + 4): features, and positions as vLLM gives them to a video that starts a prompt."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(torch.arange(3) * 2, torch.arange(2), torch.arange(3))
    positions = torch.cat([places, torch.full((18, 1), 3)], dim=1)
    return torch.cat([torch.randn(18, 8, generator=generator), positions.float()], dim=1)


@pytest.mark.parametrize("settings", [{"retention_ratio": 0.3}, {"retained_tokens": 7}, {"method": "none"}], ids=str)
def test_as_many_embeddings_as_placeholders(settings):
    config = CompressionConfig(**settings)
    assert len(shortened(video(), GRID, config)) == tokens_of(GRID, 2, config)


def test_kept_tokens_are_those_of_compress_at_their_own_positions():
    config, embeds = CompressionConfig(retained_tokens=5), video()
    found, expected = shortened(embeds, GRID, config), compress(embeds[:, :8].view(3, 6, 8), config)
    assert torch.equal(found[:, :8], expected.tokens)
    assert torch.equal(found[:, 8:11], embeds[expected.positions, 8:11])
    assert found[:, 11].unique().tolist() == [5]  # after the last part, at 4


def test_contiguous_positions():
    found = shortened(video(), GRID, CompressionConfig(retained_tokens=5, position_ids="contiguous"))
    assert torch.equal(found[:, 8:11], torch.arange(5.0)[:, None].expand(-1, 3))
    assert found[:, 11].unique().tolist() == [5]


def test_images_stay():
    image, first, second = torch.randn(4, 12), video(1), video(2)
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "video_grid_thw": torch.tensor([GRID, GRID])}
    config = CompressionConfig(retained_tokens=5)
    found = shortened_items([image, first, second], {"pixel_values": 0, "pixel_values_videos": 0, **grids}, config)
    assert torch.equal(found[0], image)
    assert torch.equal(found[2], shortened(second, GRID, config))
    found = shortened_items([first, second, image], {"video_embeds": 0, "pixel_values": 0, **grids}, config)
    assert [len(item) for item in found] == [5, 5, 4]


def test_settings():
    given = SimpleNamespace(llava_scissor={"method": "uniform"})
    assert compression_of(given, 0.9) == CompressionConfig(method="uniform", retention_ratio=0.1)
    assert compression_of(SimpleNamespace(), 0.75).retention_ratio == 0.25
    given = SimpleNamespace(llava_scissor={"retained_tokens": 64})
    assert compression_of(given, 0.5).retained_tokens == 64


@pytest.mark.parametrize(
    ("given", "rate", "message"),
    [
        ({}, None, "--video-pruning-rate"),
        ({}, 0.0, "--video-pruning-rate"),
        ({"methd": "scissor"}, 0.9, "did you mean 'method'"),
        ({"similarity_threshold": 0.9}, 0.9, "depends on the video"),
        ({"method": "visionzip"}, 0.9, "needs vision_attn"),
    ],
)
def test_settings_that_cannot_be_served(given, rate, message):
    with pytest.raises(ConfigError, match=message):
        compression_of(SimpleNamespace(llava_scissor=given), rate)


def test_registration_names_a_class_and_imports_none(monkeypatch):
    registered = {}
    fake = ModuleType("vllm")
    fake.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    register()
    register()
    assert registered == {ARCHITECTURE: f"llava.vllm.qwen2_5_vl:{ARCHITECTURE}"}
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nllava_scissor = "llava.vllm:register"' in project


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    """vLLM's own configuration of a checkpoint, for the plugin's architecture at a quarter of the tokens."""
    pytest.importorskip("vllm", reason="needs vLLM")
    pytest.importorskip("torchvision", reason="transformers' processors of videos need torchvision")
    from hf_checkpoints import write_checkpoint
    from vllm.config import ModelConfig

    register()
    path = str(write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("checkpoint")))
    overrides = {"architectures": [ARCHITECTURE], "llava_scissor": {"method": "uniform", "merge": False}}
    return ModelConfig(
        model=path, tokenizer=path, dtype="float32", video_pruning_rate=0.75, hf_overrides=overrides, enforce_eager=True
    )


@pytest.fixture(scope="module")
def processed(vllm_config):
    """A prompt with a video, as vLLM's own processing leaves it."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(vllm_config)
    frames = torch.randint(256, (8, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    about = {"fps": 4.0, "total_num_frames": 8, "frames_indices": list(range(8)), "duration": 2.0}
    items = processor.info.parse_mm_data({"video": [(frames, {**about, "do_sample_frames": False})]})
    return processor("Look: <|vision_start|><|video_pad|><|vision_end|>What?", items)


def test_vllm_schedules_the_shortened_video(vllm_config, processed):
    (place,) = processed["mm_placeholders"]["video"]
    (item,) = processed["mm_kwargs"]["video"]
    parts, rows, columns = item["video_grid_thw"].data.tolist()
    assert place.length == round(parts * rows * columns / 4 / 4)
    assert processed["prompt_token_ids"].count(vllm_config.hf_config.video_token_id) == place.length


def test_vllm_model_embeds_what_was_scheduled_at_transformers_positions(vllm_config, processed, monkeypatch):
    """Everything of the model's class but its tower and decoder, for which there is a stand-in and none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from llava.vllm.qwen2_5_vl import LlavaScissorQwen2_5_VL

    config = vllm_config.hf_config
    features = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))

    def tower(pixels, grid_thw):
        return features[: len(pixels) // 4]

    model = LlavaScissorQwen2_5_VL.__new__(LlavaScissorQwen2_5_VL)
    torch.nn.Module.__init__(model)
    model.config, model.use_data_parallel, model.is_multimodal_pruning_enabled = config, False, True
    model.visual = SimpleNamespace(spatial_merge_size=2, dtype=torch.float32)
    model._process_video_input = lambda given: (tower(given["pixel_values_videos"], given["video_grid_thw"]),)
    model.video_pruning_rate, model.compression = 0.0, compression_of(config, 0.75)
    (item,) = processed["mm_kwargs"]["video"]
    data = {name: value.data for name, value in item.items()}
    seconds = data["second_per_grid_ts"]
    grid = data["video_grid_thw"][None]
    items = model.embed_multimodal(
        pixel_values_videos=data["pixel_values_videos"], video_grid_thw=grid, second_per_grid_ts=seconds.view(1)
    )
    (place,) = processed["mm_placeholders"]["video"]
    assert [len(embeds) for embeds in items] == [place.length]

    ids = torch.tensor(processed["prompt_token_ids"])
    embeds, positions, delta = model.recompute_mrope_positions(
        ids, items, torch.arange(len(ids)).expand(3, -1).clone(), 0
    )
    count = int(grid.prod()) // 4
    whole = torch.cat(
        [ids[: place.offset], torch.full((count,), config.video_token_id), ids[place.offset + place.length :]]
    )
    result = compress(features[:count].view(int(grid[0, 0]), -1, 16), model.compression)
    kept = torch.cat(
        [torch.arange(place.offset), place.offset + result.positions, torch.arange(place.offset + count, len(whole))]
    )
    kinds = 2 * (whole == config.video_token_id).long()[None]
    reference = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(reference)
    reference.config = config
    expected, _ = reference.get_rope_index(
        whole[None],
        mm_token_type_ids=kinds,
        video_grid_thw=grid,
        second_per_grid_ts=seconds.long().view(1),
        attention_mask=torch.ones_like(kinds),
    )
    assert torch.equal(embeds[0], result.tokens)
    assert torch.equal(positions, expected[:, 0, kept])
    assert delta == int(expected.max()) + 1 - len(ids)
