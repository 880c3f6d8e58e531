"""Further questions about what has been watched: the same answers, without anything that comes before the question."""

import threading

import pytest
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava.assets import tiny_model_path
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.pipeline import VideoQA
from llava.token_compression import CompressionConfig, compression

DEMO = tiny_model_path().parent / "demo.mp4"
QUESTIONS = (
    "What color is the square?",
    "How many objects are there in total?",
    "At the end, where is the cross?",
    "What color is the square?",
)
SETTINGS = [
    None,
    CompressionConfig(retention_ratio=0.25),
    CompressionConfig(retention_ratio=0.25, position_ids="source"),
    CompressionConfig(similarity_threshold=0.9),
]


@pytest.fixture(scope="module")
def qa():
    return VideoQA.from_pretrained(device="cpu")


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_those_without_it_however_many_came_before(qa, setting):
    watched = qa.watch(DEMO, compression=setting)
    for question in QUESTIONS:
        answer, expected = watched.ask(question), qa.ask(DEMO, question, compression=setting)
        assert answer.text == expected.text
        assert (answer.source_tokens, answer.kept_tokens) == (expected.source_tokens, expected.kept_tokens)
        assert answer.frames == expected.frames == 8


def test_only_the_question_is_read_again(qa):
    watched = qa.watch(DEMO)
    assert set(watched.milliseconds) == {
        "decode_video",
        "preprocess",
        "vision_tower",
        "projector",
        "compression",
        "prefill",
    }
    assert set(watched.ask(QUESTIONS[0]).milliseconds) <= {"preprocess", "prefill", "decode"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_those_of_the_whole_prompt(qa, setting):
    inputs = qa.prepare(QUESTIONS[1], [DEMO, Image.new("RGB", (60, 40), "red")])
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    with compression(qa.model, qa.compression(setting)):
        prefix = qa.model.read_prefix(inputs.input_ids, **inputs.arguments())
        expected = qa.model.generate(inputs.input_ids, **inputs.arguments(), **options)
    actual = qa.model.generate(inputs.input_ids, prefix=prefix, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for step, other in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, other, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    ],
)
def test_several_continuations_of_one_prefix(qa, options):
    inputs = qa.prepare(QUESTIONS[0], DEMO)
    prefix = qa.model.read_prefix(inputs.input_ids, **inputs.arguments())
    for _ in range(2):
        torch.manual_seed(0)
        actual = qa.model.generate(inputs.input_ids, prefix=prefix, max_new_tokens=4, **options)
        torch.manual_seed(0)
        expected = qa.model.generate(inputs.input_ids, **inputs.arguments(), max_new_tokens=4, **options)
        assert torch.equal(actual, expected)
        assert prefix.cache.get_seq_length() == prefix.length


def test_streaming(qa, capsys):
    watched = qa.watch(DEMO)
    text = watched.ask(QUESTIONS[0], streamer=TextStreamer(qa.tokenizer, skip_special_tokens=True)).text
    assert capsys.readouterr().out.strip() == text


class Fails(StoppingCriteria):
    """Something that goes wrong in the middle of an answer."""

    def __call__(self, input_ids, scores, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_answer_leaves_nothing_behind(qa):
    watched = qa.watch(DEMO)
    before = watched.ask(QUESTIONS[0]).text
    with pytest.raises(KeyboardInterrupt):
        watched.ask(QUESTIONS[1], stopping_criteria=StoppingCriteriaList([Fails()]))
    assert watched._prefix.cache.get_seq_length() == watched._prefix.length
    assert watched.ask(QUESTIONS[0]).text == before


def test_two_threads_may_ask_at_the_same_time(qa):
    watched, answers = qa.watch(DEMO), {}

    def ask(question):
        answers[question] = [watched.ask(question).text for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in QUESTIONS[:3]:
        assert answers[question] == [qa.ask(DEMO, question).text] * 5


def test_what_cannot_go_on_from_a_prefix_is_refused(qa):
    inputs = qa.prepare(QUESTIONS[0], DEMO)
    prefix = qa.model.read_prefix(inputs.input_ids, **inputs.arguments())
    ids = inputs.input_ids
    other = ids.clone()
    other[0, 0] += 1
    end = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero()) + 1
    for wrong in (other, ids[:, :end], ids[:, :2]):
        with pytest.raises(UserError, match="does not begin with the prefix"):
            qa.model.generate(wrong, prefix=prefix)
    with pytest.raises(UserError, match="single one, without padding"):
        qa.model.generate(ids.repeat(2, 1), prefix=prefix)
    with pytest.raises(UserError, match="single one, without padding"):
        qa.model.generate(ids, attention_mask=torch.zeros_like(ids), prefix=prefix)
    with pytest.raises(UserError, match="not both"):
        qa.model.generate(ids, **inputs.arguments(), prefix=prefix)
    with pytest.raises(UserError, match="a single prompt with an image"):
        qa.model.read_prefix(ids[:, :2], images=[])
    with pytest.raises(UserError, match="1 <image> placeholders but 2 images"):
        qa.model.read_prefix(ids, images=inputs.arguments()["images"] * 2, modalities="video")
    with pytest.raises(UserError, match="nothing to watch"):
        qa.watch([])
    with pytest.raises(UserError, match="has no place"):
        qa.watch(DEMO).ask("What is in <image>?")


def test_a_prefix_that_leaves_no_room_is_refused(qa):
    inputs = qa.prepare(QUESTIONS[0], DEMO)
    limit = qa.model.config.tokenizer_model_max_length
    qa.model.config.tokenizer_model_max_length = 100
    try:
        prefix = qa.model.read_prefix(inputs.input_ids, **inputs.arguments())
        with pytest.raises(UserError, match="fills the 100 positions"):
            qa.model.generate(inputs.input_ids, prefix=prefix)
    finally:
        qa.model.config.tokenizer_model_max_length = limit
