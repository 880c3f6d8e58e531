"""Videos of the procedural world as the vision side of a model hands them on, and what is asked about them; once."""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval.questions import Question, ask
from eval.suite.config import Suite
from eval.videos import Video, make_videos
from eval.world import COLORS, MOTIONS, SHAPES, Split
from llava.model.multimodal_encoder.signals import LAYER, as_input

SOURCES = ("world.py", "questions.py", "videos.py", "suite/features.py")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Asked:
    """A four-option question, and what it is about.

    Attributes:
        video: number of the video.
        kind, text, options: as in `eval.questions.Question`.
        letter: the right answer.
        size: "small" or "large", of the object that is asked about; None where it is not about one.
        moving: whether that object moves; None likewise.
        frames: of the video.
    """

    video: int
    kind: str
    text: str
    options: tuple[str, ...]
    letter: str
    size: str | None
    moving: bool | None
    frames: int

    def question(self) -> Question:
        return Question(self.kind, self.text, self.options, "ABCD".index(self.letter), None)


@dataclass(frozen=True)
class Data:
    """What a run of the suite works on.

    Attributes:
        features: (videos, frames, tokens_per_frame, dim).
        inputs: by their names in llava/token_compression/inputs.py, (videos, ...) each.
        asked: the questions of each video.
        fingerprint: of all this, hexadecimal.
    """

    features: Tensor
    inputs: dict[str, Tensor]
    asked: list[list[Asked]]
    fingerprint: str


def prepare(suite: Suite, model: Any, processor: Any, identity: str, folder: Path) -> Data:
    """Draw the videos and encode them, or read what an earlier run has written to `folder`.

    Args:
        identity: tells checkpoints apart.
    """
    parts = (suite.videos, suite.split, suite.seed, identity, *((ROOT / name).read_text() for name in SOURCES))
    fingerprint = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    tensors, questions = (
        folder / f"features-{fingerprint[:12]}.safetensors",
        folder / f"questions-{fingerprint[:12]}.jsonl",
    )
    if not tensors.exists():  # written after the questions
        folder.mkdir(parents=True, exist_ok=True)
        encoded: list[dict[str, Tensor]] = []
        with _replacing(questions) as partial, partial.open("w") as file:
            videos = make_videos(Split[suite.split], suite.videos, suite.seed)
            for video in tqdm(videos, total=suite.videos, desc="Videos", unit="video"):
                encoded.append(_encode(video, model, processor))
                file.writelines(json.dumps(asdict(asked)) + "\n" for asked in questions_about(video))
        with _replacing(tensors) as partial:
            save_file({name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}, partial)
    with safe_open(tensors, framework="pt") as file:
        inputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    asked: list[list[Asked]] = [[] for _ in range(suite.videos)]
    for line in questions.read_text().splitlines():
        one = json.loads(line)
        asked[one["video"]].append(Asked(**one | {"options": tuple(one["options"])}))
    return Data(inputs.pop("features"), inputs, asked, fingerprint)


def questions_about(video: Video) -> Iterator[Asked]:
    """Every four-option question that the video supports, at most two of a kind, with hard wrong options."""
    for question in ask(video.scenes, 0, random.Random(video.index)):
        if question.options:
            row = subject(question, video)
            small = None if row is None else bool(video.scenes.small[0, row])
            yield Asked(
                video.index,
                question.kind,
                question.text,
                question.options,
                question.letter,
                None if small is None else "small" if small else "large",
                None if row is None else MOTIONS[int(video.scenes.motion[0, row])] != "still",
                len(video.frames),
            )


def subject(question: Question, video: Video) -> int | None:
    """Number of the object that a question is about: that whose shape, else whose color, is asked by or for."""
    said = [*question.text.rstrip("?").split(), question.options[question.answer]]
    scenes, count = video.scenes, int(video.scenes.count[0])
    for names, values in ((SHAPES, scenes.shape), (COLORS, scenes.color)):
        for row in range(count):
            if names[int(values[0, row])] in said:
                return row
    return None


@torch.inference_mode()
def _encode(video: Video, model: Any, processor: Any) -> dict[str, Tensor]:
    index = np.linspace(0, len(video.frames) - 1, model.config.mm_num_frames, dtype=int)
    pixels = processor.preprocess(video.frames[index], return_tensors="pt")["pixel_values"]
    signals: dict[str, list[Tensor]] = {name: [] for name in LAYER}
    features = model.encode_frames(pixels, True, signals)
    return {"features": features} | {name: as_input(name, torch.cat(parts)) for name, parts in signals.items()}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` only if nothing fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
