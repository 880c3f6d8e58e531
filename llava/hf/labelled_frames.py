"""Families to which a video is a series of labelled images: InternVL and SmolVLM.

Images and frames have the same placeholder, and the model is told nothing else, so the prompt decides: a video is two
or more groups of placeholders of exactly one tile each, with a label such as "Frame2: " or "Frame from 00:01:" between
neighbours, at least 5 and at most 24 tokens including those that start and end an image. Another video begins where
the first label is repeated, and where more than half of it is another one. An image in several tiles is
one longer group (InternVL) or tiles with next to nothing between them (SmolVLM). What cannot be told from frames are
several images of one tile each with labels of their own ("Image-1: "): do not compress those.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llava.hf.family import Family, VideoShape, runs

LABEL = range(5, 25)
"""Tokens between the frames of a video."""

LONGER = 2
"""Digits by which a label may be longer than that of the second frame."""

BEFORE_LABEL = 2
"""Tokens between two frames that belong to the earlier one, at least one, and the line's end."""


class LabelledFrames(Family):
    """See the module. Every frame or tile is a shape of its own."""

    features = "get_image_features"
    placeholder = "image_token_id"
    image_features = None
    image_placeholder = None

    def locate(self, places: Tensor, shapes: Iterator[VideoShape], ids: Tensor | None) -> list[Tensor]:
        tile = next(shapes).tokens_per_frame if len(places) else 0
        videos: list[list[Tensor]] = [[]]
        for run in runs(places):
            if len(run) != tile or not _continues(videos[-1], run, ids):
                videos.append([])
            if len(run) == tile:
                videos[-1].append(run)
        return [torch.stack(frames) for frames in videos if len(frames) > 1]

    def locate_images(self, places: Tensor, videos: list[Tensor]) -> list[Tensor]:
        frames = {int(frame[0]) for video in videos for frame in video}
        return [run[None] for run in runs(places) if int(run[0]) not in frames]


def _continues(frames: list[Tensor], run: Tensor, ids: Tensor | None) -> bool:
    """Whether `run` is the next frame of the video that `frames` begin."""
    if not frames:
        return False
    gap = int(run[0] - frames[-1][-1]) - 1
    usual = gap if len(frames) == 1 else int(frames[1][0] - frames[0][-1]) - 1
    return usual in LABEL and gap <= usual + LONGER and _is_next_label(frames[0], run, usual - BEFORE_LABEL, ids)


def _is_next_label(first: Tensor, run: Tensor, length: int, ids: Tensor | None) -> bool:
    """Whether the label of `run` is that of the first frame with another number: mostly the same, but not entirely."""
    start, again = int(first[0]), int(run[0])
    if ids is None:
        return True
    if start < length:
        return False
    same = int((ids[start - length : start] == ids[again - length : again]).sum())
    return length / 2 < same < length
