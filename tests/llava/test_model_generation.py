"""Generation and forward pass of the model: caches, batches, positions, dtypes, stages."""

import warnings

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import UserError
from llava.instrument import record
from llava.mm_utils import KeywordsStoppingCriteria
from llava.token_compression import CompressionConfig, compression

PROMPT = torch.tensor([[5, 6, IMAGE, 7, 8, 9]])
GREEDY = {"modalities": "video", "do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def by_recomputing(model, prompt, videos, steps):
    """Greedy tokens without a cache: one full forward pass per token, on the ids grown so far."""
    ids = prompt.clone()
    for _ in range(steps):
        logits = model(ids, images=videos, modalities="video").logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize("position_ids", ["contiguous", "source"])
@torch.no_grad()
def test_cached_generation_equals_recomputing_everything(llava, make_video, position_ids):
    with compression(llava, retention_ratio=0.3, position_ids=position_ids):
        cached = llava.generate(PROMPT, images=[make_video(6)], **GREEDY)
        assert torch.equal(cached, by_recomputing(llava, PROMPT, [make_video(6)], steps=8))


@torch.no_grad()
def test_source_positions_change_the_answer(llava, make_video):
    """The test above would pass if "source" did nothing."""
    logits = []
    for position_ids in ("contiguous", "source"):
        with compression(llava, retention_ratio=0.3, position_ids=position_ids):
            logits.append(llava(PROMPT, images=[make_video(6)], modalities="video").logits)
    assert (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("newline", ["one_token", "frame", "grid", "no_token"])
def test_source_positions_are_those_of_the_uncompressed_prompt(make_llava, make_video, newline):
    model = make_llava(mm_newline_position=newline)
    frames = [make_video(6)]
    args = (PROMPT, None, None, None, None, frames, "video")
    full = model.prepare_inputs_labels_for_multimodal(*args)[4][0]
    with compression(model, method="uniform", retention_ratio=0.3, merge=False, position_ids="source"):
        _, positions, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(*args)
    assert len(embeds[0]) < len(full)
    assert (positions[0].diff() > 0).all()
    assert positions[0, -1] == len(full) - 1  # the text continues after the uncompressed video
    torch.testing.assert_close(embeds[0], full[positions[0]])  # an unmerged token is where it was


@pytest.mark.parametrize("position_ids", ["contiguous", "source"])
@pytest.mark.parametrize("newline", ["one_token", "frame", "grid", "no_token"])
@torch.no_grad()
def test_retention_ratio_one_is_the_uncompressed_model_bit_for_bit(make_llava, make_video, newline, position_ids):
    model = make_llava(mm_newline_position=newline)
    plain = model(PROMPT, images=[make_video(5)], modalities="video").logits
    with compression(model, retention_ratio=1.0, position_ids=position_ids):
        assert torch.equal(model(PROMPT, images=[make_video(5)], modalities="video").logits, plain)


@torch.no_grad()
def test_compression_ends_with_its_block_also_after_an_error(llava, make_video):
    plain = llava(PROMPT, images=[make_video(5)], modalities="video").logits
    with compression(llava, retention_ratio=0.2):
        assert llava(PROMPT, images=[make_video(5)], modalities="video").logits.shape != plain.shape
    assert torch.equal(llava(PROMPT, images=[make_video(5)], modalities="video").logits, plain)
    with pytest.raises(UserError), compression(llava, retention_ratio=0.2):
        llava(PROMPT, images=[], modalities="video")
    assert torch.equal(llava(PROMPT, images=[make_video(5)], modalities="video").logits, plain)


@pytest.mark.parametrize("kept", [1, 7, 24])
def test_exactly_the_kept_tokens_enter_the_prompt(llava, make_video, kept):
    with compression(llava, retained_tokens=kept):
        embeds = llava.prepare_inputs_labels_for_multimodal(PROMPT, None, None, None, None, [make_video(6)], "video")[4]
    text, newline = PROMPT.shape[1] - 1, 1
    assert embeds.shape[1] == text + kept + newline


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [None, CompressionConfig(retention_ratio=0.4)])
def test_batch_equals_single_rows(llava, make_video, side, config):
    """The published code generates from right-padded rows as if the padding were part of the prompt."""
    llava.config.tokenizer_padding_side = side
    llava.token_compression = config
    videos = [make_video(2), make_video(7, seed=1)]
    prompts = [torch.tensor([[5, IMAGE, 7]]), torch.tensor([[5, 6, IMAGE, 7, 8, 9]])]
    padding = torch.zeros(1, 3, dtype=torch.int64)
    short = [padding, prompts[0]] if side == "left" else [prompts[0], padding]
    ids = torch.cat([torch.cat(short, dim=1), prompts[1]])
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(3, 6)] = 0

    together = llava.generate(ids, images=videos, attention_mask=mask, **GREEDY)
    alone = [llava.generate(ids, images=[item], **GREEDY) for ids, item in zip(prompts, videos, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


def test_a_text_row_beside_a_video_row(llava, make_video):
    ids = torch.tensor([[5, 6, IMAGE, 7], [5, 6, 8, 7]])
    together = llava.generate(ids, images=[make_video(3)], **GREEDY)
    with_dummy = llava.generate(
        ids, images=[make_video(3), make_video(1)], **{**GREEDY, "modalities": ["video", "text"]}
    )
    text_alone = llava.generate(ids[1:], **{**GREEDY, "modalities": ["text"]})
    assert torch.equal(together, with_dummy)
    assert torch.equal(together[1:], text_alone)


def test_beams_sampling_and_stopping_go_through_transformers(llava, make_video):
    arguments = {**GREEDY, "images": [make_video(3)]}
    greedy = llava.generate(PROMPT, **arguments)
    assert llava.generate(PROMPT, **{**arguments, "num_beams": 3}).shape[0] == 1
    torch.manual_seed(0)
    assert not torch.equal(llava.generate(PROMPT, **{**arguments, "do_sample": True, "temperature": 5.0}), greedy)

    class Words:
        """Decodes each id to itself."""

        def batch_decode(self, rows, **_):
            return [" ".join(f"<{token}>" for token in row.tolist()) for row in rows]

    stop = KeywordsStoppingCriteria([f"<{greedy[0, 3]}>"], Words(), PROMPT)
    assert llava.generate(PROMPT, **arguments, stopping_criteria=[stop]).shape[1] <= 4


def test_greedy_runs_warn_about_nothing(llava, make_video, caplog):
    llava.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, pad_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llava.generate(
            PROMPT, images=[make_video(2)], modalities="video", do_sample=False, temperature=0, max_new_tokens=2
        )
        llava.generate(PROMPT, images=[make_video(2)], modalities="video", temperature=0, max_new_tokens=2)
    assert caplog.records == []
    assert llava.generation_config.temperature == 0.7  # the model's own settings stay


def test_a_callers_own_generation_config_is_obeyed(llava, make_video):
    arguments = {"images": [make_video(3)], "modalities": "video"}
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    config.suppress_tokens = llava.generate(PROMPT, **arguments, generation_config=config)[0].tolist()
    answer = llava.generate(PROMPT, **arguments, generation_config=config)
    assert answer.shape == (1, 5)
    assert not set(answer[0].tolist()) & set(config.suppress_tokens)


def test_transformers_own_generate_continues_text(llava):
    """As tools call it that know nothing of images."""
    text = torch.tensor([[5, 6, 7, 8]])
    arguments = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    answer = GenerationMixin.generate(llava, text, **arguments)
    assert torch.equal(answer[:, 4:], llava.generate(text, **arguments))


def test_the_model_needs_ids_or_embeddings(llava):
    with pytest.raises(UserError, match="input_ids or inputs_embeds"):
        llava()


def test_generate_needs_token_ids(llava):
    with pytest.raises(UserError, match="token ids"):
        llava.generate(images=[])
    with pytest.raises(UserError, match="inputs_embeds"):
        llava.generate(PROMPT, inputs_embeds=torch.zeros(1, 2, 32))


@torch.no_grad()
def test_sdpa_and_eager_agree(llava, make_video):
    outputs = []
    for attention in ("sdpa", "eager"):
        llava.set_attn_implementation(attention)
        outputs.append(llava(PROMPT, images=[make_video(5)], modalities="video").logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_and_is_close(llava, make_video, dtype):
    exact = llava(PROMPT, images=[make_video(3)], modalities="video").logits
    half = llava.to(dtype)(PROMPT, images=[make_video(3)], modalities="video").logits
    assert half.dtype == dtype
    correlation = torch.corrcoef(torch.stack([half.float().flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.99
    with compression(llava, retention_ratio=0.5):
        assert llava.generate(PROMPT, images=[make_video(3)], **GREEDY).shape == (1, 8)


@torch.no_grad()
def test_four_dimensional_masks_and_position_ids_pass_through(llava):
    embeds = torch.randn(2, 6, 32)
    causal = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    positions = torch.arange(6).expand(2, 6)
    plain = llava(inputs_embeds=embeds).logits
    torch.testing.assert_close(llava(inputs_embeds=embeds, attention_mask=causal, position_ids=positions).logits, plain)
    apart = llava(inputs_embeds=embeds, attention_mask=causal, position_ids=positions * 5).logits
    assert (apart - plain).abs().max() > 1e-3


def test_every_stage_is_recorded(llava, make_video):
    with record() as recorder, compression(llava, retention_ratio=0.5):
        llava.generate(PROMPT, images=[make_video(4)], **GREEDY)
    assert set(recorder.milliseconds) == {"vision_tower", "projector", "compression", "prefill", "decode"}
    assert [stats.kept_tokens for stats in recorder.compressions] == [8]


def test_logits_are_computed_for_the_last_position_of_a_prompt_alone(llava, make_video):
    lengths = []
    llava.lm_head.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    new = llava.generate(PROMPT, images=[make_video(4)], **GREEDY)
    assert lengths == [1] * new.shape[1]


@torch.no_grad()
def test_frames_go_through_the_tower_in_chunks(llava, make_video, monkeypatch):
    plain = llava.encode_frames(make_video(7))
    monkeypatch.setattr("llava.model.llava_arch.PATCHES_PER_CHUNK", 3 * 16 + 1)
    sizes = []
    llava.get_vision_tower().register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    torch.testing.assert_close(llava.encode_frames(make_video(7)), plain)
    assert sizes == [3, 3, 1]


def test_gradients_reach_tower_projector_and_newline(llava, make_video):
    labels = torch.where(PROMPT == IMAGE, -100, PROMPT)
    llava(PROMPT, labels=labels, images=[make_video(2)], modalities="video").loss.backward()
    for name in ("vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight", "mm_projector.0.weight"):
        assert llava.model.get_parameter(name).grad.abs().sum() > 0
    assert llava.model.image_newline.grad.abs().sum() > 0


def test_the_checkpoints_zip_keys_are_its_default_compression(make_llava, make_video):
    model = make_llava(mm_use_zip=True, mm_zip_tau=-1.0, mm_zip_epsilon=0.05)
    args = (PROMPT, None, None, None, None, [make_video(6)], "video")
    one_token = PROMPT.shape[1] - 1 + 1  # no newline in these checkpoints
    assert model.prepare_inputs_labels_for_multimodal(*args)[4].shape[1] == one_token
    with compression(model, CompressionConfig(method="none")):
        assert model.prepare_inputs_labels_for_multimodal(*args)[4].shape[1] == PROMPT.shape[1] - 1 + 6 * 4
    model.config.mm_use_zip = False
    model.config.mm_newline_position = "no_token"
    assert model.prepare_inputs_labels_for_multimodal(*args)[4].shape[1] == PROMPT.shape[1] - 1 + 6 * 4
