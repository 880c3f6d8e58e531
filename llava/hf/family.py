"""What the mechanism needs to know about a family of models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import UserError


@dataclass(frozen=True)
class VideoShape:
    """How many placeholders one video has in the prompt.

    Attributes:
        frames: frames, or what the vision tower merges several of them into.
        tokens_per_frame: tokens of each, after all of the model's own pooling.
        always_kept: placeholders after them that are no part of the video's content: a newline.
    """

    frames: int
    tokens_per_frame: int
    always_kept: int = 0

    @property
    def placeholders(self) -> int:
        """All placeholders of the video."""
        return self.frames * self.tokens_per_frame + self.always_kept


class Family:
    """One family. What is here fits most of them; a family's own file overrides what differs.

    Attributes:
        name: what people call it.
        model_types: `config.model_type` of its models.
        language_model: attribute of the inner model that holds the decoder.
        features: method of the inner model that makes features of videos.
        placeholder: attribute of the config with the id of a video's placeholder.
        image_features, image_placeholder: the same for images; None where these are also a video's.
        rotary_axes: whether positions are triples (frame, row, column). Then kept tokens keep their own unless asked
            otherwise; where positions are plain numbers they are renumbered, as published for LLaVA-Scissor.
    """

    name: str
    model_types: tuple[str, ...]
    language_model = "language_model"
    features = "get_video_features"
    placeholder = "video_token_id"
    image_features: str | None = "get_image_features"
    image_placeholder: str | None = "image_token_id"
    rotary_axes = False

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        """The videos of one call of `features`, in the order of their placeholders.

        Args:
            config: of the model.
            arguments: of the call, by name.
            output: what the call returned.
        """
        raise NotImplementedError

    def image_shapes(self, output: Any) -> list[VideoShape]:
        """The images of one call of `image_features`, each of them a single frame; newlines count."""
        return [VideoShape(1, image.shape[:-1].numel()) for image in getattr(output, "pooler_output", output)]

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        """The video of so many frames of so many pixels as its processor resized them, before it is seen.

        Raises:
            UserError: pixels that the processor does not produce.
        """
        raise NotImplementedError

    def in_prompt(self, shapes: Sequence[VideoShape], arguments: Mapping[str, Any]) -> list[VideoShape]:
        """`shapes` as they arrive in the prompt, given the arguments of the inner model's `forward`."""
        return list(shapes)

    def locate(self, places: Tensor, shapes: Iterator[VideoShape], ids: Tensor | None) -> list[Tensor]:
        """The videos of one prompt.

        Args:
            places: (n,) int64, ascending places of the prompt's placeholders.
            shapes: of the videos from this prompt on; those of this prompt are taken from it.
            ids: (length,) int64, the prompt; None where it is given as embeddings.

        Returns:
            For each video the places of its tokens, (frames, tokens_per_frame) int64.
        """
        videos = []
        while len(places):
            shape = next(shapes)
            content = shape.frames * shape.tokens_per_frame
            videos.append(places[:content].view(shape.frames, shape.tokens_per_frame))
            places = places[shape.placeholders :]
        return videos

    def locate_images(self, places: Tensor, videos: list[Tensor]) -> list[Tensor]:
        """The images among the placeholders of one prompt that are shared with videos, (1, tokens) int64 each."""
        return []


def grid_shapes(grid: Tensor, merge: int) -> list[VideoShape]:
    """Videos from their grids of patches, (videos, 3) int64 of frames, rows and columns, `merge` squared a token."""
    return [VideoShape(frames, rows * columns // merge**2) for frames, rows, columns in grid.tolist()]


def patches(height: int, width: int, patch: int, merge: int) -> int:
    """Tokens of a frame of patches, `merge` squared a token.

    Raises:
        UserError: sides that are no multiples of a token's.
    """
    side = patch * merge
    if height % side or width % side:
        raise UserError(
            f"A frame of {height} x {width} pixels is no whole number of tokens of {side} x {side}; give the size that "
            "the processor resizes to."
        )
    return height // side * (width // side)


def runs(places: Tensor) -> list[Tensor]:
    """Split ascending places, (n,) int64, wherever two neighbours are not adjacent."""
    ends = (places.diff() != 1).nonzero()[:, 0] + 1
    return [run for run in torch.tensor_split(places, ends.cpu()) if len(run)]
