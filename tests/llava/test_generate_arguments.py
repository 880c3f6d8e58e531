"""transformers' generation arguments: beams, sampling, several answers, stopping, scores; in batches of any prompts."""

import pytest
import torch
import transformers
from packaging.version import Version

from llava.assets import tiny_model_path
from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.mm_utils import KeywordsStoppingCriteria
from llava.pipeline import VideoQA
from llava.token_compression import compression

STEPS = 6
ARGUMENTS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
POSITIONS = pytest.mark.parametrize("position_ids", ["contiguous", "source"])


@pytest.fixture
def rows(make_video):
    """Prompts with a video, with nothing, with an image and a video, and with two videos: (ids, images, modalities)."""
    return [
        ([5, 6, IMAGE, 7, 8], [make_video(3)], ["video"]),
        ([5, 6, 7], [], []),
        ([IMAGE, 5, IMAGE, 9], [make_video(1, seed=5), make_video(2, seed=1)], ["image", "video"]),
        ([5, IMAGE, IMAGE, 7, 8, 9, 6], [make_video(4, seed=2), make_video(1, seed=3)], ["video", "video"]),
    ]


def generate(model, rows, **options):
    """The rows as one batch, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _, _ in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row, _, _ in rows], batch_first=True).long()
    items = [item for _, images, _ in rows for item in images]
    modalities = [modality for _, _, names in rows for modality in names]
    return model.generate(ids, images=items, modalities=modalities, attention_mask=mask, **ARGUMENTS | options)


def log_probability(model, row, answer):
    """Of the answer's tokens, from one forward pass over prompt and answer."""
    ids, images, modalities = row
    whole = torch.tensor([[*ids, *answer.tolist()]])
    logits = model(whole, images=images, modalities=modalities).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None]).sum()


@POSITIONS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_a_batch_answers_as_its_rows_alone(llava, rows, position_ids, options):
    with compression(llava, retention_ratio=0.4, images=True, position_ids=position_ids):
        together = generate(llava, rows, **options)
        alone = [generate(llava, [row], **options) for row in rows]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(answer.tolist()) for answer in together}) == len(rows) * options.get("num_return_sequences", 1)


@POSITIONS
@torch.no_grad()
def test_beams_are_scored_as_a_forward_pass_scores_them(llava, rows, position_ids):
    wanted = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    with compression(llava, retention_ratio=0.4, position_ids=position_ids):
        output = generate(llava, rows, **wanted, return_dict_in_generate=True, output_scores=True)
        greedy = generate(llava, rows)
        answers, scores = output.sequences.view(len(rows), 4, STEPS), output.sequences_scores.view(len(rows), 4)
        for row, beams, beam_scores, first in zip(rows, answers, scores, greedy, strict=True):
            expected = torch.stack([log_probability(llava, row, beam) for beam in beams])
            torch.testing.assert_close(beam_scores, expected, atol=1e-4, rtol=1e-4)
            assert (beam_scores.diff() <= 0).all()
            assert beam_scores[0] >= log_probability(llava, row, first) - 1e-4


@POSITIONS
@torch.no_grad()
def test_scores_are_those_of_a_forward_pass(llava, rows, position_ids):
    with compression(llava, retention_ratio=0.4, position_ids=position_ids):
        output = generate(llava, rows, return_dict_in_generate=True, output_scores=True, output_logits=True)
        chosen = torch.stack(output.logits, dim=1).log_softmax(-1).gather(2, output.sequences[..., None]).sum((1, 2))
        answers = zip(rows, output.sequences, strict=True)
        expected = torch.stack([log_probability(llava, row, answer) for row, answer in answers])
    torch.testing.assert_close(chosen, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.stack(output.scores, dim=1).argmax(-1), output.sequences)


@POSITIONS
@pytest.mark.parametrize("beams", [1, 3])
def test_several_samples_of_a_prompt_are_samples_of_its_copies(llava, rows, position_ids, beams):
    options = {"do_sample": True, "temperature": 3.0, "num_beams": beams}
    answers = {}
    with compression(llava, retention_ratio=0.4, position_ids=position_ids):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            several = generate(llava, rows[2:3], **options, num_return_sequences=3)
            assert several.shape == (3, STEPS)
            assert torch.equal(several, answers.setdefault(seed, several))
        if beams == 1:
            torch.manual_seed(0)
            assert torch.equal(generate(llava, rows[2:3] * 3, **options), answers[0])
    assert not torch.equal(answers[0], answers[1])
    assert len({tuple(answer.tolist()) for answer in answers[0]}) == 3


@POSITIONS
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}]
)
def test_other_ways_to_the_same_answer(llava, rows, position_ids, options):
    if "prompt_lookup_num_tokens" in options and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("transformers before 5.20 cannot look up prompts for a model without an end-of-text token")
    with compression(llava, retention_ratio=0.4, position_ids=position_ids):
        row = rows[:1] if "prompt_lookup_num_tokens" in options else rows
        assert torch.equal(generate(llava, row, **options), generate(llava, row))


@pytest.fixture(scope="module")
def qa():
    return VideoQA.from_pretrained()


@pytest.fixture(scope="module")
def demo(qa):
    """A question about the demo, which is answered "orange", as arguments of `generate`."""
    inputs = qa.prepare("What color is the square?", tiny_model_path().parent / "demo.mp4")
    return {"inputs": inputs.input_ids, **inputs.arguments(), "do_sample": False, "max_new_tokens": 12}


def text(qa, ids):
    return qa.tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_stopping_by_words(qa, demo, beams):
    """`min_new_tokens` has the model talk past the end of its turn. Among beams the best that ends so is the answer."""
    demo = {**demo, "num_beams": beams, "min_new_tokens": 12}
    long = qa.model.generate(**demo)
    assert long.shape == (1, 12)
    assert text(qa, long).startswith("orange no no")
    keyword = KeywordsStoppingCriteria(["no no"], qa.tokenizer, demo["inputs"])
    for stop in ({"stopping_criteria": [keyword]}, {"stop_strings": ["no no"], "tokenizer": qa.tokenizer}):
        answer = text(qa, qa.model.generate(**demo, **stop))
        assert answer.index("no no") == len(answer) - len("no no")
        assert answer == "orange no no" or beams > 1


def test_an_answer_ends_with_its_turn(qa, demo):
    assert qa.tokenizer.decode(qa.model.generate(**demo)[0]) == "orange<|im_end|>"
    several = qa.model.generate(**demo, num_beams=3, num_return_sequences=3)
    answers = qa.tokenizer.batch_decode(several, skip_special_tokens=True)
    assert answers[0] == "orange"
    assert len(set(answers)) == 3


def test_arguments_as_llava_hf_passes_them(qa, demo):
    """lmms-eval's `llava_hf` unpacks a dict and passes None for what does not apply."""
    inputs = {"input_ids": demo["inputs"], "attention_mask": torch.ones_like(demo["inputs"])}
    inputs |= {key: demo[key] for key in ("images", "image_sizes", "modalities")}
    end = qa.tokenizer.eos_token_id
    settings = {"do_sample": False, "temperature": None, "top_p": None, "num_beams": 1, "use_cache": True}
    new = qa.model.generate(**inputs, **settings, max_new_tokens=12, pad_token_id=end, eos_token_id=end)
    assert text(qa, new) == "orange"
    loss = qa.model(**inputs, labels=inputs["input_ids"].clamp(min=-100))["loss"]
    assert loss > 0
