"""Packing: many questions in one sequence give each what it gets in a prompt of its own."""

import random

import pytest
import torch

from eval.measure_tiny import Measurement
from eval.muon import Muon, orthogonalise
from eval.questions import ask
from eval.tiny_data import END, HEAD, TURN, Packer
from eval.tiny_model import ATTENTION_BLOCK, SIZES, blocked_causal_attention, build_model
from eval.tiny_tokenizer import build_tokenizer
from eval.tiny_wordings import FIXED, FREE_WORDINGS, WORDINGS, Wording
from eval.world import Split, draw_scenes, seed_for

VIDEO_TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, 0, SIZES["tiny"]).eval()


def prompt(question, wording):
    """The text after the video, as lmms-eval's tasks and `llava-scissor ask` write it."""
    text = wording.prompt(question) if isinstance(wording, Wording) else question.text + wording
    return f"\n{text}{TURN}"


@torch.no_grad()
def test_a_packed_question_gets_the_logits_of_its_own_prompt(tokenizer, model):
    scenes = draw_scenes(2, seed_for(Split.DEV, 5, 0), min_objects=3)
    wordings = [*WORDINGS.values(), *FREE_WORDINGS]
    questions = [
        [
            (q, wordings[(row + number) % len(wordings)])
            for number, q in enumerate(
                q for q in ask(scenes, row, random.Random(0)) if q.kind not in ("exist", "absent")
            )
        ]
        for row in range(2)
    ]
    assert {len(pairs) for pairs in questions} != {max(map(len, questions))}  # one is padded
    batch = Packer(tokenizer, VIDEO_TOKENS).pack(questions)
    video = torch.randn(2, VIDEO_TOKENS, model.config.hidden_size) * 0.1
    embeds = model.get_input_embeddings()(batch.input_ids)
    embeds[:, batch.video] = video
    hidden = model.get_model()(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    answers = batch.weights == 1.0
    packed = model.lm_head(hidden[batch.target_rows, batch.target_columns])[answers]
    expected = []
    for row, pairs in enumerate(questions):
        for question, wording in pairs:
            texts = [tokenizer(text, return_tensors="pt").input_ids for text in (HEAD, prompt(question, wording))]
            head, tail = (model.get_input_embeddings()(ids) for ids in texts)
            alone = torch.cat([head, video[row : row + 1], tail], 1)
            expected.append(model(inputs_embeds=alone).logits[0, -1])
    assert torch.allclose(packed, torch.stack(expected), atol=1e-4)
    replies = [q.letter if isinstance(w, Wording) else q.free_text_answer for pairs in questions for q, w in pairs]
    assert batch.targets[answers].tolist() == [tokenizer(reply).input_ids[0] for reply in replies]


@pytest.mark.parametrize("wording", [*WORDINGS.values(), *FREE_WORDINGS])
def test_prompts_of_the_benchmarks_tokenize_as_packed(tokenizer, wording):
    """Encoding piece by piece equals encoding the whole prompt: no token spans two pieces."""
    scenes = draw_scenes(8, seed_for(Split.DEV, 5, 1))
    packer = Packer(tokenizer, VIDEO_TOKENS)
    for row in range(len(scenes)):
        for question in ask(scenes, row, random.Random(row)):
            with_options = isinstance(wording, Wording)
            reply = question.letter if with_options else question.free_text_answer
            if reply is None or (with_options and not question.options):
                continue
            batch = packer.pack([[(question, wording)]])
            whole = tokenizer(prompt(question, wording) + reply).input_ids
            assert batch.input_ids[0, batch.video.stop :].tolist() == whole


def test_tokenizer_reads_back_any_text_and_knows_its_words(tokenizer):
    for text in ("What color is the circle?", "Ünïcode, 42 dogs!\n\n  spaces", *FIXED, HEAD + TURN + END):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for word in ("red", " red", " triangle", "top-left", "A", "A.", "E.", " something", " else", *FIXED):
        assert len(tokenizer(word).input_ids) == 1


def test_blocked_attention_equals_masked_attention():
    length = 2 * ATTENTION_BLOCK + 5
    query, key, value = (torch.randn(2, 3, length, 8) for _ in range(3))
    mask = (torch.rand(2, 1, length, length) < 0.5).tril() | torch.eye(length, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    output, _ = blocked_causal_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-5)


def test_muon_orthogonalises_and_decreases_a_loss():
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 24)))
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    torch.manual_seed(0)
    target, weight = torch.randn(12, 8), torch.nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([weight], lr=0.1)
    losses = []
    for _ in range(40):
        loss = (weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_measurement_counts_by_kind():
    result = Measurement()
    for control, right in (("video", True), ("video", False), ("swapped", False), ("blank", False)):
        result.add(control, "color", "a video", right)
    rows = {(row["control"], row["kind"]): row for row in result.rows()}
    assert rows["video", "color"]["accuracy"] == 0.5
    assert rows["video", "all"]["asked"] == 2
    assert ("video", "all/free") not in rows
