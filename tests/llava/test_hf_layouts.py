"""Where the videos of a prompt are, in the families where that takes more than counting."""

import pytest
import torch
from tiny_hf import TINY, VIDEO

from llava.hf.family import VideoShape
from llava.hf.internvl import InternVL
from llava.hf.positions import close_gaps
from llava.instrument import record
from llava.token_compression import compression

END, LINE, LABEL, START = [1], [2], [3], [4]
FRAME = 9


def located(*parts):
    """Videos in a prompt of parts: a number of placeholders, or text."""
    ids = [token for part in parts for token in ([FRAME] * part if isinstance(part, int) else part)]
    prompt = torch.tensor(ids)
    places = (prompt == FRAME).nonzero()[:, 0]
    videos = InternVL().locate(places, iter([VideoShape(1, 4)] * (len(places) // 4)), prompt)
    return [list(video.shape) for video in videos]


def frames(count, first=1):
    """`Frame1: <img>....</img>` lines."""
    parts = []
    for number in range(first, first + count):
        label = [20, *[30 + int(digit) for digit in str(number)], 40, 41]
        parts += [label, START, 4, END, LINE]
    return parts[:-1]


def test_a_video():
    assert located([7, 8], *frames(5), [7]) == [[5, 4]]


def test_more_digits():
    assert located([7, 8], *frames(12), [7]) == [[12, 4]]


def test_two_videos_one_after_the_other():
    assert located([7, 8], *frames(3), LINE, *frames(12), [7]) == [[3, 4], [12, 4]]


def test_text_between_videos():
    assert located(*frames(3), LINE, [7, 8, 7, 8, 7], *frames(3)) == [[3, 4], [3, 4]]


def test_an_image_of_several_tiles_is_none():
    assert located(START, 12, END, LINE, *frames(3)) == [[3, 4]]
    assert located(*frames(3), LINE, START, 12, END) == [[3, 4]]


def test_images_without_labels_are_none():
    assert located(START, 4, END, LINE, START, 4, END, LINE, START, 4, END) == []


def test_images_next_to_a_video():
    """Of one tile, so that nothing but the label tells them apart."""
    assert located([70, 71, 72, 73], START, 4, END, LINE, *frames(4)) == [[4, 4]]
    assert located(*frames(4), LINE, [70, 71, 72], START, 4, END) == [[4, 4]]


def test_an_image_before_a_video():
    assert located(START, 4, END, [50] * 30, *frames(4)) == [[4, 4]]


def with_mask(counts):
    """A VideoLLaMA3 prompt of frames from which the processor left so many of 4 tokens."""
    tiny = TINY["video_llama_3"]
    prompts = tiny.prompts([[len(counts)]])
    mask = torch.tensor([[index < count for index in range(4)] for count in counts]).flatten()
    ids = prompts.inputs["input_ids"]
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    dropped[0, prompts.videos[0][0].flatten()[~mask]] = True
    inputs = dict(prompts.inputs, input_ids=ids[~dropped][None], attention_mask=torch.ones_like(ids[~dropped][None]))
    return tiny.model(), {**inputs, "video_compression_mask": mask}


@pytest.mark.parametrize("counts", [[4, 2, 1, 3], [2, 2, 2, 2]])
def test_tokens_that_the_processor_left(counts):
    """The ratio refers to what is in the prompt."""
    model, inputs = with_mask(counts)
    total = sum(counts)
    assert int((inputs["input_ids"] == VIDEO).sum()) == total
    with torch.no_grad():
        before = model(**inputs).logits
        with compression(model, retention_ratio=0.5), record() as recorder:
            after = model(**inputs).logits
        with compression(model, retention_ratio=0.5):
            generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    (stats,) = recorder.compressions
    assert (stats.source_tokens, stats.kept_tokens) == (total, total // 2)
    assert after.shape[1] == before.shape[1] - total + total // 2
    assert generated.shape[1] == before.shape[1] + 3


def test_gaps_close_around_images():
    """Numbers on three axes: what follows a video moves up, and an image keeps its shape."""
    text = torch.arange(2).expand(3, 2)
    first = torch.tensor([[2, 2, 3, 3], [2, 3, 2, 3], [2, 2, 2, 2]])  # a video from 2, so that text goes on at 4
    image = torch.tensor([[4, 4, 4, 4], [4, 4, 5, 5], [4, 5, 4, 5]])
    end = torch.tensor([[6, 7]]).expand(3, 2)
    positions = torch.cat([text, first, image, end], dim=1)[:, None]
    video = torch.tensor([[False] * 2 + [True] * 4 + [False] * 6])
    keep = ~video
    keep[0, 3] = True
    moved, shift = close_gaps(positions, video, keep)
    assert shift.tolist() == [1]
    assert moved[:, 0, 3].tolist() == [2, 2, 2]
    assert torch.equal(moved[:, 0, 6:], positions[:, 0, 6:] - 1)
    assert torch.equal(moved[:, 0, :2], positions[:, 0, :2])
