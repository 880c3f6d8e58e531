"""Training only: what the language model must know of a video while it reads it, and of an object that is named.

A question about motion or order is one hard bit per video; asked alone, such questions stay at chance for thousands of
steps. But what they ask for can be read off every token: the object that a token shows came from somewhere, was first
seen in some frame, had some color then. Linear heads on the hidden states of the visual tokens after the first
`MEMORY_LAYERS` layers ask for all of it at once, as the tower's dense heads do for single frames.

A question then has to look up what the tokens of the object that it names remember. That, too, is asked densely: after
the video stands every name an object can have ("circle", "red"), and after `NAME_LAYERS` layers heads on it ask for
everything about that object. Without it a run may stay for long where it answers with the motion and the place of
just any object.
"""

import torch
from torch import Tensor, nn

from eval.world import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    MOTIONS,
    PLACES,
    SHAPES,
    Scenes,
    object_centres,
    object_colors,
    object_cover,
    quadrants,
    visible,
)

MEMORY_LAYERS = 2
"""Layers of the language model after which the heads on visual tokens read."""
NAME_LAYERS = 3
"""Layers after which those on names read: one more, in which names look at what visual tokens remember."""
NAMES = (*SHAPES, *COLORS)
IGNORED = -100
MIN_COVER = 0.12
"""Share of a token that an object must cover for the token to be asked about it."""

EVERY_FRAME = -1
"""In place of a width: as many classes as there are frames."""
TOKEN_HEADS = {
    "time": EVERY_FRAME,  # the frame of the token
    "motion": len(MOTIONS),  # of the object that the token shows, once it has been seen for a quarter of the frames
    "origin": len(PLACES),  # where that object was first seen
    "age": EVERY_FRAME,  # in which frame
    "first_color": len(COLORS),
    "first_background": len(BACKGROUNDS),
}
FRAME_HEADS = {
    "there": len(SHAPES) + len(COLORS),  # shapes and colors in this frame (any number)
    "seen": len(SHAPES) + len(COLORS),  # in this frame or an earlier one
    "gone_shape": len(SHAPES) + 1,  # of the object that has vanished, if any
    "gone_color": len(COLORS) + 1,
    "newest_shape": len(SHAPES) + 1,  # of the object that came last, if any came after the first frame
    "newest_color": len(COLORS) + 1,
    "count": MAX_OBJECTS,  # objects seen so far
}
NAME_HEADS = {
    "its_shape": len(SHAPES),
    "its_color": len(COLORS),
    "its_last_color": len(COLORS),
    "its_motion": len(MOTIONS),
    "its_origin": len(PLACES),
    "its_last_place": len(PLACES),
    "its_age": EVERY_FRAME,
}
"""Width of every head: those asked of every token, of the last token of every frame, and of every name."""


def memory_targets(scenes: Scenes, times: Tensor, grid: int) -> dict[str, Tensor]:
    """What every visual token should remember.

    Args:
        scenes: B scenes.
        times: (B, F) times of the frames; frame f of a video is frame f of `TOKEN_HEADS["time"]`.
        grid: tokens per side of a frame.

    Returns:
        Per entry of `TOKEN_HEADS` class indices (B, F, grid * grid), `IGNORED` where nothing is asked; per entry of
        `FRAME_HEADS` class indices (B, F), and for "there" and "seen" (B, F, shapes + colors) in {0, 1}.
    """
    batch, frames = times.shape
    cover = object_cover(scenes, times, grid, samples=8)  # (B, F, O, grid * grid)
    share, owner = cover.max(2)  # (B, F, grid * grid)
    shown = share > MIN_COVER
    there = visible(scenes, times)  # (B, F, O)
    first = there.int().argmax(1)  # (B, O)
    frame = torch.arange(frames)[:, None]

    def of_owner(values: Tensor, valid: Tensor | bool = True) -> Tensor:
        """(B, O) -> (B, F, grid * grid): the value of the object that a token shows."""
        per_token = values[:, None].expand(batch, frames, -1).gather(2, owner)
        return torch.where(shown & torch.as_tensor(valid), per_token, IGNORED)

    def at_first(values: Tensor) -> Tensor:
        """(B, F, O) -> (B, O): the value when the object is first seen."""
        return values.gather(1, first[:, None]).squeeze(1)

    since = of_owner(first)
    seen = there.cummax(1).values
    gone, lost = (seen & ~there).max(2)  # (B, F); at most one object of a scene vanishes
    colors = object_colors(scenes, times)
    looks = [(scenes.shape[:, None].expand_as(colors), len(SHAPES)), (colors, len(COLORS))]
    looks_there = torch.cat([(nn.functional.one_hot(v, n) * there[..., None]).amax(2) for v, n in looks], -1)
    arrival = torch.where(seen & (first > 0)[:, None], first[:, None], -1)  # (B, F, O)
    latest, newest = arrival.max(2)
    shape = scenes.shape.gather(1, newest)
    color = scenes.color.gather(1, newest)
    pattern = scenes.background[:, :1]
    return {
        "time": frame.expand(batch, frames, grid * grid),
        "motion": of_owner(scenes.motion, frame - since >= frames // 4),
        "origin": of_owner(at_first(quadrants(object_centres(scenes, times)))),
        "age": since,
        "first_color": of_owner(at_first(colors)),
        "first_background": pattern[..., None].expand(batch, frames, grid * grid),
        "there": looks_there,
        "seen": looks_there.cummax(1).values,
        "gone_shape": torch.where(gone, scenes.shape.gather(1, lost), len(SHAPES)),
        "gone_color": torch.where(gone, scenes.color.gather(1, lost), len(COLORS)),
        "newest_shape": torch.where(latest > 0, shape, len(SHAPES)),
        "newest_color": torch.where(latest > 0, color, len(COLORS)),
        "count": seen.sum(2) - 1,
    }


def name_targets(scenes: Scenes, times: Tensor) -> dict[str, Tensor]:
    """What is known of each of `NAMES`: per entry of `NAME_HEADS` class indices (B, names).

    `IGNORED` where no object has the name, or where that is not clear: a color that an object changes to or from.
    """
    exists = torch.arange(MAX_OBJECTS) < scenes.count[:, None]  # (B, O)
    steady = exists & (scenes.change > 1)
    bears = torch.cat(
        [
            nn.functional.one_hot(scenes.shape, len(SHAPES)) * exists[..., None],
            nn.functional.one_hot(scenes.color, len(COLORS)) * steady[..., None],
        ],
        -1,
    )  # (B, O, names)
    named, bearer = bears.max(1)  # (B, names)
    there = visible(scenes, times)  # (B, F, O)
    first = there.int().argmax(1)
    last = times.shape[1] - 1 - there.flip(1).int().argmax(1)
    places = quadrants(object_centres(scenes, times))
    colors = object_colors(scenes, times)

    def at(frame: Tensor, values: Tensor) -> Tensor:
        """(B, F, O) -> (B, O): the value in a frame (B, O) of each object's own."""
        return values.gather(1, frame[:, None]).squeeze(1)

    known = {
        "its_shape": scenes.shape,
        "its_color": at(first, colors),
        "its_last_color": at(last, colors),
        "its_motion": scenes.motion,
        "its_origin": at(first, places),
        "its_last_place": at(last, places),
        "its_age": first,
    }
    return {name: torch.where(named > 0, values.gather(1, bearer), IGNORED) for name, values in known.items()}


class MemoryHeads(nn.Module):
    """Linear read-outs of `memory_targets` and `name_targets` from hidden states."""

    def __init__(self, width: int, frames: int):
        super().__init__()

        def heads(widths: dict[str, int]) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: nn.Linear(width, frames if classes == EVERY_FRAME else classes)
                    for name, classes in widths.items()
                }
            )

        self.token, self.frame, self.name = heads(TOKEN_HEADS), heads(FRAME_HEADS), heads(NAME_HEADS)

    def forward(self, hidden: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of the visual tokens' hidden states (B, F, grid * grid, width), and the accuracy of every head."""
        hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:])
        last = hidden[:, :, -1]
        losses, accuracies = [], {}
        for name, head in [*self.token.items(), *self.frame.items()]:
            logits, target = head(hidden if name in TOKEN_HEADS else last), targets[name].to(hidden.device)
            if name in ("there", "seen"):
                losses.append(nn.functional.binary_cross_entropy_with_logits(logits, target.float()))
                right, asked = (logits > 0) == (target > 0), torch.ones_like(target, dtype=torch.bool)
            else:
                losses.append(_loss(logits, target))
                right, asked = logits.argmax(-1) == target, target != IGNORED
                if name.startswith(("newest", "gone")):
                    asked = target < logits.shape[-1] - 1
            accuracies[f"~{name}"] = _share(right, asked)
        return torch.stack(losses).mean(), accuracies

    def about_names(self, hidden: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of the names' hidden states (B, names, width), and the accuracy of every head."""
        hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:])
        losses, accuracies = [], {}
        for name, head in self.name.items():
            logits, target = head(hidden), targets[name].to(hidden.device)
            losses.append(_loss(logits, target))
            accuracies[f"~{name}"] = _share(logits.argmax(-1) == target, target != IGNORED)
        return torch.stack(losses).mean(), accuracies


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over what is asked, 0 where nothing is."""
    flat = target.flatten()
    total = nn.functional.cross_entropy(logits.flatten(0, -2), flat, reduction="sum", ignore_index=IGNORED)
    return total / (flat != IGNORED).sum().clamp(min=1)


def _share(right: Tensor, asked: Tensor) -> float:
    return (right & asked).sum().item() / max(1, asked.sum().item())
