"""From result.json to Markdown: tables, what dominates, and whether compression pays."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.efficiency.config import Cell
from eval.efficiency.measure import STAGES

PARTS = (*STAGES, "other")
"""What the time to first token consists of."""

OPERATIONS = ("counted", "linear", "with_full_attention", "with_causal_attention")

DISTURBED = 0.1
"""How much the vision tower's time, on which compression has no influence, may differ before the reader is told."""

LABELS = {
    "vision_tower": "vision tower",
    "projector": "projector and pooling",
    "compression": "compression",
    "prefill": "prefill",
    "other": "other",
    "time_to_first_token": "time to first token",
    "further_question": "first token of a further question",
    "per_generated_token": "per generated token",
}


def cell_of(result: Mapping[str, Any]) -> Cell:
    """The setting of an entry of "cells"."""
    return Cell(**result["cell"])


def baseline_of(result: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The measured uncompressed cell with the same frames and batch size."""
    cell = cell_of(result)
    wanted = Cell(cell.frames, cell.batch_size)
    return next((other for other in cells if cell_of(other) == wanted and other["status"] == "measured"), None)


def report(result: Mapping[str, Any]) -> str:
    """The whole of result.md."""
    cells = result["cells"]
    measured = [cell for cell in cells if cell["status"] == "measured"]
    blocks = [f"# {result['name']}", describe(result), "## Before the model", inputs_table(result["inputs"])]
    if measured:
        blocks += ["## Milliseconds", "Median (10th to 90th percentile).", times_table(measured)]
        blocks += ["## Memory and operations", sizes_table(measured), *_notes_on_operations(measured)]
    blocks += ["## What it says", "\n".join(f"- {sentence}" for sentence in sentences(cells))]
    return "\n\n".join(blocks) + "\n"


def describe(result: Mapping[str, Any]) -> str:
    """Where and on what it was measured."""
    environment, model = result["environment"], result["model"]
    hardware = environment["hardware"]
    place = ", ".join(hardware["gpus"]) if model["device"].startswith("cuda") else hardware["cpu"]
    packages = environment["packages"]
    return (
        f"{model['description']}, {model['dtype']}, {model['attention']} attention, on {model['device']}: {place} "
        f"({hardware['cores']} cores, {hardware['torch_threads']} threads), PyTorch {packages.get('torch')}, "
        f"transformers {packages.get('transformers')}, {environment['date'][:10]}. {model['features']}"
    )


def inputs_table(inputs: Mapping[str, Any]) -> str:
    """Milliseconds of decoding and preprocessing one video, on the CPU."""
    rows = [
        [frames, _times(entry["decode_video"]), _times(entry.get("preprocess"))]
        for frames, entry in sorted(inputs.items(), key=lambda item: int(item[0]))
    ]
    return _table(["frames", "decode video, ms", "preprocess, ms"], rows)


def times_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """One row per measured cell."""
    rows = []
    for cell in cells:
        times, baseline = cell["milliseconds"], baseline_of(cell, cells)
        speed_up = "-"
        if baseline is not None:
            whole = "time_to_first_token"
            speed_up = f"{baseline['milliseconds'][whole]['median'] / times[whole]['median']:.2f}"
        rows.append(
            [
                cell_of(cell).name,
                *(_times(times[name]) for name in (*PARTS, "time_to_first_token")),
                speed_up,
                _times(times["further_question"]),
                _times(times["per_generated_token"]),
                f"{cell['tokens_per_second']['median']:.1f}",
                str(cell["runs"]),
            ]
        )
    names = [LABELS[name] for name in (*PARTS, "time_to_first_token")]
    heads = ["setting", *names, "times as fast", LABELS["further_question"], LABELS["per_generated_token"]]
    return _table([*heads, "tokens/s", "runs"], rows)


def sizes_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """One row per measured cell."""
    largest = max(cell["prefill_flops"]["with_full_attention"] for cell in cells)
    unit, name = (1e12, "T") if largest >= 1e12 else (1e9, "G")
    rows = []
    for cell in cells:
        flops, peak = cell["prefill_flops"], cell["peak_memory_bytes"]
        rows.append(
            [
                cell_of(cell).name,
                f"{cell['tokens']['source']} to {cell['tokens']['kept']}",
                "not measured" if peak is None else f"{peak / 2**30:.2f}",
                f"{cell['kv_cache_bytes'] / 2**20:.2f}",
                *(f"{flops[key] / unit:.4g}" for key in OPERATIONS),
                f"{cell['paper_flops'] / unit:.4g}",
            ]
        )
    heads = ["setting", "tokens per video", "peak memory, GiB", "KV cache of the prompts, MiB"]
    heads += [
        f"prefill {name}FLOPs counted",
        "analytic, without attention",
        "with full attention",
        "with causal attention",
        "paper's Eq. 9",
    ]
    return _table(heads, rows)


def sentences(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What dominates the time to first token of each cell, and whether compression pays there."""
    for cell in cells:
        name = cell_of(cell).name
        if cell["status"] != "measured":
            yield f"{name}: {cell['status']} ({cell['reason']})."
            continue
        times = _medians(cell)
        largest = max((part for part in PARTS if part in times), key=times.__getitem__)
        whole = times["time_to_first_token"]
        dominates = (
            f"{LABELS[largest]} dominates, {times[largest] / whole:.0%} of {_number(whole)} ms to the first token"
        )
        if cell_of(cell).method == "none":
            yield f"{name}: {dominates}.{_block(cell)}"
        else:
            yield f"{name}: {dominates}. {_verdict(times, baseline_of(cell, cells))}"


def _verdict(times: Mapping[str, float], baseline: Mapping[str, Any] | None) -> str:
    if baseline is None:
        return "Whether compression pays cannot be said: the uncompressed baseline could not be measured."
    before = _medians(baseline)
    saved = before["prefill"] - times["prefill"]
    ratio = before["time_to_first_token"] / times["time_to_first_token"]
    pays = times["compression"] < saved
    saves = f"saves {_number(saved)} ms of prefill" if saved > 0 else "saves no prefill"
    verdict = (
        f"Compression {'pays' if pays else 'does not pay'}: it takes {_number(times['compression'])} ms and {saves}; "
        f"the first token comes {ratio:.2f} times as fast, and each further one takes "
        f"{_number(times['per_generated_token'])} ms instead of {_number(before['per_generated_token'])}."
    )
    tower, control = times["vision_tower"], before["vision_tower"]
    if abs(tower - control) > DISTURBED * control:
        verdict += (
            f" But the vision tower, which compression leaves alone, took {_number(tower)} ms instead of "
            f"{_number(control)}: the two were not measured under like conditions."
        )
    return verdict


def _block(cell: Mapping[str, Any]) -> str:
    block = cell.get("block")
    if block is None:
        return ""
    first, step, around = (
        _times(block[name]) for name in ("time_to_first_token", "per_generated_token", "enter_and_leave")
    )
    times = cell["milliseconds"]
    return (
        f" In a block that keeps everything the first token comes after {first} ms instead of "
        f"{_times(times['time_to_first_token'])}, and each further one after {step} instead of "
        f"{_times(times['per_generated_token'])}; entering and leaving it takes {around} ms."
    )


def _medians(cell: Mapping[str, Any]) -> dict[str, float]:
    return {part: entry["median"] for part, entry in cell["milliseconds"].items() if entry is not None}


def _notes_on_operations(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    counted = any(cell["prefill_flops"]["attention_counted"] for cell in cells)
    yield (
        "Operations are those of the language model in one prefill of the batch; a multiplication and an addition are "
        "two. Counted by torch.utils.flop_counter, "
        + (
            "which counts all pairs of tokens in attention: compare with full attention. "
            if counted
            else "which does not see this attention kernel: compare without attention. "
        )
        + "Eq. 9 counts a multiplication with its addition as one, heads without grouping, two matrices of the MLP "
        "instead of three, visual tokens alone, and 100 generated tokens."
    )


def _times(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{_number(entry['median'])} ({_number(entry['p10'])} to {_number(entry['p90'])})"


def _number(value: float) -> str:
    """Three digits or more, without a power of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
