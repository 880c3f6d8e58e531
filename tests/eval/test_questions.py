"""Questions of the procedural world: right, answerable, and not guessable from presence."""

import random
from collections import Counter

import pytest
import torch

from eval.questions import LETTERS, TASK_TYPES, ask
from eval.videos import make_videos
from eval.world import COLORS, SHAPES, Split, draw_scenes, frame_times, patch_labels, seed_for


@pytest.fixture(scope="module")
def asked():
    scenes = draw_scenes(300, seed_for(Split.DEV, 2, 0))
    return scenes, [ask(scenes, row, random.Random(row)) for row in range(len(scenes))]


def test_every_kind_is_asked_with_four_different_options_and_one_answer(asked):
    _, questions = asked
    kinds = Counter(q.kind for row in questions for q in row)
    assert set(kinds) == set(TASK_TYPES)
    for q in (q for row in questions for q in row):
        if q.kind == "exist":
            assert (q.options, q.free_text_answer in ("yes", "no")) == ((), True)
        else:
            assert len(set(q.options)) == 4
            assert q.free_text_answer in (None, q.options[q.answer])
            assert q.letter == LETTERS[q.answer]


def test_letters_carry_no_information(asked):
    _, questions = asked
    letters = Counter(q.letter for row in questions for q in row if q.options)
    share = max(letters.values()) / sum(letters.values())
    assert share < 0.28


def test_wrong_colors_are_in_the_video_as_far_as_it_has_any(asked):
    scenes, questions = asked
    labels = patch_labels(scenes, frame_times(scenes, 8), 10)
    shown = labels[..., : len(COLORS)].amax((1, 2)) > 0  # (B, 8)
    for row, asked_here in enumerate(questions):
        present = {COLORS[i] for i in shown[row].nonzero()[:, 0]}
        for q in asked_here:
            if q.kind == "color":
                wrong = set(q.options) - {q.free_text_answer}
                assert len(wrong & present) >= min(3, len(present) - 1)


def test_answers_follow_from_the_labels(asked):
    """Facts read off the rendered labels, not off the scene description that the questions were made from."""
    scenes, questions = asked
    labels = patch_labels(scenes, frame_times(scenes, 8), 10)
    colors = labels[..., : len(COLORS)].sum(2)  # (B, F, 8): area of each color per frame
    shapes = labels[..., len(COLORS) : len(COLORS) + len(SHAPES)].sum(2)
    checked = Counter()
    for row, asked_here in enumerate(questions):
        for q in asked_here:
            if q.kind == "absent":
                values, area = (COLORS, colors[row]) if "color" in q.text else (SHAPES, shapes[row])
                assert area[:, values.index(q.options[q.answer])].max() == 0
            elif q.text == "Which shape disappears?":
                area = shapes[row][:, SHAPES.index(q.options[q.answer])]
                assert area[0] > 0
                assert area[-1] == 0
            elif q.text == "Which shape appears last?":
                first = (shapes[row] > 0).float().argmax(0)  # first frame with each shape
                assert first[SHAPES.index(q.options[q.answer])] == first.max()
            else:
                continue
            checked[q.kind] += 1
    assert set(checked) == {"absent", "vanish", "order"}


def test_videos_repeat_and_are_balanced_over_kinds():
    first, second = (list(make_videos(Split.DEV, 12, seed=3, size=32)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.questions == b.questions
        assert (a.frames == b.frames).all()
        assert 8 <= len(a.frames) <= 64
        assert len(a.questions) == 4
    kinds = Counter(q.kind for video in first for q in video.questions)
    common = [kinds[kind] for kind in ("color", "shape", "place", "count", "scene")]
    assert max(common) - min(common) <= 2


def test_prefix_of_a_split_does_not_depend_on_its_length():
    short = list(make_videos(Split.DEV, 2, seed=3, size=32))
    long = list(make_videos(Split.DEV, 4, seed=3, size=32))
    for a, b in zip(short, long, strict=False):
        assert a.questions == b.questions
        assert torch.equal(torch.from_numpy(a.frames), torch.from_numpy(b.frames))
