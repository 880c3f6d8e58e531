"""Questions about a scene of the procedural world, with answers known by construction.

Every kind of question has a four-option form and, where the answer is unique without options, a free form. Wrong
options are drawn from what the same video also shows (colors of the other objects, the color before a change, the
motions of the others ...) wherever it shows enough of it, so that an option cannot be right merely by being present.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eval.world import BACKGROUNDS, COLORS, MAX_OBJECTS, MOTIONS, NEVER, PLACES, SHAPES, STEP, Scenes, quadrants

NUMBERS = ("one", "two", "three", "four")

TASK_TYPES = {
    "color": "Attribute Perception",
    "shape": "Object Recognition",
    "small": "Attribute Perception",
    "motion": "Action Recognition",
    "place": "Spatial Perception",
    "count": "Counting Problem",
    "absent": "Object Reasoning",
    "change": "Action Reasoning",
    "order": "Temporal Reasoning",
    "vanish": "Temporal Perception",
    "scene": "Information Synopsis",
    "exist": "Object Recognition",
}
"""Every kind of question and the Video-MME task type it stands in for. `exist` (yes or no) has no options."""

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question: `options` are four strings without letters (empty for a question that has only the free form),
    `answer` is the index of the right one, `free_text_answer` a word, or None where options are needed."""

    kind: str
    text: str
    options: tuple[str, ...]
    answer: int
    free_text_answer: str | None

    @property
    def task_type(self) -> str:
        return TASK_TYPES[self.kind]

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True)
class _Object:
    color: str
    new_color: str | None
    shape: str
    motion: str
    small: bool
    start: tuple[float, float]
    end: tuple[float, float]
    appear: float
    vanish: float

    @property
    def seen(self) -> float:
        """The share of the video in which the object is there."""
        return min(self.vanish, 1.0) - max(self.appear, 0.0)

    @property
    def colors(self) -> tuple[str, ...]:
        return (self.color,) if self.new_color is None else (self.color, self.new_color)


def ask(scenes: Scenes, row: int, rng: random.Random, hard: float = 1.0) -> list[Question]:
    """All questions that scene `row` supports, in random order, at most two of a kind.

    `hard` is the probability that a question's wrong options come from what the video shows; the rest draws them at
    random (an easier curriculum for training).
    """
    questions = list(_questions(_objects(scenes, row), _scene_cut(scenes, row), rng, hard))
    rng.shuffle(questions)
    return questions


def _objects(scenes: Scenes, row: int) -> list[_Object]:
    one = scenes[row : row + 1]
    values = {name: getattr(one, name)[0].tolist() for name in vars(one)}
    return [
        _Object(
            color=COLORS[values["color"][i]],
            new_color=COLORS[values["new_color"][i]] if values["change"][i] < NEVER else None,
            shape=SHAPES[values["shape"][i]],
            motion=MOTIONS[values["motion"][i]],
            small=values["small"][i],
            start=tuple(values["start"][i]),
            end=tuple(a + b for a, b in zip(values["start"][i], values["shift"][i], strict=True)),
            appear=values["appear"][i],
            vanish=values["vanish"][i],
        )
        for i in range(values["count"])
    ]


def _scene_cut(scenes: Scenes, row: int) -> tuple[str, str, bool]:
    first, last = scenes.background[row].tolist()
    return BACKGROUNDS[first], BACKGROUNDS[last], bool(scenes.cut[row] < NEVER)


def _questions(
    objects: list[_Object], backgrounds: tuple[str, str, bool], rng: random.Random, hard: float
) -> Iterator[Question]:
    colors_shown = [color for thing in objects for color in thing.colors]
    shapes_shown = [thing.shape for thing in objects]
    motions_shown = [thing.motion for thing in objects]

    def choose(kind: str, text: str, answer: str, shown: list[str], values: tuple[str, ...], free: bool = True):
        """A question whose wrong options come from `shown` as far as they reach, then from `values`."""
        wrong = [value for value in dict.fromkeys(shown) if value != answer] if rng.random() < hard else []
        rng.shuffle(wrong)
        others = [value for value in values if value != answer and value not in wrong]
        wrong = (wrong + rng.sample(others, len(others)))[:3]
        options = [*wrong, answer]
        rng.shuffle(options)
        return Question(kind, text, tuple(options), options.index(answer), answer if free else None)

    steady = [thing for thing in objects if thing.new_color is None]
    long_seen = [thing for thing in objects if thing.seen > 3.4 * STEP]

    for thing in rng.sample(steady, min(2, len(steady))):
        yield choose("color", f"What color is the {thing.shape}?", thing.color, colors_shown, COLORS)
    for thing in rng.sample(steady, min(2, len(steady))):
        yield choose("shape", f"Which shape is {thing.color}?", thing.shape, shapes_shown, SHAPES)

    little = [thing for thing in steady if thing.small]
    if little and len(objects) > 1:
        yield choose("small", "What color is the small object?", little[0].color, colors_shown, COLORS)
        yield choose("small", "Which shape is small?", little[0].shape, shapes_shown, SHAPES)

    for thing in rng.sample(long_seen, min(2, len(long_seen))):
        yield choose("motion", f"What is the motion of the {thing.shape}?", thing.motion, motions_shown, MOTIONS)

    spots = []
    for thing in objects:
        if thing.appear < 0 and (place := _place(thing.start)):
            spots.append((f"At the start, where is the {thing.shape}?", place))
        if thing.vanish > 1 and (place := _place(thing.end)):
            spots.append((f"At the end, where is the {thing.shape}?", place))
    for text, place in rng.sample(spots, min(2, len(spots))):
        yield choose("place", text, place, list(PLACES), PLACES)

    yield choose("count", "How many objects are there in total?", NUMBERS[len(objects) - 1], list(NUMBERS), NUMBERS)

    if len(set(colors_shown)) >= 3:
        missing = rng.choice([color for color in COLORS if color not in colors_shown])
        options = [*rng.sample(sorted(set(colors_shown)), 3), missing]
        rng.shuffle(options)
        yield Question("absent", "Which color is not shown?", tuple(options), options.index(missing), None)
    if len(objects) == MAX_OBJECTS - 1:
        missing = next(shape for shape in SHAPES if shape not in shapes_shown)
        yield choose("absent", "Which shape is not shown?", missing, shapes_shown, SHAPES)

    for thing in objects:
        if thing.new_color is not None:
            for moment, color in (("start", thing.color), ("end", thing.new_color)):
                text = f"At the {moment}, what color is the {thing.shape}?"
                yield choose("change", text, color, colors_shown, COLORS)

    latest = sorted(objects, key=lambda thing: thing.appear)
    if len(objects) > 1 and latest[-1].appear > max(latest[-2].appear, 0):
        yield choose("order", "Which shape appears last?", latest[-1].shape, shapes_shown, SHAPES)
        if latest[-1].new_color is None:
            yield choose("order", "Which color appears last?", latest[-1].color, colors_shown, COLORS)
    gone = [thing for thing in objects if thing.vanish < 1]
    if len(gone) == 1:
        yield choose("vanish", "Which shape disappears?", gone[0].shape, shapes_shown, SHAPES)
        if gone[0].new_color is None:
            yield choose("vanish", "Which color disappears?", gone[0].color, colors_shown, COLORS)

    first, last, cut = backgrounds
    if cut:
        yield choose("scene", "At the start, what is the background?", first, list(BACKGROUNDS), BACKGROUNDS)
        yield choose("scene", "At the end, what is the background?", last, list(BACKGROUNDS), BACKGROUNDS)
    else:
        yield choose("scene", "What is the background?", first, list(BACKGROUNDS), BACKGROUNDS)

    values, shown, text = rng.choice(
        [(COLORS, colors_shown, "Is anything {}?"), (SHAPES, shapes_shown, "Is there a {}?")]
    )
    there = rng.random() < 0.5
    candidates = [value for value in values if (value in shown) == there]
    if candidates:
        yield Question("exist", text.format(rng.choice(candidates)), (), -1, "yes" if there else "no")


def _place(point: tuple[float, float]) -> str | None:
    """The quadrant of a point that lies clearly inside one, else None."""
    place = int(quadrants(torch.tensor(point)))
    return PLACES[place] if place >= 0 else None
