"""Videos that cost next to nothing: like those of `eval.videos`, but gray, and with the same one to three questions."""

from types import SimpleNamespace

import numpy as np


def make_videos(count, questions_each=3):
    for index in range(count):
        questions = [
            SimpleNamespace(
                text=f"Which color has object {number}?",
                options=("red", "green", "blue", "yellow"),
                answer=number,
                kind="color" if number else "count",
                task_type="Attribute Perception" if number else "Counting Problem",
            )
            for number in range(questions_each)
        ]
        frames = np.full((6, 32, 48, 3), 40 * index % 256, dtype=np.uint8)
        yield SimpleNamespace(index=index, frames=frames, fps=4.0, duration="short", questions=questions)
