"""From a prompt of embeddings to the shorter one: which tokens stay, what they become and where they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression.compress import CompressionResult, compress
from llava.token_compression.config import CompressionConfig


@dataclass(frozen=True)
class Video:
    """A video in a prompt, or an image, which is a video of one frame.

    Attributes:
        places: (frames, tokens_per_frame) int64, where its tokens are in the prompt.
        result: what its compression made of them.
        newlines: (rows,) int64, places of the newlines after the rows of an image; of a row that kept nothing, the
            newline goes too.
    """

    places: Tensor
    result: CompressionResult
    newlines: Tensor

    @property
    def all_places(self) -> Tensor:
        """(tokens and newlines,) int64."""
        return torch.cat([self.places.flatten(), self.newlines])

    @property
    def kept(self) -> Tensor:
        """(kept,) int64, the places of the representatives."""
        return self.places.flatten()[self.result.positions.to(self.places.device)]


@dataclass(frozen=True)
class Cut:
    """Which tokens of a batch of prompts stay.

    Attributes:
        index: (batch, longest) int64, source place of each kept token; 0 where the row is padded, on the left.
        mask: (batch, longest) int64, 0 for padding.
        keep: (batch, length) bool.
        length: tokens of the prompts before.
    """

    index: Tensor
    mask: Tensor
    keep: Tensor
    length: int

    def rows(self, tensor: Tensor) -> Tensor:
        """(batch, length, ...) -> (batch, longest, ...), on the tensor's own device."""
        index, more = self.index.to(tensor.device), tensor.shape[2:]
        return tensor.gather(1, index.view(*index.shape, *[1] * len(more)).expand(*index.shape, *more))


def compress_videos(
    embeds: Tensor, places: list[list[Tensor]], config: CompressionConfig, newline: Tensor | None = None
) -> list[list[Video]]:
    """Compress each video of each prompt by itself.

    Args:
        embeds: (batch, length, dim).
        places: for each row those of its videos.
        config: what to do.
        newline: (dim,) the embedding of newlines, which may be among the tokens of images.
    """
    rows: list[list[Video]] = []
    for row, videos in enumerate(places):
        before = rows[-1] if rows else []
        compressed: list[Video] = []
        for index, place in enumerate(videos):
            place, newlines = _without_newlines(embeds[row], place, newline)
            earlier = before[index] if index < len(before) else None
            if earlier is not None and _same(embeds, row, place, earlier.places):  # beams repeat a prompt
                compressed.append(Video(place, earlier.result, newlines))
            else:
                result = compress(embeds[row, place.to(embeds.device)].detach(), config)
                compressed.append(Video(place, result, newlines))
        rows.append(compressed)
    return rows


def _without_newlines(embeds: Tensor, places: Tensor, newline: Tensor | None) -> tuple[Tensor, Tensor]:
    if newline is None or len(places) > 1:
        return places, places.new_empty(0)
    ends = (embeds[places[0].to(embeds.device)] == newline.to(embeds)).all(-1).to(places.device)
    return places[:, ~ends], places[0, ends]


def _same(embeds: Tensor, row: int, place: Tensor, earlier: Tensor) -> bool:
    return place.shape == earlier.shape and torch.equal(
        embeds[row, place.to(embeds.device)], embeds[row - 1, earlier.to(embeds.device)]
    )


def cut(rows: list[list[Video]], valid: Tensor) -> Cut:
    """What stays of prompts in which only `valid`, (batch, length) bool, is no padding."""
    keep = valid.clone()
    for row, videos in enumerate(rows):
        for video in videos:
            keep[row, video.all_places] = False
            keep[row, video.kept] = True
            for start, end in _image_rows(video):
                keep[row, end] = keep[row, start:end].any()
    counts = keep.sum(1)
    longest = int(counts.max())
    order = keep.long().argsort(dim=1, stable=True)  # the kept ones last, in their order
    index = order[:, keep.shape[1] - longest :]
    mask = keep.gather(1, index).long()
    return Cut(index * mask, mask, keep, keep.shape[1])


def _image_rows(image: Video) -> list[tuple[int, int]]:
    """First place of each row of an image, and that of its newline. A base image may come before the first row."""
    ends = image.newlines.tolist()
    if not ends:
        return []
    first = int(image.places.min()) if len(ends) == 1 else 2 * ends[0] + 1 - ends[1]
    return list(zip([first, *[end + 1 for end in ends[:-1]]], ends, strict=True))


def merged(embeds: Tensor, rows: list[list[Video]]) -> Tensor:
    """`embeds` with the kept tokens at the places of their representatives."""
    embeds = embeds.clone()
    for row, videos in enumerate(rows):
        for video in videos:
            embeds[row, video.kept.to(embeds.device)] = video.result.tokens.to(embeds)
    return embeds


def merged_features(features: Tensor, ranks: Tensor, rows: list[list[Video]]) -> Tensor:
    """Further features of the tokens: those of a kept token become the mean over the tokens that went into it.

    Args:
        features: (tokens, dim).
        ranks: (batch, length) int64, the row of `features` that belongs to each place of the prompts.
        rows: the videos.
    """
    features = features.clone()
    for row, videos in enumerate(rows):
        for video in videos:
            source = ranks[row, video.places.flatten().to(ranks.device)].to(features.device)
            into = video.result.assignment.flatten().to(features.device)
            used = into >= 0
            sums = features.new_zeros(len(video.kept), features.shape[1], dtype=torch.float32)
            sums.index_add_(0, into[used], features[source[used]].float())
            means = sums / into[used].bincount(minlength=len(sums))[:, None]
            features[ranks[row, video.kept.to(ranks.device)].to(features.device)] = means.to(features)
    return features
