"""Where pruning inside the language model works, and how it is refused where it does not."""

import dataclasses
import re

import pytest
import torch
from accelerate import dispatch_model
from inner_cases import CLOSE, GREEDY, LAYERS, METHODS, OUTPUT, PROMPT, SETTINGS, logits_of, name_of
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.assets import tiny_model_path
from llava.cli import main
from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import ConfigError, UserError
from llava.model.device_map import VISUAL
from llava.pipeline import VideoQA
from llava.serving import video_tokens
from llava.token_compression import CompressionConfig, StreamingCompressor, compress, compression
from llava.token_compression.registry import _methods, get_method


@pytest.fixture
def model(make_llava):
    return make_llava(num_hidden_layers=LAYERS)


def test_what_it_cannot_do_is_refused(model, make_video):
    arguments = {"images": [make_video(6)], "modalities": "video"}
    with compression(model, method="fastv", retention_ratio=0.3), torch.no_grad():
        with pytest.raises(UserError, match="static cache has no place for"):
            model(PROMPT, past_key_values=StaticCache(model.config, max_cache_len=64), **arguments)
        with pytest.raises(UserError, match="labels of dropped tokens"):
            model(PROMPT, labels=PROMPT, **arguments)
        with pytest.raises(UserError, match="in one piece"):
            model(PROMPT[:, :2], prompt_videos=torch.ones(1, 30, dtype=torch.int64))  # a first chunk
        with pytest.raises(ConfigError, match="cannot be read before the question"):
            model.read_prefix(PROMPT, **arguments)
        cache = model(PROMPT, use_cache=True, **arguments).past_key_values
        with pytest.raises(UserError, match="after others in a cache"):
            model(torch.tensor([[5, IMAGE, 6]]), past_key_values=cache, **arguments)
        cache.layers[0].crop(-1)  # as older versions of transformers cut to a length
        with pytest.raises(UserError, match="The cache was cut"):
            model(torch.tensor([[5]]), past_key_values=cache)
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(UserError, match="not with 'flex_attention'"):
            model(PROMPT, **arguments)


def test_watching_before_the_question_is_refused():
    qa = VideoQA.from_pretrained(device="cpu")
    with pytest.raises(ConfigError, match="use VideoQA"):
        qa.watch(
            tiny_model_path().parent / "demo.mp4", compression=CompressionConfig(method="fastv", retention_ratio=0.5)
        )


def test_answers_say_what_a_layer_saw(capsys):
    arguments = ["ask", str(tiny_model_path().parent / "demo.mp4"), "What is it?", "--device=cpu"]
    assert main([*arguments, "compression.retained_tokens=50", "compression.method=fastv"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"tokens after compression +200  \(100.0 %\)", output)
    assert re.search(r"tokens in a layer, on average +110.0  \(55.0 %\)", output)  # three of five layers see 50 of 200


def test_a_picture_of_it_is_refused(capsys, tmp_path):
    arguments = ["show", str(tiny_model_path().parent / "demo.mp4"), "--device=cpu", f"--out={tmp_path}"]
    assert main([*arguments, "compression.retained_tokens=50", "compression.method=fastv"]) == 2
    assert "prunes inside the language model" in capsys.readouterr().err


def test_a_prefix_read_before_is_refused(model, make_video):
    prefix = model.read_prefix(PROMPT, images=[make_video(3)], modalities="video")
    with (
        compression(model, method="fastv", retention_ratio=0.3),
        pytest.raises(ConfigError, match="cannot be read before the question"),
    ):
        model.generate(PROMPT, prefix=prefix, **GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retained_tokens": 25}, "input has only 24 tokens"),
        ({"retention_ratio": 0.5, "options": {"layer": LAYERS}}, "layer is 4, but the language model has only 4"),
    ],
)
def test_sizes_and_layers_that_there_are_not(model, make_video, settings, message):
    with compression(model, method="fastv", **settings), pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, images=[make_video(6)], **GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"layer": 0}}, "layer must be at least 1"),
        ({"merge": True}, "nothing to merge"),
        ({"options": {"depth": 2}}, "depth"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_dict({"method": "fastv", "retention_ratio": 0.5, **settings})


@pytest.mark.parametrize("name", METHODS)
def test_without_the_language_model_it_is_refused(name, make_llava, make_video):
    config = CompressionConfig(method=name, retention_ratio=0.5)
    with pytest.raises(ConfigError, match="prunes inside the language model"):
        compress(torch.ones(2, 4, 8), config)
    with pytest.raises(ConfigError, match="prunes inside the language model"):
        StreamingCompressor(config)
    with pytest.raises(ConfigError, match="prunes inside the language model"):
        video_tokens(make_llava().config, config, frames=4)
    with pytest.raises(ConfigError, match="prunes inside the language model"):
        make_llava().encode_video(make_video(2), config)
    transformers_model = Qwen2ForCausalLM(Qwen2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ConfigError, match="prunes inside the language model"), compression(transformers_model, config):
        pass


@pytest.mark.parametrize("method", ["fastv", "dycoke"])
def test_a_likelihood_is_that_of_generation(method):
    """What is left of the video does not depend on the answer that is scored."""
    qa = VideoQA.from_pretrained(device="cpu")
    clip, question = tiny_model_path().parent / "demo.mp4", "What color is the square?"
    with compression(qa.model, method=method, retained_tokens=20):
        inputs = qa.prepare(question, clip)
        output = qa.model.generate(inputs.input_ids, **inputs.arguments(), max_new_tokens=8, **OUTPUT)
        answer = qa.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
        loss, greedy = qa.score(question, answer, clip)
    assert greedy
    assert loss == pytest.approx(float(-logits_of(output).log_softmax(-1).amax(-1).mean()), rel=1e-4)


def flash_like(module, query, key, value, attention_mask, scaling, position_ids=None, **_):
    """As kernels of flash attention are called: masks of padding alone, and gaps in positions begin another text."""
    tokens, queries = key.shape[2], query.shape[2]
    if position_ids is not None:
        assert position_ids.shape[1] == queries
        assert queries == 1 or len(query) > 1 or (position_ids.diff() == 1).all()
    place = torch.arange(tokens)
    seen = (place <= place[tokens - queries :, None]).expand(len(query), 1, -1, -1)
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), tokens)
        seen = seen & attention_mask.bool()[:, None, None, :]
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return output.nan_to_num().transpose(1, 2), None  # rows that see nothing are left out by the kernels


@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
def test_kernels_that_take_masks_of_padding_alone(model, make_video, config, monkeypatch):
    name = "flash_attention_like"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_like)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_mask)
    videos = [make_video(3), make_video(7, seed=1)]
    ids, mask = torch.tensor([[0, 5, IMAGE, 7], [5, 6, IMAGE, 8]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    logits: list[list[torch.Tensor]] = []
    for implementation in (name, "sdpa"):
        model.config._attn_implementation = implementation
        with compression(model, config):
            together = model.generate(ids, images=videos, attention_mask=mask, **GREEDY, **OUTPUT)
            alone = model.generate(PROMPT, images=videos[:1], **GREEDY, **OUTPUT)
        logits.append([logits_of(together), logits_of(alone)])
    torch.testing.assert_close(*logits, **CLOSE)


@torch.no_grad()
def test_under_autocast_it_chooses_in_float32(model, make_video, monkeypatch):
    seen = []
    fastv = get_method("fastv")
    spy = dataclasses.replace(fastv, keep=lambda video, count: seen.append(video.attention) or fastv.keep(video, count))
    monkeypatch.setitem(_methods, "fastv", spy)
    for enabled in (True, False):
        with compression(model, method="fastv", retention_ratio=0.3), torch.autocast("cpu", torch.bfloat16, enabled):
            logits = model(PROMPT, images=[make_video(3)], modalities="video").logits
        assert logits.isfinite().all()
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], seen[1], atol=0.05, rtol=0)
    assert (seen[0].sum(dim=-1) < 1).all()  # the rest goes to the text


@pytest.mark.parametrize("method", ["fastv", "dycoke"])
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_layers_on_disk(model, make_video, tmp_path, method):
    arguments = {"images": [make_video(3)], **GREEDY, **OUTPUT}
    settings = {"method": method, "retention_ratio": 0.4, "options": {"layer": 1}}
    with compression(model, **settings):
        wanted = model.generate(PROMPT, **arguments)
    parts = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *VISUAL], "cpu")
    parts |= {f"model.layers.{index}": "cpu" if index % 2 else "disk" for index in range(LAYERS)}
    dispatched = dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path))
    with compression(dispatched, **settings):
        found = dispatched.generate(PROMPT, **arguments)
    torch.testing.assert_close(logits_of(found), logits_of(wanted))
