"""The efficiency harness on the models of transformers: each family in a tiny shape, and the sizes of the real ones."""

import json

import pytest
import torch
import transformers

from eval.efficiency import __main__ as harness
from eval.efficiency.config import Cell, load_harness
from eval.efficiency.flops import DecoderShape
from eval.efficiency.hf_prompts import layout, pixel_arguments, prompt_ids
from eval.efficiency.hf_shapes import SHAPES, hf_config
from eval.efficiency.models import load_subject
from llava.errors import ConfigError, UserError
from llava.hf.families import FAMILIES

MODEL_TYPES = [name for family in FAMILIES for name in family.model_types]

CONFIG = """\
name: small
model: {MODEL, device: cpu}
grid: {frames: [4], retention_ratios: [0.25], batch_sizes: [1]}
measurement: {runs: 1, warmup: 0, new_tokens: 3, prompt_tokens: 8, clip_width: 64, clip_height: 32, output_dir: OUT}
"""


@pytest.fixture
def write_config(tmp_path):
    def write(model):
        path = tmp_path / "small.yaml"
        path.write_text(CONFIG.replace("MODEL", model).replace("OUT", str(tmp_path / "results")))
        return path

    return write


def measured(config):
    assert harness.main([str(config)]) == 0
    return json.loads((config.parent / "results" / "small" / "result.json").read_text())["cells"]


def test_every_family_has_a_tiny_and_a_published_shape():
    kinds = [name.partition("-")[0] for name in SHAPES if not name.endswith("-tiny")]
    assert set(kinds) == set(MODEL_TYPES)
    assert {name.removesuffix("-tiny") for name in SHAPES if name.endswith("-tiny")} == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_stage_of_a_cell(write_config, kind):
    """Counts are those asked for, in the language model itself, and operations those of the formula."""
    loaded = load_harness(write_config(f"shape: {kind}-tiny"))
    subject = load_subject(loaded.model, loaded.measurement)
    pixels = torch.randint(256, (4, 32, 64, 3), dtype=torch.uint8)
    cells = [Cell(4, 2), Cell(4, 2, "scissor", 0.25)]
    before, after = (harness.measure_cell(subject, cell, pixels, loaded.measurement) for cell in cells)
    for cell, compressed in ((before, False), (after, True)):
        assert cell["status"] == "measured", cell["reason"]
        times = dict(cell["milliseconds"])
        assert times.pop("projector") is times.pop("further_question") is None
        assert (times.pop("compression")["median"] > 0) == compressed
        assert all(entry["median"] > 0 for entry in times.values())
        assert (cell["block"] is None) == compressed
        flops, shape = cell["prefill_flops"], DecoderShape.of(subject.decoder)
        surplus = flops["counted"] - flops["with_full_attention"]
        whole_prompt = 2 * 2 * (cell["tokens"]["prompt"] - 1) * shape.hidden * shape.vocabulary
        surplus -= whole_prompt * (kind == "video_llama_3")  # which makes logits of every position
        assert 0 <= surplus < 0.02 * flops["counted"]  # some make rotary angles by a matrix product
    source, kept = after["tokens"]["source"], after["tokens"]["kept"]
    assert kept == round(source / 4)
    assert before["tokens"]["kept"] == before["tokens"]["source"] == source
    assert before["tokens"]["prompt"] - after["tokens"]["prompt"] == source - kept
    assert before["kv_cache_bytes"] * after["tokens"]["prompt"] == after["kv_cache_bytes"] * before["tokens"]["prompt"]


def test_nothing_is_left_on_the_model(write_config):
    loaded = load_harness(write_config("shape: qwen2_5_vl-tiny"))
    subject = load_subject(loaded.model, loaded.measurement)
    before = {name: list(vars(module)) for name, module in subject.model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in subject.model.named_modules()}
    pixels = torch.randint(256, (4, 32, 64, 3), dtype=torch.uint8)
    for method in ("none", "scissor"):
        result = harness.measure_cell(subject, Cell(4, 1, method, 0.5), pixels, loaded.measurement)
        assert result["status"] == "measured"
    del before[""], before["model"]  # rope_deltas
    assert before == {name: list(vars(m)) for name, m in subject.model.named_modules() if name in before}
    assert hooks == {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in subject.model.named_modules()
    }


def test_a_checkpoint_of_transformers_is_taken_by_its_path(write_config, tmp_path):
    model = transformers.AutoModelForImageTextToText.from_config(hf_config("internvl-tiny"))
    model.save_pretrained(tmp_path / "checkpoint")
    config = write_config(f"path: {tmp_path / 'checkpoint'}")
    cells = measured(config)
    assert [cell["tokens"]["kept"] for cell in cells] == [16, 4]

    text = (config.parent / "results" / "small" / "result.md").read_text()
    assert "In a block that keeps everything the first token comes after" in text
    assert text.count("4 frames, batch 1, scissor 25 %") == 3  # times, sizes, verdict


def test_patches_are_those_that_the_processor_makes():
    """Of each token its patches, one after the other, of each patch its channels, then its frames."""
    config = hf_config("qwen2_vl-tiny")
    frames = torch.randint(256, (4, 16, 24, 3), dtype=torch.uint8)
    arguments = pixel_arguments(config, frames, rows=2)
    assert arguments["video_grid_thw"].tolist() == [[2, 4, 6]] * 2
    patches = arguments["pixel_values_videos"].view(2, 2, 2, 3, 4, 3, 2, 4, 4)  # row, part, y, x, patch, channel ...
    second_token_of_second_part = patches[1, 1, 0, 1, 3]  # its patch on the right and below
    expected = frames[2:4, 4:8, 12:16].permute(3, 0, 1, 2) / 127.5 - 1
    torch.testing.assert_close(second_token_of_second_part, expected)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_prompts_hold_as_many_placeholders_as_the_model_makes_features(kind):
    config = hf_config(f"{kind}-tiny")
    video = layout(config, 3, 32, 64)
    ids = prompt_ids(config, video, words=8, seed=0)[0]
    placeholder = getattr(config, "video_token_id", None) or config.image_token_id
    assert int((ids == placeholder).sum()) == video.source
    assert int((ids < 120).sum()) >= 8


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llava_onevision-0.5b", 893_675_552),
        ("llava_onevision-7b", 8_030e6),
        ("llava_next_video-7b", 7_063e6),
        ("qwen2_vl-2b", 2_208_985_600),
        ("qwen2_vl-7b", 8_291_375_616),
        ("qwen2_5_vl-3b", 3_754_622_976),
        ("qwen2_5_vl-7b", 8_292_166_656),
        ("qwen3_vl-2b", 2_127_532_032),
        ("qwen3_vl-8b", 8_767_123_696),
        ("qwen3_vl_moe-30b", 31_070_754_032),
        ("internvl-1b", 938e6),
        ("internvl-8b", 7_94e7),
        ("video_llama_3-2b", 1_960e6),
        ("smolvlm-2.2b", 2_246_784_880),
    ],
)
def test_shapes_are_the_published_ones(shape, parameters):
    config = hf_config(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert DecoderShape.of(config.get_text_config()).layers == config.get_text_config().num_hidden_layers


def test_tokens_of_a_published_clip():
    """640 x 360 pixels: 23 x 13 tokens of 28 pixels for two frames, 20 x 11 of 32, 81 to a square of 384."""
    counts = {kind: layout(hf_config(kind), 8, 360, 640).source for kind in SHAPES if not kind.endswith("-tiny")}
    assert counts["qwen2_5_vl-3b"] == counts["qwen2_vl-2b"] == 4 * 23 * 13
    assert counts["qwen3_vl-2b"] == 4 * 20 * 11
    assert counts["smolvlm-2.2b"] == 8 * 81
    assert counts["internvl-1b"] == 8 * 256
    assert counts["llava_onevision-0.5b"] == 8 * 196 + 1


def test_an_unknown_shape_is_named(write_config):
    with pytest.raises(ConfigError, match="did you mean 'qwen2_5_vl-3b'"):
        load_harness(write_config("shape: qwen2_5_vl_3b"))


def test_a_path_that_is_none_has_our_own_message(write_config):
    loaded = load_harness(write_config("path: no/such/folder/here"))
    with pytest.raises(UserError, match="no/such/folder/here"):
        load_subject(loaded.model, loaded.measurement)
