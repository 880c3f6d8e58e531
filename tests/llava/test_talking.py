"""Answers piece by piece, and conversations of several turns."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from llava.assets import tiny_model_path
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.pipeline import VideoQA
from llava.token_compression import CompressionConfig, compression

DEMO = tiny_model_path().parent / "demo.mp4"
LONG = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def qa():
    return VideoQA.from_pretrained()


@pytest.fixture(scope="module")
def demo(qa):
    return qa.prepare("What color is the square?", DEMO)


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("ratio", [None, 0.25])
def test_an_iterator_gives_the_answer_in_pieces(qa, demo, skip_prompt, ratio):
    """The prompt is embeddings, so that there is none to skip."""
    streamer = TextIteratorStreamer(qa.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=60)
    config = CompressionConfig(method="none") if ratio is None else CompressionConfig(retention_ratio=ratio)
    with compression(qa.model, config):
        whole = qa.tokenizer.decode(
            qa.model.generate(demo.input_ids, **demo.arguments(), **LONG)[0], skip_special_tokens=True
        )
        arguments = {"inputs": demo.input_ids, **demo.arguments(), **LONG, "streamer": streamer}
        thread = threading.Thread(target=qa.model.generate, kwargs=arguments)
        thread.start()
        pieces = [piece for piece in streamer if piece]
        thread.join()
    assert "".join(pieces) == whole
    assert len(pieces) > 5  # LONG asks for more words than that


def test_a_streamer_prints_what_ask_returns(qa, capsys):
    streamer = TextStreamer(qa.tokenizer, skip_special_tokens=True)
    answer = qa.ask(DEMO, "What color is the square?", compression=CompressionConfig(retention_ratio=0.5))
    capsys.readouterr()
    streamed = qa.ask(
        DEMO, "What color is the square?", compression=CompressionConfig(retention_ratio=0.5), streamer=streamer
    )
    assert capsys.readouterr().out == answer.text + "\n" == streamed.text + "\n"


def test_a_second_question_follows_the_first_answer(qa, demo):
    conversation = conv_templates["qwen_1_5"].copy()
    questions = ["<image>\nWhat color is the square?", "How many objects are there?"]
    logits = []
    for question in questions:
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), qa.tokenizer, return_tensors="pt")[None]
        with torch.inference_mode():
            logits.append(qa.model(ids, **demo.arguments()).logits[0, -1])
        new = qa.model.generate(ids, **demo.arguments(), max_new_tokens=8)
        conversation.messages[-1][1] = qa.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    first, second = conversation.messages[1][1], conversation.messages[3][1]
    assert first == "orange"
    assert conversation.get_prompt() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat color is the square?<|im_end|>\n<|im_start|>assistant\norange<|im_end|>\n"
        f"<|im_start|>user\nHow many objects are there?<|im_end|>\n<|im_start|>assistant\n{second}<|im_end|>\n"
    )

    by_hand = conversation.get_prompt().removesuffix(f"{second}<|im_end|>\n")
    assert torch.equal(ids[0], tokenizer_image_token(by_hand, qa.tokenizer, return_tensors="pt"))
    forgetful = by_hand.replace("orange", "")
    ids = tokenizer_image_token(forgetful, qa.tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        assert not torch.allclose(qa.model(ids, **demo.arguments()).logits[0, -1], logits[1], atol=1e-3)


@pytest.mark.parametrize("template", sorted(conv_templates))
def test_every_template_keeps_earlier_turns(template):
    conversation = conv_templates[template].copy()
    for message in ("first question", "first answer", "second question", None):
        conversation.append_message(conversation.roles[len(conversation.messages) % 2], message)
    prompt = conversation.get_prompt()
    places = [prompt.index(text) for text in ("first question", "first answer", "second question")]
    assert places == sorted(places)
    earlier = conv_templates[template].copy()
    earlier.messages = conversation.messages[:2]
    assert prompt.startswith(earlier.get_prompt())
    assert not conv_templates[template].messages
