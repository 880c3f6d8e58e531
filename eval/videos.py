"""Finished videos of the procedural world, with a balanced choice of questions about each."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.questions import TASK_TYPES, Question, ask
from eval.world import Scenes, Split, draw_scenes, render, seed_for

FPS = 8.0

MAX_ATTEMPTS = 2000
"""How many scenes are drawn for one video."""

Parts = Sequence[Sequence[str]]
"""For each question of a video, the kinds that it may be of (keys of `eval.questions.TASK_TYPES`)."""


@dataclass(frozen=True)
class Video:
    """One video and what is asked about it.

    Attributes:
        index: position in its split.
        frames: uint8 (T, size, size, 3) RGB, T from 8 to 64, or so many times `stretch`.
        fps: frames per second.
        questions: four-option questions with hard wrong options.
        scenes: the batch of one scene that the frames show.
    """

    index: int
    frames: np.ndarray
    fps: float
    questions: tuple[Question, ...]
    scenes: Scenes

    @property
    def duration(self) -> str:
        """Video-MME's word for the length: thirds of the longest video."""
        return ("short", "medium", "long")[min(2, (len(self.frames) - 1) // 22)]


def any_four(index: int) -> Parts:
    """Four questions of any kinds."""
    return [tuple(TASK_TYPES)] * 4


def make_videos(
    split: Split,
    count: int,
    seed: int = 0,
    parts: Callable[[int], Parts] = any_four,
    stretch: int = 1,
    size: int = 160,
) -> Iterator[Video]:
    """The first `count` videos of run `seed` of `split`, `size` pixels square; the same every time.

    Each question of a video is of that one of the kinds it may be of which has been asked least so far, so that every
    kind is asked about equally often over many videos. No kind is asked about twice.

    Args:
        parts: the kinds that the questions of video `index` may be of. A scene about which they cannot all be asked is
            replaced by another one, except that `any_four` takes the questions that there are.
        stretch: how many times as long the videos are as the world's own 8 to 64 frames.
    """
    asked: Counter[str] = Counter()
    for index in range(count):
        wanted = parts(index)
        for attempt in range(MAX_ATTEMPTS):
            scene_seed = seed_for(split, seed, index + (attempt << 20))
            scenes = draw_scenes(1, scene_seed)
            possible: dict[str, Question] = {}
            for question in ask(scenes, 0, random.Random(scene_seed)):
                if question.options:
                    possible.setdefault(question.kind, question)
            kinds = _choose(possible, wanted, asked)
            if len(kinds) == len(wanted) or parts is any_four:
                break
        else:
            raise RuntimeError(f"No scene out of {MAX_ATTEMPTS} supports questions of the kinds {wanted}.")
        asked.update(kinds)
        length = int(scenes.frame_count) * stretch
        times = torch.linspace(0, 1, length)[None]
        shown = render(scenes, times, size, scene_seed)[0]  # (T, 3, size, size)
        frames = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
        yield Video(index, frames, FPS, tuple(possible[kind] for kind in kinds), scenes)


def _choose(possible: Iterable[str], parts: Parts, asked: Counter[str]) -> list[str]:
    """Of the kinds that are possible the least asked one for each part; fewer than parts where there is none left."""
    left, chosen = list(possible), []
    for part in parts:
        fitting = [kind for kind in left if kind in part]
        if fitting:
            chosen.append(min(fitting, key=lambda kind: asked[kind]))
            left.remove(chosen[-1])
    return chosen
