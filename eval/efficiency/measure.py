"""One cell: the same batch answered many times, then its prefill once more to count operations and cache.

Time to first token starts with pixels in main memory and ends with the first token: it holds vision tower, projector
and pooling, compression, prefill, and between them ("other") the copy to the device, splicing and sampling. Decoding
the file and preprocessing its frames come before it and are measured apart.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteriaList

from eval.efficiency.config import Cell, Measurement
from eval.efficiency.flops import DecoderShape, attention_flops, linear_flops, paper_flops
from eval.efficiency.subject import Prefill, Subject
from eval.efficiency.timing import TokenClock, repeat, spread
from llava.errors import UserError
from llava.instrument import record
from llava.token_compression import compression

STAGES = ("vision_tower", "projector", "compression", "prefill")
"""The stages of the time to first token; pooling is in "projector", and that in "vision_tower" where a model does both
in one."""

Run = tuple[dict[str, float], list[float], int]
"""Milliseconds of the stages, and from token to token; tokens kept of a video."""


def measure_cell(subject: Subject, cell: Cell, pixels: Any, settings: Measurement) -> dict[str, Any]:
    """Everything that is known of a cell, ready for JSON; "status" says whether it could be measured.

    Args:
        pixels: what `subject.inputs` gave.
    """
    torch.cuda.empty_cache()  # what earlier cells left would make this one run out of memory sooner
    try:
        with subject.features(cell, settings.seed) as reserved:
            return {"status": "measured", **_measure(subject, cell, pixels, settings, reserved)}
    except UserError as error:
        return {"status": "not measured", "reason": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory", "reason": (str(error) or "MemoryError").splitlines()[0]}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has run out of memory."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def _measure(subject: Subject, cell: Cell, pixels: Any, settings: Measurement, reserved_bytes: int) -> dict[str, Any]:
    source = subject.layout(cell.frames).kept
    arguments, positions = subject.arguments(cell, pixels, settings)
    positions += (cell.compression.budget(source) or 0) - source
    if positions > subject.longest_prompt:
        raise UserError(f"A prompt of {positions} positions; the checkpoint reads {subject.longest_prompt}.")

    rows, device = cell.batch_size, subject.model.device
    cuda = device.type == "cuda"

    def run() -> Run:
        with record(events=True) as recorder, torch.inference_mode():
            clock = TokenClock(device)
            criteria = StoppingCriteriaList([clock])
            subject.generate(arguments, max_new_tokens=settings.new_tokens, do_sample=False, stopping_criteria=criteria)
        times = {name: recorder.milliseconds[name] for name in subject.stages}
        return times, clock.intervals(), _kept(recorder.compressions, cell, source)

    def forget_peak() -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

    block = _BlockCost(subject, cell, run)
    with subject.setting(cell):
        runs = repeat(block.run, settings, forget_peak)
        peak = torch.cuda.max_memory_allocated(device) - reserved_bytes if cuda else None
        ask = subject.further_question(arguments)
        further = None if ask is None else spread(repeat(ask, settings))
        prefill = subject.prefill(arguments)
    times, intervals, kept = zip(*runs, strict=True)
    first = [steps[0] for steps in intervals]
    shape = DecoderShape.of(subject.decoder)
    milliseconds: dict[str, dict[str, float] | None] = {
        name: spread([stages[name] for stages in times]) if name in subject.stages else None for name in STAGES
    }
    others = [whole - sum(stages.values()) for whole, stages in zip(first, times, strict=True)]
    milliseconds |= {
        "other": spread(others),
        "time_to_first_token": spread(first),
        "per_generated_token": spread([step for steps in intervals for step in steps[1:]]),
        "further_question": further,
    }
    return {
        "runs": len(runs),
        "tokens": {"source": source, "kept": kept[-1], "prompt": prefill.positions},
        "milliseconds": milliseconds,
        "block": block.cost(len(runs)),
        "tokens_per_second": spread([1000 * rows * len(steps[1:]) / sum(steps[1:]) for steps in intervals]),
        "peak_memory_bytes": peak,
        "kv_cache_bytes": prefill.cache_bytes,
        "prefill_flops": _operations(prefill, shape, rows),
        "paper_flops": rows * paper_flops(shape.layers, shape.hidden, shape.intermediate, kept[-1]),
    }


def _kept(compressions: list[Any], cell: Cell, source: int) -> int:
    """Tokens kept of a video; a bare model, which is a baseline, keeps all without saying so."""
    return source if cell.method == "none" else compressions[0].kept_tokens


class _BlockCost:
    """What the `compression` block costs by itself: in turn without it, and in one that keeps everything."""

    def __init__(self, subject: Subject, cell: Cell, run: Callable[[], Run]) -> None:
        self._model, self._run = subject.model, run
        self._measured = subject.has_block and cell.method == "none"
        self._inside: list[list[float]] = []
        self._around: list[float] = []

    def run(self) -> Run:
        if self._measured:
            start = time.perf_counter()
            with compression(self._model, method="none"):
                entered = time.perf_counter()
                self._inside.append(self._run()[1])
                left = time.perf_counter()
            self._around.append(1000 * (time.perf_counter() - left + entered - start))
        return self._run()

    def cost(self, runs: int) -> dict[str, dict[str, float]] | None:
        """Milliseconds inside of it, and of entering and leaving it, over the last so many runs."""
        if not self._measured:
            return None
        inside = self._inside[-runs:]
        return {
            "time_to_first_token": spread([steps[0] for steps in inside]),
            "per_generated_token": spread([step for steps in inside for step in steps[1:]]),
            "enter_and_leave": spread(self._around[-runs:]),
        }


def _operations(prefill: Prefill, shape: DecoderShape, rows: int) -> dict[str, Any]:
    linear = rows * linear_flops(shape, prefill.positions)
    full = linear + rows * attention_flops(shape, prefill.positions, causal=False)
    counted = sum(prefill.operators.values())
    return {
        "counted": counted,
        "counted_operators": prefill.operators,
        "attention_counted": counted >= full,
        "linear": linear,
        "with_full_attention": full,
        "with_causal_attention": linear + rows * attention_flops(shape, prefill.positions, causal=True),
    }
