"""One cell: the same batch answered many times, then its prefill once more to count operations and cache.

Time to first token starts with pixels in main memory and ends with the first token: it holds vision tower, projector
and pooling, compression, prefill, and between them ("other") the copy to the device, splicing and sampling. Decoding
the file and preprocessing its frames come before it and are measured apart.
"""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteriaList

from eval.efficiency.config import Cell, Measurement
from eval.efficiency.flops import (
    DecoderShape,
    attention_flops,
    count_flops,
    linear_flops,
    paper_flops,
)
from eval.efficiency.inputs import plausible_features, prompts
from eval.efficiency.timing import TokenClock, repeat, spread
from llava.errors import UserError
from llava.instrument import record
from llava.model.video_layout import longest_prompt, video_layout
from llava.token_compression import compression

STAGES = ("vision_tower", "projector", "compression", "prefill")
"""The stages of the time to first token; pooling is in "projector"."""


def measure_cell(
    model: Any, cell: Cell, pixels: torch.Tensor, settings: Measurement, synthetic: bool
) -> dict[str, Any]:
    """Everything that is known of a cell, ready for JSON; "status" says whether it could be measured.

    Args:
        pixels: (frames, 3, side, side) float32 in main memory.
        synthetic: let `plausible_features` take the place of what the tower sees, for random weights.
    """
    torch.cuda.empty_cache()  # what earlier cells left would make this one run out of memory sooner
    try:
        with plausible_features(model, cell.frames, settings.seed) if synthetic else nullcontext(0) as reserved:
            return {"status": "measured", **_measure(model, cell, pixels, settings, reserved)}
    except UserError as error:
        return {"status": "not measured", "reason": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory", "reason": (str(error) or "MemoryError").splitlines()[0]}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has run out of memory."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def _measure(
    model: Any, cell: Cell, pixels: torch.Tensor, settings: Measurement, reserved_bytes: int
) -> dict[str, Any]:
    layout = video_layout(model.config, cell.frames)
    assert layout is not None  # `load_model` takes no model without a vision tower
    budget = cell.compression.budget(layout.tokens) or 0
    positions = budget + layout.newlines + settings.prompt_tokens
    if positions > longest_prompt(model.config):
        raise UserError(f"A prompt of {positions} positions; the checkpoint reads {longest_prompt(model.config)}.")

    rows, device = cell.batch_size, model.device
    ids = prompts(model.config.vocab_size, settings.prompt_tokens, rows, settings.seed, device)
    videos: dict[str, Any] = {"images": [pixels] * rows, "modalities": ["video"] * rows}
    cuda = device.type == "cuda"

    def run() -> tuple[dict[str, float], list[float], int]:
        with record(events=True) as recorder, torch.inference_mode():
            clock = TokenClock(device)
            criteria = StoppingCriteriaList([clock])
            options = {"max_new_tokens": settings.new_tokens, "do_sample": False, "stopping_criteria": criteria}
            model.generate(ids, **videos, **options)
        times = {name: recorder.milliseconds[name] for name in STAGES}
        return times, clock.intervals(), recorder.compressions[0].kept_tokens

    def forget_peak() -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

    with compression(model, cell.compression):
        runs = repeat(run, settings, forget_peak)
        peak = torch.cuda.max_memory_allocated(device) - reserved_bytes if cuda else None
        further = _measure_further_question(model, ids, videos, settings) if rows == 1 else None
        prefill = _count_prefill(model, ids, videos)
    times, intervals, kept = zip(*runs, strict=True)
    first = [steps[0] for steps in intervals]
    shape = DecoderShape.of(model.config)
    milliseconds: dict[str, dict[str, float] | None] = {
        name: spread([stages[name] for stages in times]) for name in STAGES
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
        "tokens": {"source": layout.tokens, "kept": kept[-1], "prompt": prefill.pop("positions")},
        "milliseconds": milliseconds,
        "tokens_per_second": spread([1000 * rows * len(steps[1:]) / sum(steps[1:]) for steps in intervals]),
        "peak_memory_bytes": peak,
        **prefill,
        "paper_flops": rows * paper_flops(shape.layers, shape.hidden, shape.intermediate, kept[-1]),
    }


@torch.inference_mode()
def _measure_further_question(
    model: Any, ids: torch.Tensor, videos: dict[str, Any], settings: Measurement
) -> dict[str, float]:
    """Milliseconds to the first token of an answer about a video that the model has read before."""
    prefix = model.read_prefix(ids, **videos)

    def run() -> float:
        clock = TokenClock(model.device)
        criteria = StoppingCriteriaList([clock])
        model.generate(ids, prefix=prefix, max_new_tokens=1, do_sample=False, stopping_criteria=criteria)
        return clock.intervals()[0]

    return spread(repeat(run, settings))


@torch.no_grad()
def _count_prefill(model: Any, ids: torch.Tensor, videos: dict[str, Any]) -> dict[str, Any]:
    """Positions of the prompt, bytes of its key-value cache, and operations of one prefill of the batch."""
    prompt = model.splice(ids, None, None, videos["images"], videos["modalities"], None, "left")
    output, operators = count_flops(
        lambda: model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention_mask.long(),
            position_ids=prompt.position_ids,
            logits_to_keep=1,
            use_cache=True,
        )
    )
    rows, positions = prompt.attention_mask.shape
    shape = DecoderShape.of(model.config)
    linear = rows * linear_flops(shape, positions)
    full = linear + rows * attention_flops(shape, positions, causal=False)
    counted = sum(operators.values())
    return {
        "positions": positions,
        "kv_cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers),
        "prefill_flops": {
            "counted": counted,
            "counted_operators": operators,
            "attention_counted": counted >= full,
            "linear": linear,
            "with_full_attention": full,
            "with_causal_attention": linear + rows * attention_flops(shape, positions, causal=True),
        },
    }
