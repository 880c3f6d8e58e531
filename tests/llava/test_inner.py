"""Methods that prune inside the language model: the same tokens with and without a cache, in batches, with beams."""

import pytest
import torch
from accelerate import dispatch_model
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.assets import tiny_model_path
from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import ConfigError, UserError
from llava.instrument import record
from llava.model.device_map import VISUAL
from llava.pipeline import VideoQA
from llava.serving import video_tokens
from llava.token_compression import CompressionConfig, StreamingCompressor, compress, compression, list_methods
from llava.token_compression.registry import get_method

LAYERS = 4
PROMPT = torch.tensor([[5, 6, IMAGE, 7, 8, 9]])
GREEDY = {"modalities": "video", "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
OUTPUT = {"return_dict_in_generate": True, "output_logits": True}
METHODS = [name for name in list_methods() if get_method(name).before is not None]
VARIANTS = [
    ("dycoke", {"layer": 1, "similar": 2.0}),
    ("dycoke", {"layer": 3, "similar": 0.5, "unchanged": "last"}),
    ("holitom_inner", {"layer": 3, "halving": False}),
]
SETTINGS = [
    CompressionConfig(method=name, retention_ratio=0.4, options=options)
    for name, options in [*((name, None) for name in METHODS), *VARIANTS]
]
SOURCE = [CompressionConfig(method=name, retention_ratio=0.4, position_ids="source") for name in METHODS]


def name_of(config):
    changed = [
        f"{key}={value}"
        for name, options in VARIANTS
        if name == config.method
        for key, value in options.items()
        if getattr(config.options, key) == value
    ]
    return "-".join([config.method, config.position_ids or "contiguous", *changed])


@pytest.fixture
def model(make_llava):
    return make_llava(num_hidden_layers=LAYERS)


def logits_of(output):
    return torch.stack(output.logits, dim=1)  # (rows, new tokens, vocabulary)


def lengths(cache):
    return [layer.get_seq_length() for layer in cache.layers]


@torch.no_grad()
def fastv_by_hand(model, prompt, images, layer, count):
    """Logits at the end of the prompt: whole maps of attention, and the model's own layers one by one."""
    model.set_attn_implementation("eager")
    embeds = model.prepare_inputs_labels_for_multimodal(prompt, None, None, None, None, images, "video")[4]
    length, start = embeds.shape[1], 2
    tokens = images[0].shape[0] * 4
    output = model.model(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True)
    scores = output.attentions[layer - 1][0].mean(0)[-1, start : start + tokens]
    chosen = start + scores.topk(count).indices
    kept = torch.cat([torch.arange(start), chosen, torch.arange(start + tokens, length)]).sort().values
    hidden = output.hidden_states[layer][:, kept]
    rotary = model.model.rotary_emb(hidden, kept[None])
    mask = torch.full((len(kept), len(kept)), -torch.inf).triu(1)[None, None]
    for block in model.model.layers[layer:]:
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))[0, -1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_fastv_is_what_whole_maps_of_attention_give(model, make_video, layer, implementation):
    expected = fastv_by_hand(model, PROMPT, [make_video(6)], layer, 7)
    model.set_attn_implementation(implementation)
    with compression(model, method="fastv", retained_tokens=7, options={"layer": layer}):
        logits = model(PROMPT, images=[make_video(6)], modalities="video").logits
    torch.testing.assert_close(logits[0, -1], expected, **CLOSE)


@torch.no_grad()
def dycoke_by_hand(model, prompt, answer, images, config):
    """Logits of each step: whole maps of attention, and the model's own layers one by one under a mask."""
    model.set_attn_implementation("eager")
    options = config.options
    before = CompressionConfig(method="dycoke_ttm", retention_ratio=config.retention_ratio)
    with compression(model, before):
        embeds = model.prepare_inputs_labels_for_multimodal(prompt, None, None, None, None, images, "video")[4]
    read, new = embeds.shape[1], answer.shape[1] - 1
    embeds = torch.cat([embeds, model.model.embed_tokens(answer[:, :new])], dim=1)
    output = model.model(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True)
    video = torch.arange(2, read - 4)  # two tokens before; a newline and three after
    mask = torch.full((read + new, read + new), -torch.inf).triu(1)
    last, seen = None, None
    for place in range(read, read + new):
        row = output.attentions[options.layer - 1][0].mean(0)[place, video]
        if last is None or torch.cosine_similarity(row, last, dim=0) < options.similar:
            seen = video[row.topk(int(len(video) * 3 / 10)).indices].tolist()
        elif options.unchanged == "all":
            seen = video.tolist()
        last = row
        mask[place, [token for token in video.tolist() if token not in seen]] = -torch.inf
    rotary = model.model.rotary_emb(embeds, torch.arange(read + new)[None])
    hidden = output.hidden_states[options.layer]
    for block in model.model.layers[options.layer :]:
        hidden = block(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))[:, read - 1 :]


@pytest.mark.parametrize("similar", [-2.0, 0.97, 2.0])
@pytest.mark.parametrize("unchanged", ["all", "last"])
def test_dycoke_is_what_whole_maps_of_attention_give(model, make_video, similar, unchanged):
    options = {"layer": 2, "similar": similar, "unchanged": unchanged}
    config = CompressionConfig(method="dycoke", retention_ratio=0.6, options=options)
    with compression(model, config):
        output = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
    expected = dycoke_by_hand(model, PROMPT, output.sequences, [make_video(6)], config)
    torch.testing.assert_close(logits_of(output), expected, **CLOSE)
    with compression(model, method="dycoke_ttm", retention_ratio=0.6):
        plain = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
    torch.testing.assert_close(logits_of(output)[:, 0], logits_of(plain)[:, 0], **CLOSE)  # the prompt is read in full
    assert (logits_of(output)[:, 1] - logits_of(plain)[:, 1]).abs().max() > 1e-3


def test_dycoke_without_pruning_is_its_first_part(model, make_video):
    logits = []
    for name, options in (("dycoke", {"pruned_share": 0.0}), ("dycoke_ttm", None)):
        with compression(model, method=name, retention_ratio=0.6, options=options):
            logits.append(logits_of(model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)))
    assert torch.equal(*logits)


def test_dycoke_counts_its_prompt_in_full(model, make_video):
    with compression(model, method="dycoke", retained_tokens=15), record() as recorder:
        output = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
    (stats,) = recorder.compressions
    assert (stats.kept_tokens, stats.average_tokens, stats.layer) == (15, 15, None)
    assert len(set(lengths(output.past_key_values))) == 1


@pytest.mark.parametrize("config", SETTINGS + SOURCE, ids=name_of)
def test_cached_generation_equals_recomputing_everything(model, make_video, config):
    with compression(model, config), torch.no_grad():
        cached = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
        without = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT, use_cache=False)
        ids = torch.cat([PROMPT, cached.sequences], dim=1)
        whole = [
            model(ids[:, : PROMPT.shape[1] + new], images=[make_video(6)], modalities="video", continuation=new).logits
            for new in range(GREEDY["max_new_tokens"])
        ]
    torch.testing.assert_close(logits_of(cached), logits_of(without), **CLOSE)
    torch.testing.assert_close(logits_of(cached), torch.stack([logits[:, -1] for logits in whole], dim=1), **CLOSE)


@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
def test_kernels_of_attention_agree(model, make_video, config):
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with compression(model, config):
            logits.append(logits_of(model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)))
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", SETTINGS + SOURCE, ids=name_of)
def test_batch_equals_single_rows(model, make_video, config, implementation):
    """Videos of different lengths, padding, and a row of text."""
    model.set_attn_implementation(implementation)
    videos = [make_video(3), make_video(7, seed=1)]
    prompts = [torch.tensor([[5, IMAGE, 7]]), torch.tensor([[5, 6, IMAGE, 7, 8, 9]]), torch.tensor([[5, 6, 7, 8]])]
    ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - prompt.shape[1] :] = prompt
        mask[row, 6 - prompt.shape[1] :] = 1
    with compression(model, config):
        together = model.generate(ids, images=videos, attention_mask=mask, **GREEDY, **OUTPUT)
        alone = [
            model.generate(prompt, images=images, **GREEDY, **OUTPUT)
            for prompt, images in zip(prompts, [videos[:1], videos[1:], None], strict=True)
        ]
    torch.testing.assert_close(logits_of(together), torch.cat([logits_of(output) for output in alone]), **CLOSE)


@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
def test_right_padded_prompts_go_by_their_last_token(model, make_video, config):
    videos = [make_video(3), make_video(7, seed=1)]
    ids = torch.tensor([[5, IMAGE, 7, 0, 0], [5, 6, IMAGE, 7, 8]])
    with compression(model, config), torch.no_grad():
        together = model(ids, attention_mask=(ids != 0).long(), images=videos, modalities="video").logits
        alone = model(ids[:1, :3], images=videos[:1], modalities="video").logits
    text = together.shape[1] - alone.shape[1]
    end = (together[0] - alone[0, -1]).abs().amax(dim=-1)  # somewhere in the row, before its padding
    assert text > 0
    assert end.min() < 1e-4


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
def test_beams_are_those_without_a_cache(model, make_video, config, arguments):
    ids = torch.tensor([[5, 6, IMAGE, 7], [5, 8, IMAGE, 7]])
    images = [make_video(3), make_video(7, seed=1)]
    with compression(model, config):
        cached, without = (
            model.generate(ids, images=images, **GREEDY, **arguments, use_cache=cache, **OUTPUT, output_scores=True)
            for cache in (True, False)
        )
    assert torch.equal(cached.sequences, without.sequences)
    torch.testing.assert_close(cached.sequences_scores, without.sequences_scores, **CLOSE)


def test_exactly_so_many_tokens_are_in_each_cache(model, make_video):
    text = PROMPT.shape[1] - 1 + 1 + GREEDY["max_new_tokens"] - 1  # the newline; the last token is never read
    for kept in (1, 7, 23):
        with compression(model, method="fastv", retained_tokens=kept), record() as recorder:
            output = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
        assert lengths(output.past_key_values) == [text + 24] * 2 + [text + kept] * 2
        (stats,) = recorder.compressions
        assert (stats.source_tokens, stats.kept_tokens, stats.layer) == (24, 24, 2)
        assert (stats.final_tokens, stats.average_tokens) == (kept, (24 + kept) / 2)


def test_each_video_of_a_prompt_has_its_own_share(make_llava, make_video):
    model = make_llava(num_hidden_layers=LAYERS, mm_newline_position="frame")
    prompt = torch.tensor([[5, IMAGE, 6, IMAGE, 7]])
    with compression(model, method="fastv", retention_ratio=0.25), record() as recorder, torch.no_grad():
        cache = model(prompt, images=[make_video(2), make_video(6, seed=1)], modalities="video").past_key_values
    assert lengths(cache)[-1] == 3 + 8 + 2 + 6  # text, newlines of eight frames, a quarter of 8 and of 24
    assert [stats.average_tokens for stats in recorder.compressions] == [(8 + 2) / 2, (24 + 6) / 2]


def test_images_only_where_they_are_compressed(model, make_video):
    for images, left in ((False, 16), (True, 4)):
        with compression(model, method="fastv", retention_ratio=0.25, images=images), torch.no_grad():
            cache = model(PROMPT, images=[make_video(1)], modalities="image").past_key_values
        assert lengths(cache)[0] - lengths(cache)[-1] == 16 - left


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_retention_ratio_one_of_fastv_and_text_are_the_plain_model_bit_for_bit(model, make_video, name):
    text = torch.tensor([[5, 6, 7]])
    plain = model(PROMPT, images=[make_video(5)], modalities="video").logits, model(text).logits
    with compression(model, method=name, retention_ratio=1.0):
        assert torch.equal(model(text).logits, plain[1])
        if name == "fastv":
            assert torch.equal(model(PROMPT, images=[make_video(5)], modalities="video").logits, plain[0])


@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
@torch.no_grad()
def test_nothing_is_left_on_the_model(model, make_video, config, monkeypatch):
    plain = model(PROMPT, images=[make_video(5)], modalities="video").logits
    with compression(model, config):
        model.generate(PROMPT, images=[make_video(5)], **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[-1], "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(PROMPT, images=[make_video(5)], modalities="video")
    assert all(len(layer._forward_pre_hooks) == 0 for layer in model.model.layers)
    assert torch.equal(model(PROMPT, images=[make_video(5)], modalities="video").logits, plain)


@torch.no_grad()
def test_a_cache_goes_on_after_the_answer(model, make_video):
    """Several tokens at once, and outside of the block, are read as if all had come together."""
    more = torch.tensor([[11, 12, 13]])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with compression(model, method="fastv", retention_ratio=0.3):
            whole = model(
                torch.cat([PROMPT, more], dim=1), images=[make_video(6)], modalities="video", continuation=3
            ).logits
            cache = model(PROMPT, images=[make_video(6)], modalities="video", use_cache=True).past_key_values
        after = model(more, past_key_values=cache).logits
        torch.testing.assert_close(after, whole[:, -3:], **CLOSE)


@torch.no_grad()
def test_an_emptied_cache_is_used_again(model, make_video):
    plain = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY, **OUTPUT)
    with compression(model, method="fastv", retention_ratio=0.3):
        cache = model(PROMPT, images=[make_video(6)], modalities="video", use_cache=True).past_key_values
        cache.reset()
        if cache.get_seq_length() > 0:
            pytest.skip("this version of transformers fills a cache with zeros instead of emptying it")
        again = model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, **GREEDY, **OUTPUT)
    assert torch.equal(logits_of(again), logits_of(plain))


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
