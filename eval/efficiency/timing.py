"""Clocks, repetition and percentiles."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria

from eval.efficiency.config import Measurement
from llava.instrument import device_event

T = TypeVar("T")

LEAST_RUNS = 3
"""Runs of a cell that takes longer than `max_seconds`."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` % of the values lie, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    return {"median": percentile(values, 50), "p10": percentile(values, 10), "p90": percentile(values, 90)}


def repeat(run: Callable[[], T], settings: Measurement, warm: Callable[[], None] = lambda: None) -> list[T]:
    """What the timed runs return; `warm` is called between the warm-up and them."""
    for _ in range(settings.warmup):
        run()
    warm()
    results: list[T] = []
    began = time.perf_counter()
    while len(results) < settings.runs:
        late = settings.max_seconds is not None and time.perf_counter() - began > settings.max_seconds
        if late and len(results) >= LEAST_RUNS:
            break
        results.append(run())
    return results


class TokenClock(StoppingCriteria):
    """Notes when each token of `generate` is there, and stops nothing.

    On CUDA the notes are events in the device's queue. `generate` itself waits for the device once for every token, so
    they are what a reader of the answer sees.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Note this moment."""
        self._marks.append(device_event(self._device) if self._device.type == "cuda" else time.perf_counter())

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def intervals(self) -> list[float]:
        """Milliseconds from construction to the first token, and from each token to the next."""
        if self._device.type == "cuda":
            self._marks[-1].synchronize()
            return [start.elapsed_time(end) for start, end in zip(self._marks, self._marks[1:], strict=False)]
        return [1000 * (end - start) for start, end in zip(self._marks, self._marks[1:], strict=False)]
