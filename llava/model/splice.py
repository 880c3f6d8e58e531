"""Insert visual tokens into text rows and pad the rows to one batch. Pure functions on tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.newlines import VisualTokens

GROUPS = 2**32
"""More groups than tokens of a video are in."""


@dataclass(frozen=True)
class Row:
    """One prompt: embeds (length, dim), position_ids, labels and videos (length,) int64.

    `videos` numbers the tokens of compressed images and videos: `GROUPS` for the first one, twice that for the second,
    and so on, plus a token's group. Newlines among them are -1, all other tokens 0.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    videos: torch.Tensor

    def truncated(self, max_length: int) -> "Row":
        """The first `max_length` positions."""
        return Row(*(getattr(self, field.name)[:max_length] for field in fields(self)))


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of equal length: embeds (rows, length, dim), attention_mask bool, position_ids, labels and videos int64."""

    embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    videos: torch.Tensor


def items_per_row(rows: Sequence[torch.Tensor], items: int) -> list[list[int]]:
    """Which of the given images or videos go into which row, in order.

    Every placeholder takes one item. Rows without a placeholder take none; scripts written for LLaVA-NeXT hand in
    one dummy item for each such row, which is accepted and skipped.

    Raises:
        UserError: the number of items fits neither count.
    """
    placeholders = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows]
    text_rows = placeholders.count(0)
    dummies = items == sum(placeholders) + text_rows
    if items != sum(placeholders) and not dummies:
        raise UserError(
            f"The prompts hold {sum(placeholders)} <image> placeholders but {items} images or videos were given; "
            'give exactly one for each placeholder; a video is one: images=[frames], modalities=["video"].'
        )
    assignment, start = [], 0
    for count in placeholders:
        assignment.append(list(range(start, start + count)))
        start += count or int(dummies)
    return assignment


def splice_row(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    items: Sequence[VisualTokens],
    embed: Callable[[torch.Tensor], torch.Tensor],
    source_positions: bool,
) -> Row:
    """Replace each placeholder of one row by the tokens of its item.

    Args:
        input_ids, labels: (length,) int64 without padding.
        items: one per placeholder, in order.
        embed: text ids (n,) to embeddings (n, dim).
        source_positions: give every position the index it would have without compression; otherwise 0, 1, 2, ...
    """
    holes = (input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    sizes = [end - start - 1 for start, end in zip([-1, *holes], [*holes, len(input_ids)], strict=True)]
    is_text = input_ids != IMAGE_TOKEN_INDEX
    texts = embed(input_ids[is_text]).split(sizes)
    text_labels = labels[is_text].split(sizes)

    embeds, positions, spliced_labels, videos, offset = [], [], [], [], 0
    for index, (text, label) in enumerate(zip(texts, text_labels, strict=True)):
        embeds.append(text)
        positions.append(torch.arange(offset, offset + len(text), device=input_ids.device))
        spliced_labels.append(label)
        videos.append(torch.zeros_like(label))
        offset += len(text)
        if index < len(items):
            item = items[index]
            embeds.append(item.embeds.to(text))
            positions.append(item.positions.to(input_ids.device) + offset)
            spliced_labels.append(label.new_full((len(item.embeds),), IGNORE_INDEX))
            groups = torch.zeros_like(spliced_labels[-1]) if item.groups is None else item.groups.to(label)
            started = 0 if item.groups is None else GROUPS * (index + 1)
            videos.append(torch.where(groups < 0, groups, groups + started))
            offset += item.length
    row = torch.cat(embeds)
    position_ids = torch.cat(positions) if source_positions else torch.arange(len(row), device=input_ids.device)
    return Row(row, position_ids, torch.cat(spliced_labels), torch.cat(videos))


def pad_rows(rows: Sequence[Row], side: str) -> PaddedBatch:
    """Pad with zero vectors, position 0, ignored labels and no video on the "left" or the "right" side.

    Raises:
        UserError: another side.
    """
    if side not in ("left", "right"):
        raise UserError(f'tokenizer_padding_side is {side!r}; use "left" or "right".')
    longest = max(len(row.embeds) for row in rows)
    first = rows[0]
    embeds = first.embeds.new_zeros(len(rows), longest, first.embeds.shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=embeds.device)
    position_ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=embeds.device)
    labels = torch.full((len(rows), longest), IGNORE_INDEX, dtype=torch.int64, device=embeds.device)
    videos = torch.zeros_like(position_ids)
    for index, row in enumerate(rows):
        length = len(row.embeds)
        span = slice(0, length) if side == "right" else slice(longest - length, longest)
        embeds[index, span] = row.embeds
        mask[index, span] = True
        position_ids[index, span] = row.position_ids
        labels[index, span] = row.labels
        videos[index, span] = row.videos
    return PaddedBatch(embeds, mask, position_ids, labels, videos)
