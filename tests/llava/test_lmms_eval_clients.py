"""lmms-eval's own LLaVA models, as they are installed, on top of this package.

They choose their device themselves: "cuda:<process>", unless `device_map` is "auto", when they take the argument
`device`. So `device_map="auto", device="cpu"` is all that is overridden on a CPU, nothing is patched, and on a GPU
(`-m gpu`) they run with the device that they choose.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")
pytest.importorskip("decord", reason="lmms-eval's LLaVA models read videos with decord")

from lmms_eval.api.instance import Instance
from lmms_eval.models.simple.llava import Llava
from lmms_eval.models.simple.llava_onevision import Llava_OneVision
from lmms_eval.models.simple.llava_vid import LlavaVid

from llava.assets import tiny_model_path
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.pipeline import VideoQA
from llava.token_compression import CompressionConfig, compression
from llava.video import VideoConfig

TINY = str(tiny_model_path())
GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "ckpt_a"
DEMO = str(tiny_model_path().parent / "demo.mp4")
QUESTIONS = ("What color is the square?", "How many objects are there?", "Which shape is shown?")
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n"]}

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [
    pytest.param({"device_map": "auto", "device": "cpu"}, id="cpu"),
    pytest.param({}, id="gpu", marks=[gpu, pytest.mark.gpu]),
]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    """The arguments that choose the device; none on a GPU."""
    if request.param and torch.cuda.is_available():
        pytest.skip('device_map="auto" takes the GPU where there is one')
    return request.param


@pytest.fixture(scope="module")
def onevision(device):
    return Llava_OneVision(pretrained=TINY, max_frames_num=8, **device)


@pytest.fixture(scope="module")
def onevision_golden(device):
    return Llava_OneVision(pretrained=str(GOLDEN), max_frames_num=4, **device)


@pytest.fixture(scope="module")
def images():
    """Two pictures of other shapes than a square."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 200, 300, 3), dtype=np.uint8)
    return [Image.fromarray(noise[0]), Image.fromarray(noise[1]).rotate(90, expand=True)]


def requests(kind, client, visuals, questions=QUESTIONS, second=GREEDY):
    """Requests as lmms-eval's tasks make them, one document for each question."""
    client.task_dict = {"task": {"test": {number: {"visuals": visuals} for number in range(len(questions))}}}
    return [
        Instance(
            kind,
            (question, copy.deepcopy(second), lambda document: document["visuals"], number, "task", "test"),
            0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number, question in enumerate(questions)
    ]


def as_video_qa(client, conv_template="qwen_1_5", **video):
    """Our own pipeline around the model that a client has loaded."""
    return VideoQA(
        client.model, client.tokenizer, client._image_processor, client.max_length, conv_template, VideoConfig(**video)
    )


def ask(qa, visuals, question, config=None):
    return qa.ask(visuals, question, compression=config, max_new_tokens=GREEDY["max_new_tokens"]).text


def generate(client, prompt, **arguments):
    ids = tokenizer_image_token(prompt, client.tokenizer, return_tensors="pt")[None].to(client.device)
    new = client.model.generate(ids, **arguments, do_sample=False, max_new_tokens=GREEDY["max_new_tokens"])
    return client.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def loss_by_hand(client, prompt, continuation, images, **arguments):
    """Mean negative log-likelihood of what follows the prompt, from the logits."""
    ids = tokenizer_image_token(prompt + continuation, client.tokenizer, return_tensors="pt")[None].to(client.device)
    target = ids[0, len(tokenizer_image_token(prompt, client.tokenizer)) :]
    with torch.inference_mode():
        logits = client.model(ids, images=images, **arguments).logits[0, -len(target) - 1 : -1]
    return float(cross_entropy(logits.float(), target))


def prompt_of(question, placeholders=1):
    conversation = conv_templates["qwen_1_5"].copy()
    text = " ".join(["<image>"] * placeholders) + "\n" + question
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def test_onevision_answers_questions_about_a_video_as_videoqa_does(onevision):
    answers = onevision.generate_until(requests("generate_until", onevision, [DEMO]))
    qa = as_video_qa(onevision, num_frames=8)
    assert answers == [ask(qa, DEMO, question) for question in QUESTIONS]
    assert answers[0] == "orange"  # what the README shows


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@golden
def test_onevision_on_the_recorded_checkpoint(onevision_golden, backend, monkeypatch):
    monkeypatch.setattr(onevision_golden, "video_decode_backend", backend)
    answers = onevision_golden.generate_until(requests("generate_until", onevision_golden, [DEMO]))
    qa = as_video_qa(onevision_golden, num_frames=4, decoder=backend)
    assert answers == [ask(qa, DEMO, question) for question in QUESTIONS]
    assert len(set(answers)) > 1


def test_onevision_under_compression(onevision):
    tenth = CompressionConfig(retention_ratio=0.1)
    with compression(onevision.model, tenth):
        answers = onevision.generate_until(requests("generate_until", onevision, [DEMO]))
    qa = as_video_qa(onevision, num_frames=8)
    assert answers == [ask(qa, DEMO, question, tenth) for question in QUESTIONS]


@golden
@pytest.mark.parametrize("count", [0, 1])
def test_onevision_answers_questions_about_an_image_or_none_as_videoqa_does(onevision_golden, images, count):
    """The image is cut into crops (anyres)."""
    visuals = images[:count]
    answers = onevision_golden.generate_until(requests("generate_until", onevision_golden, visuals))
    qa = as_video_qa(onevision_golden)
    assert answers == [ask(qa, visuals, question) for question in QUESTIONS]
    assert any(answers)


@golden
@pytest.mark.parametrize(("modality", "placeholders"), [("image", 4), ("video", 1)])
def test_onevision_takes_several_images_as_a_batch_or_as_a_video(onevision_golden, images, modality, placeholders):
    """They come padded, as one tensor: images without newlines, or frames where a task gives `sample_frames`."""
    client, visuals = onevision_golden, images * 2
    batch = requests("generate_until", client, visuals)
    if modality == "video":
        for instance in batch:
            instance.metadata |= {"task_type": "video", "sample_frames": 4}
    answers = client.generate_until(batch)
    pixels = process_images(visuals, client._image_processor, client.config).to(client.device, torch.float16)
    assert answers == [
        generate(client, prompt_of(question, placeholders), images=pixels, modalities=[modality] * placeholders)
        for question in QUESTIONS
    ]
    assert len(set(answers)) > 1


def test_onevision_goes_on_with_a_conversation_in_json(onevision):
    """Several turns come as one JSON list."""
    turns = [{"value": "<image>\nWhat color is the square?"}, {"value": "orange"}, {"value": QUESTIONS[1]}]
    (answer,) = onevision.generate_until(requests("generate_until", onevision, [DEMO], [json.dumps(turns)]))
    conversation = conv_templates["qwen_1_5"].copy()
    for index, turn in enumerate([*turns, {"value": None}]):
        conversation.append_message(conversation.roles[index % 2], turn["value"])
    video = {"images": [video_pixels(onevision, 8)], "modalities": "video"}
    assert answer == generate(onevision, conversation.get_prompt(), **video)


def test_onevision_plays_several_rounds(onevision):
    """A task's doc_to_text gives the next round's visuals and question from the answers so far."""
    rounds = []

    def next_round(document, previous_output, round_idx, previous_round_info):
        rounds.append((round_idx, list(previous_output)))
        return document["visuals"], QUESTIONS[round_idx % 3], round_idx == 3, previous_output, None

    (instance,) = requests("generate_until_multi_round", onevision, [DEMO], QUESTIONS[:1])
    question, options, doc_to_visual, *document = instance.arguments
    instance.arguments = (question, options | {"max_new_tokens": 8}, doc_to_visual, next_round, *document)
    (answers,) = onevision.generate_until_multi_round([instance])
    qa = as_video_qa(onevision, num_frames=8)
    assert list(answers) == [ask(qa, DEMO, question) for question in QUESTIONS]
    assert rounds == [(index, list(answers[:index])) for index in (1, 2, 3)]


@golden
def test_onevision_loglikelihood_is_the_loss_of_the_continuation(onevision_golden, images, monkeypatch):
    """With a visual, this version of lmms-eval reads an attribute `metadata` that none of its models has."""
    monkeypatch.setattr(onevision_golden, "metadata", {}, raising=False)
    client = onevision_golden
    client.config.image_aspect_ratio = "anyres_max_9"
    crops = process_images(images[:1], client._image_processor, client.config).to(client.device, torch.float16)
    cases = [
        (images[:1], {"images": crops, "image_sizes": [images[0].size]}),
        ([DEMO], {"images": [video_pixels(client, 4)], "modalities": ["video"]}),
        ([], {"images": None}),
    ]
    for visuals, arguments in cases:
        batch = requests("loglikelihood", client, visuals, QUESTIONS[:2], second="two red balls")
        for question, (loss, _) in zip(QUESTIONS, client.loglikelihood(batch), strict=False):
            prompt = prompt_of(question) if visuals else prompt_of(question).replace("<image>\n", "")
            by_hand = loss_by_hand(client, prompt, "two red balls<|im_end|>\n", **arguments)
            assert loss == pytest.approx(by_hand, rel=1e-3)


def video_pixels(client, frames):
    (item,) = as_video_qa(client, num_frames=frames).prepare("?", DEMO).items
    return item.pixels.to(client.device, torch.float16)


@pytest.fixture(scope="module")
def vid(device):
    dtype = "float32" if device else "float16"
    template = {"conv_template": "qwen_1_5", "mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear"}
    return LlavaVid(pretrained=TINY, torch_dtype=dtype, max_frames_num=8, force_sample=True, **template, **device)


def test_vid_answers_as_videoqa_does(vid):
    answers = vid.generate_until(requests("generate_until", vid, [DEMO]))
    qa = as_video_qa(vid, num_frames=8)
    assert answers == [ask(qa, DEMO, question) for question in QUESTIONS]
    assert vid.model.config.mm_newline_position == "grid"


def test_vid_samples_by_time_and_tells_the_model_the_times(vid, monkeypatch):
    monkeypatch.setattr(vid, "force_sample", False)
    monkeypatch.setattr(vid, "add_time_instruction", True)
    (answer,) = vid.generate_until(requests("generate_until", vid, [DEMO], QUESTIONS[:1]))
    frames, times, seconds = vid.load_video(DEMO, 8, vid.fps)
    prompt = prompt_of(
        f"The video lasts for {seconds:.2f} seconds, and {len(frames)} frames are uniformly sampled from it. These "
        f"frames are located at {times}.Please answer the following questions related to this video.\n{QUESTIONS[0]}"
    )
    pixels = vid._image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(vid.device, torch.float16)
    assert answer == generate(vid, prompt, images=[pixels], modalities="video")


def test_vid_loglikelihood_is_the_loss_of_the_continuation(vid):
    batch = requests("loglikelihood", vid, [DEMO], QUESTIONS[:2], second="orange")
    video = {"images": [video_pixels(vid, 8)], "modalities": "video"}
    for question, (loss, _) in zip(QUESTIONS, vid.loglikelihood(batch), strict=False):
        by_hand = loss_by_hand(vid, prompt_of(question), "orange<|im_end|>\n", **video)
        assert loss == pytest.approx(by_hand, rel=1e-3)


@golden
def test_llava_answers_batches_of_questions_about_images(device, images):
    """The client pads the prompts; the crops of all images come as one tensor."""
    client = Llava(pretrained=str(GOLDEN), conv_template="qwen_1_5", batch_size=3, **device)
    answers = client.generate_until(requests("generate_until", client, images[:1]))
    qa = as_video_qa(client)
    assert [answer.strip() for answer in answers] == [ask(qa, images[0], question) for question in QUESTIONS]
    assert len(set(answers)) > 1
    crops = process_images(images[:1], client._image_processor, client.config).to(client.device, torch.float16)
    ((loss, _),) = client.loglikelihood(requests("loglikelihood", client, images[:1], QUESTIONS[:1], second="two"))
    image = {"images": crops, "image_sizes": [images[0].size]}
    assert loss == pytest.approx(loss_by_hand(client, prompt_of(QUESTIONS[0]), "two<|im_end|>\n", **image), rel=1e-3)
