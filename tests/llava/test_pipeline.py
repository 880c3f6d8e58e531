"""From a video file to an answer: exact token counts, defaults, text without a video, likelihoods."""

import dataclasses

import pytest
import torch
from PIL import Image
from video_files import write_video

from llava.config import ModelConfig
from llava.errors import CheckpointError, ConfigError, DeviceError, ImageError, UserError, VideoError
from llava.images import load_image, process_image, process_images
from llava.instrument import STAGES, record
from llava.mm_utils import tokenizer_image_token
from llava.pipeline import VideoQA, resolve_device
from llava.token_compression import CompressionConfig, compression
from llava.video import VideoConfig, load_video

TOKENS_PER_FRAME, PATCHES = 4, 16
QUESTION = "what is shown ?"


@pytest.fixture
def qa(tiny_checkpoint):
    return VideoQA.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.PNG"
    Image.linear_gradient("L").resize((60, 30)).save(path)
    return path


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 0.001])
def test_an_answer_counts_tokens_exactly(qa, clip, ratio):
    config = CompressionConfig(retention_ratio=ratio)
    answer = qa.ask(clip, QUESTION, compression=config, video=VideoConfig(num_frames=6), max_new_tokens=4)
    assert answer.source_tokens == 6 * TOKENS_PER_FRAME
    assert answer.kept_tokens == max(1, round(ratio * 6 * TOKENS_PER_FRAME))
    assert answer.retention_ratio == answer.kept_tokens / answer.source_tokens
    assert answer.frames == 6
    assert set(answer.milliseconds) == set(STAGES)
    assert min(answer.milliseconds.values()) > 0


def test_an_answer_is_what_the_separate_steps_give(qa, clip):
    config = CompressionConfig(retention_ratio=0.3)
    answer = qa.ask(clip, QUESTION, compression=config, video=VideoConfig(num_frames=6), max_new_tokens=8)

    frames = load_video(clip, VideoConfig(num_frames=6)).frames
    pixels = qa.image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer_image_token(prompt, qa.tokenizer, return_tensors="pt")[None]
    with compression(qa.model, config):
        new = qa.model.generate(ids, images=[pixels], modalities=["video"], image_sizes=[(96, 64)], max_new_tokens=8)
    assert answer.text == qa.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    assert qa.model.token_compression is None, "the model is as it was before"


def test_without_compression_every_token_is_kept_unless_the_checkpoint_says_otherwise(qa, clip):
    assert qa.ask(clip, QUESTION, max_new_tokens=1).retention_ratio == 1
    qa.model.config.mm_use_zip, qa.model.config.mm_zip_tau = True, -1.0
    qa.model.config.mm_newline_position = "no_token"
    assert qa.ask(clip, QUESTION, max_new_tokens=1).kept_tokens == 1


def test_the_checkpoint_decides_on_the_number_of_frames_unless_told(qa, clip):
    assert qa.ask(clip, QUESTION, max_new_tokens=1).frames == 32
    qa.model.config.mm_num_frames = 5
    assert qa.ask(clip, QUESTION, max_new_tokens=1).frames == 5
    assert qa.ask(clip, QUESTION, video=VideoConfig(num_frames=3), max_new_tokens=1).frames == 3
    qa.video = VideoConfig(num_frames=2)
    assert qa.ask(clip, QUESTION, max_new_tokens=1).frames == 2


def test_a_question_on_text_alone(qa):
    answer = qa.ask(None, QUESTION, max_new_tokens=4)
    assert (answer.source_tokens, answer.kept_tokens, answer.frames) == (0, 0, 0)
    assert answer.retention_ratio == 1
    assert "vision_tower" not in answer.milliseconds


def test_several_videos_go_before_the_question_or_where_it_says(qa, clip):
    video = VideoConfig(num_frames=2)
    before = qa.prepare(QUESTION, [clip, clip], video)
    placed = qa.prepare(f"<image> <image>\n{QUESTION}", [clip, clip], video)
    assert torch.equal(before.input_ids, placed.input_ids)
    assert len(before.items) == 2
    answer = qa.ask([clip, clip], QUESTION, video=video, max_new_tokens=1)
    assert answer.source_tokens == 2 * 2 * TOKENS_PER_FRAME
    with pytest.raises(UserError):
        qa.ask(clip, "<image> and <image> ?", video=video, max_new_tokens=1)


def test_an_image_is_a_square_or_a_base_image_with_crops(qa, photo):
    answer = qa.ask(photo, QUESTION, max_new_tokens=4)
    assert (answer.frames, answer.source_tokens, answer.kept_tokens) == (1, PATCHES, PATCHES)
    assert "decode_video" not in answer.milliseconds

    qa.model.config.image_aspect_ratio = "anyres_max_9"
    qa.model.config.image_grid_pinpoints = "(1x1),...,(3x3)"
    crops = qa.ask(str(photo), QUESTION, max_new_tokens=4)
    assert (crops.frames, crops.source_tokens) == (1 + 2, PATCHES + 8 * 4)  # 60 x 30 pixels fill two crops of 32
    pixels = process_images([load_image(photo)], qa.image_processor, qa.model.config)
    inputs = qa.prepare(QUESTION, load_image(photo))
    assert torch.equal(inputs.items[0].pixels, pixels[0])
    new = qa.model.generate(inputs.input_ids, images=pixels, image_sizes=[(60, 30)], max_new_tokens=4)
    assert crops.text == qa.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_an_image_is_compressed_only_if_asked(qa, photo):
    config = CompressionConfig(retained_tokens=5)
    assert qa.ask(photo, QUESTION, compression=config, max_new_tokens=1).kept_tokens == PATCHES
    config = dataclasses.replace(config, images=True)
    assert qa.ask(photo, QUESTION, compression=config, max_new_tokens=1).kept_tokens == 5


def test_an_image_beside_others_is_padded(qa, clip, photo):
    qa.model.config.image_aspect_ratio = "anyres"
    qa.model.config.image_grid_pinpoints = "(1x1),...,(3x3)"
    items = qa.prepare(QUESTION, [photo, clip, load_image(photo)], VideoConfig(num_frames=2)).items
    assert [(item.modality, len(item.pixels)) for item in items] == [("image", 1), ("video", 2), ("image", 1)]
    padded = process_image(load_image(photo), qa.image_processor, "pad", None)
    assert torch.equal(items[0].pixels, padded)
    assert torch.equal(items[2].pixels, padded)
    answer = qa.ask([photo, clip], QUESTION, video=VideoConfig(num_frames=2), max_new_tokens=1)
    assert answer.source_tokens == PATCHES + 2 * TOKENS_PER_FRAME


def test_generate_leaves_recording_and_compression_to_its_caller(qa, clip):
    qa.video = VideoConfig(num_frames=2)
    with record() as recorder, compression(qa.model, retained_tokens=3):
        text = qa.generate(QUESTION, clip, max_new_tokens=4)
    assert [stats.kept_tokens for stats in recorder.compressions] == [3]
    config = CompressionConfig(retained_tokens=3)
    assert text == qa.ask(clip, QUESTION, compression=config, max_new_tokens=4).text


def test_a_score_is_the_loss_of_the_continuation_and_its_end(qa, clip):
    qa.video = VideoConfig(num_frames=2)
    loss, greedy = qa.score(QUESTION, "a red ball", clip)
    inputs = qa.prepare(QUESTION, clip)
    target = torch.tensor([qa.tokenizer("a red ball<|im_end|>").input_ids])
    ids = torch.cat([inputs.input_ids, target], dim=1)
    labels = torch.cat([torch.full_like(inputs.input_ids, -100), target], dim=1)
    with torch.inference_mode():
        expected = qa.model(ids, labels=labels, **inputs.arguments()).loss
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert greedy is False


def test_a_greedy_continuation_is_recognised(qa, clip, monkeypatch):
    qa.video = VideoConfig(num_frames=2)
    prompt = qa.prepare(QUESTION, clip)
    new = qa.model.generate(prompt.input_ids, **prompt.arguments(), max_new_tokens=3, eos_token_id=63)
    tokens = qa._tokens
    monkeypatch.setattr(
        qa,
        "_tokens",
        lambda text: tokens(text) if text.endswith("assistant\n") else torch.cat([prompt.input_ids, new], 1),
    )
    assert qa.score(QUESTION, "whatever these tokens say", clip)[1] is True


def test_a_model_without_a_vision_tower_answers_text_only(qa, clip):
    qa.image_processor = None
    assert isinstance(qa.ask(None, QUESTION, max_new_tokens=1).text, str)
    with pytest.raises(CheckpointError, match="no vision tower"):
        qa.ask(clip, QUESTION)


def test_mistakes_are_user_errors(tiny_checkpoint, qa, tmp_path):
    with pytest.raises(VideoError, match="nowhere"):
        qa.ask(tmp_path / "nowhere.mp4", QUESTION)
    with pytest.raises(ImageError, match="nowhere"):
        qa.ask(tmp_path / "nowhere.jpg", QUESTION)
    with pytest.raises(CheckpointError, match="nowhere"):
        VideoQA.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="did you mean 'qwen_1_5'"):
        VideoQA.from_pretrained(tiny_checkpoint, conv_template="qwen_15", device="cpu")
    with pytest.raises(DeviceError, match="Unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(DeviceError, match="There is no device 'cuda:99'"):
        resolve_device("cuda:99")


def test_from_config_keeps_the_experiments_video_settings(tiny_checkpoint, clip):
    config = dataclasses.replace(ModelConfig(), path=str(tiny_checkpoint), device="cpu")
    assert VideoQA.from_config(config, VideoConfig(fps=1.0)).ask(clip, QUESTION, max_new_tokens=1).frames == 3


def test_from_config_replaces_keys_of_the_checkpoints_config(tiny_checkpoint):
    config = ModelConfig(path=str(tiny_checkpoint), device="cpu", mm_newline_position="grid")
    loaded = VideoQA.from_config(config).model.config
    assert (loaded.mm_newline_position, loaded.mm_spatial_pool_mode) == ("grid", "bilinear")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_balanced_model_is_on_the_cpu_where_there_is_no_gpu(tiny_checkpoint):
    model = VideoQA.from_config(ModelConfig(path=str(tiny_checkpoint), device="balanced")).model
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
