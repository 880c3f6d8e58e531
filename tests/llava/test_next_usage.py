"""Calls as LLaVA-NeXT's tutorials and demos write them: half-precision pixels, sizes of frames, keyword or not."""

import copy
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, TextIteratorStreamer

from llava.assets import tiny_model_path
from llava.constants import (  # noqa: F401  # what the tutorials import
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import SeparatorStyle, conv_templates
from llava.errors import UserError
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pipeline import VideoQA
from llava.utils import disable_torch_init
from llava.video import VideoConfig, load_video

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "ckpt_a"
DEMO = tiny_model_path().parent / "demo.mp4"
QUESTION = "What color is the square?"
GREEDY = {"do_sample": False, "temperature": 0, "max_new_tokens": 16}
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")
CHECKPOINTS = [pytest.param(tiny_model_path(), id="tiny"), pytest.param(GOLDEN, id="recorded", marks=golden)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request):
    """What `load_pretrained_model` returns, and VideoQA around it."""
    disable_torch_init()
    arguments = {"device_map": "auto", "multimodal": True, "attn_implementation": None}
    tokenizer, model, image_processor, max_length = load_pretrained_model(
        str(request.param), None, "llava_qwen", **arguments
    )
    return tokenizer, model.eval(), image_processor, VideoQA(model, tokenizer, image_processor, max_length)


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (2, 150, 260, 3), dtype=np.uint8)
    return [Image.fromarray(noise[0]), Image.fromarray(noise[1]).crop((0, 0, 120, 150))]


def prompt_ids(question, tokenizer, model):
    conv = copy.deepcopy(conv_templates["qwen_1_5"])
    conv.append_message(conv.roles[0], question)
    conv.append_message(conv.roles[1], None)
    ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    return ids.unsqueeze(0).to(model.device)


def halves(images, image_processor, model):
    tensors = process_images(images, image_processor, model.config)
    return [tensor.to(dtype=torch.float16, device=model.device) for tensor in tensors]


def text(tokenizer, new_tokens):
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)[0].strip()


def expected(qa, visuals, question=QUESTION, **video):
    return qa.ask(visuals, question, max_new_tokens=16, video=VideoConfig(**video)).text


def test_image(loaded, pictures):
    tokenizer, model, image_processor, qa = loaded
    ids = prompt_ids(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", tokenizer, model)
    image_tensor = halves(pictures[:1], image_processor, model)
    new = model.generate(ids, images=image_tensor, image_sizes=[pictures[0].size], **GREEDY)
    assert text(tokenizer, new) == expected(qa, pictures[0])


def test_image_streamed_within_the_context(loaded, pictures):
    """The length left for the answer is reckoned from `num_patches`; `generate` runs in a thread of its own."""
    tokenizer, model, image_processor, qa = loaded
    ids = prompt_ids(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", tokenizer, model)
    room = model.config.max_position_embeddings - ids.shape[-1] - model.get_vision_tower().num_patches
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {"images": halves(pictures[:1], image_processor, model), "image_sizes": [pictures[0].size]}
    arguments |= {**GREEDY, "max_new_tokens": min(16, room)}
    thread = Thread(target=model.generate, kwargs={"inputs": ids, "streamer": streamer, **arguments})
    thread.start()
    assert "".join(streamer).strip() == expected(qa, pictures[0])
    thread.join()


def test_interleaved_images(loaded, pictures):
    """Each image keeps the model's own way of cutting it; VideoQA pads several, so that it is asked to here."""
    tokenizer, model, image_processor, qa = loaded
    question = f"{DEFAULT_IMAGE_TOKEN} comes first.\n\nThen {DEFAULT_IMAGE_TOKEN}\n{QUESTION}"
    ids = prompt_ids(question, tokenizer, model)
    sizes = [picture.size for picture in pictures]
    as_is = model.generate(ids, images=halves(pictures, image_processor, model), image_sizes=sizes, **GREEDY)
    padding = copy.deepcopy(model.config)
    padding.image_aspect_ratio = "pad"
    padded = process_images(pictures, image_processor, padding)
    padded = [tensor.half().to(model.device) for tensor in padded]
    new = model.generate(ids, images=padded, image_sizes=sizes, **GREEDY)
    assert text(tokenizer, new) == expected(qa, pictures, question)
    assert torch.equal(as_is, new) == (model.config.image_aspect_ratio == "pad")


def test_video(loaded):
    """`image_sizes` holds numbers of values of numpy frames, or sizes of each frame; neither matters to a video."""
    tokenizer, model, image_processor, qa = loaded
    frames = load_video(DEMO, VideoConfig(num_frames=4)).frames
    pixels = image_processor.preprocess(frames, return_tensors="pt")["pixel_values"].half().to(model.device)
    ids = prompt_ids(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", tokenizer, model)
    for sizes in ([frame.size for frame in frames], [Image.fromarray(frame).size for frame in frames], None):
        new = model.generate(ids, images=[pixels], image_sizes=sizes, modalities=["video"], **GREEDY)
        assert text(tokenizer, new) == expected(qa, DEMO, num_frames=4)


def test_frames_as_so_many_images_are_an_error_that_says_what_to_do(loaded):
    """One version of the tutorial does this; LLaVA-NeXT then sees the first frame and drops the others."""
    tokenizer, model, image_processor, _ = loaded
    frames = [Image.fromarray(frame) for frame in load_video(DEMO, VideoConfig(num_frames=4)).frames]
    ids = prompt_ids(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", tokenizer, model)
    with pytest.raises(UserError, match=r"1 <image> placeholders but 4.*images=\[frames\]"):
        model.generate(ids, images=halves(frames, image_processor, model), image_sizes=[(1, 1)] * 4, **GREEDY)


def test_the_demo_script(loaded):
    """playground/demo/video_demo.py: the config by AutoConfig, a string as modality, a keyword that ends the answer."""
    tokenizer, model, image_processor, qa = loaded
    assert AutoConfig.from_pretrained(qa.model.name_or_path).mm_vision_tower == model.config.mm_vision_tower
    assert not model.config.mm_use_im_start_end
    frames = load_video(DEMO, VideoConfig(num_frames=4)).frames
    video = [image_processor.preprocess(frames, return_tensors="pt")["pixel_values"].half().to(model.device)]
    ids = prompt_ids(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", tokenizer, model)
    conv = conv_templates["qwen_1_5"].copy()
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    new = model.generate(
        inputs=ids,
        images=video,
        attention_mask=ids.ne(tokenizer.pad_token_id).long(),
        modalities="video",
        do_sample=False,
        temperature=0.0,
        max_new_tokens=16,
        top_p=0.1,
        num_beams=1,
        use_cache=True,
        stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, ids)],
    )
    assert text(tokenizer, new) == expected(qa, DEMO, num_frames=4)
