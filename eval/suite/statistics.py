"""Figures with intervals, paired: what is drawn anew is videos, with all questions about each.

The same videos are drawn for every setting of a model, so that the interval of a difference is that of its draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eval.suite.features import Asked
from eval.tables.bootstrap import DRAWS, Estimate

Right = Sequence[bool]
"""Whether each question was answered right, in the order of the questions."""


class Questions:
    """The questions of a run, and the accuracy of answers to some of them.

    Args:
        asked: all questions, those about a video together.
        seed: of the draws.
    """

    def __init__(self, asked: Sequence[Asked], seed: int = 0) -> None:
        self.asked = asked
        numbers = list(dict.fromkeys(one.video for one in asked))
        self.video = np.array([numbers.index(one.video) for one in asked])
        generator = np.random.default_rng(seed)
        self.drawn = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=DRAWS)

    def accuracy(self, right: Right, chosen: Callable[[Asked], bool] = lambda one: True) -> Estimate | None:
        """Percent, the mean over the kinds of the questions that are chosen; None where none is."""
        kinds: dict[str, list[int]] = {}
        for index, one in enumerate(self.asked):
            if chosen(one):
                kinds.setdefault(one.kind, []).append(index)
        if not kinds:
            return None
        scores, values, draws = np.asarray(right, dtype=float), [], []
        for members in kinds.values():
            videos = self.video[members]
            sums = np.bincount(videos, scores[members], self.drawn.shape[1])
            counts = np.bincount(videos, minlength=self.drawn.shape[1])
            values.append(sums.sum() / counts.sum())
            with np.errstate(invalid="ignore"):  # a kind that a draw has no question of
                draws.append((self.drawn @ sums) / (self.drawn @ counts))
        known = np.isfinite(draws)
        mean = np.sum(draws, axis=0, where=known) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
        return Estimate(100 * float(np.mean(values)), 100 * mean)

    def groups(self) -> dict[str, dict[str, Callable[[Asked], bool]]]:
        """The ways in which questions are divided, and the parts of each."""
        return {
            "kind": {kind: _is("kind", kind) for kind in sorted({one.kind for one in self.asked})},
            "object": {size: _is("size", size) for size in ("small", "large")},
            "motion": {"moving": _is("moving", True), "still": _is("moving", False)},
            "length": {
                "8 to 22 frames": lambda one: one.frames <= 22,
                "23 to 44 frames": lambda one: 22 < one.frames <= 44,
                "45 frames and more": lambda one: one.frames > 44,
            },
        }


def p_value(difference: Estimate) -> float:
    """Two-sided, of no difference: the draws taken as normal."""
    spread = float(np.nanstd(difference.draws))
    if spread == 0:
        return 1.0 if difference.value == 0 else 0.0
    return math.erfc(abs(difference.value) / spread / math.sqrt(2))


def holm(p_values: Mapping[object, float], level: float = 0.05) -> set[object]:
    """Those of many comparisons that differ, with at most this chance that one of them does not (Holm's method)."""
    differ: set[object] = set()
    for rank, (key, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if value > level / (len(p_values) - rank):
            break
        differ.add(key)
    return differ


def _is(name: str, value: object) -> Callable[[Asked], bool]:
    return lambda one: getattr(one, name) == value
