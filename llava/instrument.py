"""Milliseconds and token counts per stage, recorded only while someone asks.

    with record() as recorder:
        model.generate(...)
    recorder.milliseconds["vision_tower"], recorder.compressions

Code that belongs to a stage runs inside `with stage("vision_tower", device):`. Without an active recorder a stage
costs one context-variable look-up: nothing is timed and no device is synchronised. Recorders are per context (thread
or task), so two threads measuring two models do not mix.

By default a CUDA device is synchronised at the boundaries of its stages, which keeps the processor from running ahead
of it. With `record(events=True)` it is not: the stages mark the device's own queue, and the times are known at the
end of the block.
"""

import contextlib
import contextvars
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

STAGES = ("decode_video", "preprocess", "vision_tower", "projector", "compression", "prefill", "decode")
"""Stage names in the order of the data flow; `decode` is the sum over generated tokens after the first."""

_active: contextvars.ContextVar["Recorder | None"] = contextvars.ContextVar("llava_recorder", default=None)


@dataclass
class Recorder:
    """What one `record()` block saw.

    Attributes:
        milliseconds: wall-clock milliseconds per stage name, summed over the block; devices are synchronised at
            stage boundaries. Of device events, where they are asked for: complete when the block has ended.
        compressions: the `CompressionResult.stats` of every compressed video, in order.
    """

    milliseconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    compressions: list[Any] = field(default_factory=list)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = None
    _running: set[str] = field(default_factory=set)


@contextlib.contextmanager
def record(events: bool = False) -> Iterator[Recorder]:
    """Record stages run in this context. Nested blocks record separately: the innermost one wins.

    Args:
        events: time stages on CUDA devices by events on the device; stages on the CPU are timed as always.
    """
    recorder = Recorder(_events=[] if events else None)
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)
    for name, start, end in recorder._events or ():
        end.synchronize()
        recorder.milliseconds[name] += start.elapsed_time(end)


def active() -> Recorder | None:
    """The recorder of the innermost `record()` block, or None."""
    return _active.get()


@contextlib.contextmanager
def stage(name: str, device: torch.device | None = None) -> Iterator[None]:
    """Add the time of this block to stage `name` of the active recorder, if there is one and it is not in it yet."""
    recorder = _active.get()
    if recorder is None or name in recorder._running:
        yield
        return
    recorder._running.add(name)
    try:
        if recorder._events is not None and device is not None and device.type == "cuda":
            began = device_event(device)
            yield
            recorder._events.append((name, began, device_event(device)))
            return
        _synchronise(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronise(device)
            recorder.milliseconds[name] += 1000 * (time.perf_counter() - start)
    finally:
        recorder._running.discard(name)


def device_event(device: torch.device) -> torch.cuda.Event:
    """An event with a time, put into the current queue of a CUDA device."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
