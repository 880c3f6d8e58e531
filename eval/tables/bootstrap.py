"""A figure of a benchmark, of which the questions are a sample: its interval, and that of a change, by bootstrap.

What is drawn anew are videos, with all questions about each, as those are not independent. Two settings are given the
same draws: the interval of their difference is paired, question by question.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.tables.published import Column

DRAWS = 2000
Sample = dict[str, Any]
"""A line of samples.jsonl, as `eval.worker` writes it."""


@dataclass(frozen=True)
class Estimate:
    """A figure and what it is in each of `DRAWS` draws of as many videos, with replacement."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        low, high = np.nanpercentile(self.draws, (2.5, 97.5))
        return float(low), float(high)

    def minus(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)

    def percent_of(self, other: "Estimate") -> "Estimate":
        """Not a number where `other` is 0, as it may be in a draw of few questions."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(100 * self.value / np.float64(other.value)), 100 * self.draws / other.draws)

    @staticmethod
    def mean(estimates: Sequence["Estimate"]) -> "Estimate":
        return Estimate(
            float(np.mean([estimate.value for estimate in estimates])),
            np.mean([estimate.draws for estimate in estimates], axis=0),
        )


def estimate(column: Column, samples: Sequence[Sample], seed: int = 0) -> Estimate | None:
    """The figure of `column` over the samples of one setting; None where none of them has a score.

    The same questions and seed give the same draws, whatever the scores.
    """
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)  # by video and group
    for sample in samples:
        if column.task in (None, sample["task"]):
            for group, score in _scores(column, sample):
                scores[str(sample["visuals"]), group].append(score)
    if not scores:
        return None
    videos = {video: index for index, video in enumerate(dict.fromkeys(video for video, _ in scores))}
    groups = {group: index for index, group in enumerate(dict.fromkeys(group for _, group in scores))}
    sums = np.zeros((len(videos), len(groups)))
    counts = np.zeros_like(sums)
    for (video, group), values in scores.items():
        sums[videos[video], groups[group]] = sum(values)
        counts[videos[video], groups[group]] = len(values)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(videos), np.full(len(videos), 1 / len(videos)), size=DRAWS)
    with np.errstate(invalid="ignore"):  # a small group may be missing from a draw, and then from its mean
        draws = np.nanmean((drawn @ sums) / (drawn @ counts), axis=1)
    scale = 100 if column.of == "accuracy" else 1
    return Estimate(scale * float(np.mean(sums.sum(0) / counts.sum(0))), scale * draws)


def same_questions(first: Sequence[Sample], second: Sequence[Sample]) -> bool:
    """Whether two settings were asked the same, in the same order."""
    keys = [[(sample["task"], sample["doc_id"], sample["question"]) for sample in each] for each in (first, second)]
    return keys[0] == keys[1]


def _scores(column: Column, sample: Sample) -> Iterator[tuple[str, float]]:
    """The scores of one question, each with the group whose mean it is part of."""
    if column.of == "accuracy":
        if sample["score"] is not None:
            group = {None: "", "task": sample["task"], "task_type": sample["group"].get("task_type", "")}
            yield group[column.mean_over], sample["score"]
        return
    for metric, score in (sample["verdict"] or {}).items():
        if metric == column.of or (column.mean_over == "metric" and metric.startswith(column.of)):
            yield metric, score
