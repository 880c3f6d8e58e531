"""DyCoke's second part, token by token, against a plain one."""

import pytest
import torch
from inner_cases import CLOSE, GREEDY, LAYERS, OUTPUT, PROMPT, lengths, logits_of

from llava.instrument import record
from llava.token_compression import CompressionConfig, compression


@pytest.fixture
def model(make_llava):
    return make_llava(num_hidden_layers=LAYERS)


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
