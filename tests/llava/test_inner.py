"""Methods that prune inside the language model: the same tokens with and without a cache, in batches, with beams."""

import pytest
import torch
from inner_cases import CLOSE, GREEDY, LAYERS, METHODS, OUTPUT, PROMPT, SETTINGS, SOURCE, lengths, logits_of, name_of

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.instrument import record
from llava.token_compression import compression


@pytest.fixture
def model(make_llava):
    return make_llava(num_hidden_layers=LAYERS)


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
def recomputed(model, prompt, answer, images):
    """Logits (1, tokens of the answer, vocabulary) of one pass over prompt and answer, without a cache."""
    ids, new = torch.cat([prompt, answer[:, :-1]], dim=1), answer.shape[1] - 1
    return model(ids, images=images, modalities="video", continuation=new).logits[:, -new - 1 :]


@pytest.mark.parametrize("config", SETTINGS + SOURCE, ids=name_of)
def test_cached_generation_equals_recomputing_everything(model, make_video, config):
    """In one pass, and with one pass for each new token."""
    with compression(model, config):
        cached = model.generate(PROMPT, images=[make_video(6)], **GREEDY, **OUTPUT)
        tokens = cached.sequences
        whole = recomputed(model, PROMPT, tokens, [make_video(6)])
        steps = [
            recomputed(model, PROMPT, tokens[:, : new + 1], [make_video(6)])[:, -1] for new in range(len(tokens[0]))
        ]
    torch.testing.assert_close(logits_of(cached), whole, **CLOSE)
    torch.testing.assert_close(logits_of(cached), torch.stack(steps, dim=1), **CLOSE)


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


@pytest.mark.parametrize("config", SETTINGS, ids=name_of)
def test_scores_of_beams_are_those_without_a_cache(model, make_video, config):
    """What the cache and the masks hold goes on with its beam."""
    prompts = torch.tensor([[5, 6, IMAGE, 7], [5, 8, IMAGE, 7]])
    images = [make_video(3), make_video(7, seed=1)]
    arguments = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    with compression(model, config):
        found = model.generate(prompts, images=images, **arguments, **OUTPUT, output_scores=True)
        for row, (tokens, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
            own = slice(row // 3, row // 3 + 1)
            logits = recomputed(model, prompts[own], tokens[None], images[own])
            expected = logits[0].log_softmax(-1).gather(1, tokens[:, None]).sum()
            torch.testing.assert_close(score, expected, **CLOSE)
    assert len(found.sequences.unique(dim=0)) > 2


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


@torch.no_grad()
def test_a_prompt_that_ends_in_its_video(make_llava, make_video):
    model = make_llava(num_hidden_layers=LAYERS, mm_newline_position="no_token", tokenizer_model_max_length=20)
    for frames, read in ((4, 17), (6, 20)):  # the second one is cut
        with compression(model, method="fastv", retention_ratio=0.25):
            cache = model(PROMPT[:, 1:3], images=[make_video(frames)], modalities="video").past_key_values
        assert (lengths(cache)[0], lengths(cache)[-1]) == (read, 1 + round((read - 1) / 4))
