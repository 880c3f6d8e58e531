"""Finished videos of the procedural world, with a balanced choice of questions about each."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from eval.questions import Question, ask
from eval.world import Scenes, Split, draw_scenes, render, seed_for

FPS = 8.0


@dataclass(frozen=True)
class Video:
    """One video and what is asked about it.

    Attributes:
        index: position in its split.
        frames: uint8 (T, size, size, 3) RGB, T from 8 to 64.
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


def make_videos(
    split: Split, count: int, seed: int = 0, questions_per_video: int = 4, size: int = 160
) -> Iterator[Video]:
    """The first `count` videos of run `seed` of `split`, `size` pixels square; the same every time.

    The questions of a video are those of its possible ones whose kinds have been asked least so far, so that every
    kind is asked about equally often over many videos.
    """
    asked: Counter[str] = Counter()
    for index in range(count):
        scene_seed = seed_for(split, seed, index)
        scenes = draw_scenes(1, scene_seed)
        chosen: dict[str, Question] = {}
        for question in ask(scenes, 0, random.Random(scene_seed)):
            if question.options:
                chosen.setdefault(question.kind, question)
        kinds = sorted(chosen, key=lambda kind: asked[kind])[:questions_per_video]
        asked.update(kinds)
        length = int(scenes.frame_count)
        times = torch.linspace(0, 1, length)[None]
        shown = render(scenes, times, size, scene_seed)[0]  # (T, 3, size, size)
        frames = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
        yield Video(index, frames, FPS, tuple(chosen[kind] for kind in kinds), scenes)
