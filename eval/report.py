"""From samples to numbers: accuracies with intervals, token and time statistics, and the table that ends a run.

A sample is a dictionary as `llava.lmms_eval_model` logs it, with the keys added by `eval.worker`:
`score` (0 to 1, or None where the benchmark has no score per sample) and `group` (task_type, duration, kind ...).
A result is what `eval.worker` writes.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Z_95 = 1.959964

TABLE_STAGES = ("vision_tower", "compression", "prefill")


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy overall and by group, tokens per video, and milliseconds per stage of the samples of one setting."""
    scored = [sample for sample in samples if sample["score"] is not None]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for sample in scored:
        for name, value in sample["group"].items():
            groups[name][value].append(sample)
    # A video counts once, however many questions are about it.
    videos = {
        visual: video for sample in samples for visual, video in zip(sample["visuals"], sample["videos"], strict=False)
    }.values()
    stages = list(dict.fromkeys(stage for sample in samples for stage in sample["milliseconds"]))
    return {
        "samples": len(samples),
        "accuracy": accuracy(scored),
        "accuracy_by": {
            name: {value: accuracy(members) for value, members in sorted(values.items())}
            for name, values in groups.items()
        },
        "tokens_before": spread(video["source_tokens"] for video in videos),
        "tokens_after": spread(video["kept_tokens"] for video in videos),
        "retention_ratio": spread(video["kept_tokens"] / video["source_tokens"] for video in videos),
        "tokens_per_layer": spread(video["average_tokens"] for video in videos),
        "milliseconds": {
            stage: spread(sample["milliseconds"][stage] for sample in samples if stage in sample["milliseconds"])
            for stage in stages
        },
    }


def accuracy(samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Percentage with its 95 % interval; None without samples."""
    if not samples:
        return None
    scores = [sample["score"] for sample in samples]
    low, high = clustered_wilson(scores, [str(sample["visuals"]) for sample in samples])
    return {"percent": 100 * statistics.fmean(scores), "interval": [100 * low, 100 * high], "samples": len(samples)}


def clustered_wilson(scores: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """95 % Wilson interval of a proportion whose samples come in clusters (the questions on one video).

    The number of samples is divided by the design effect, the ratio of the variance of the mean with and without
    clusters (at least 1), as questions on one video say less than questions on as many videos.
    """
    n, mean = len(scores), statistics.fmean(scores)
    residuals: dict[str, float] = defaultdict(float)
    for score, cluster in zip(scores, clusters, strict=True):
        residuals[cluster] += score - mean
    independent = mean * (1 - mean) * n
    design_effect = max(1.0, sum(r * r for r in residuals.values()) / independent) if independent > 0 else 1.0
    n_effective = n / design_effect
    center = (mean + Z_95**2 / (2 * n_effective)) / (1 + Z_95**2 / n_effective)
    variance = mean * (1 - mean) / n_effective + Z_95**2 / (4 * n_effective**2)
    half = Z_95 * math.sqrt(variance) / (1 + Z_95**2 / n_effective)
    return max(0.0, center - half), min(1.0, center + half)


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, population standard deviation, median, minimum and maximum; None without values."""
    numbers = list(values)
    if not numbers:
        return None
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.pstdev(numbers),
        "median": statistics.median(numbers),
        "min": min(numbers),
        "max": max(numbers),
    }


def table(results: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """What ends a run: a table with one row per result file, whose times are medians over the questions.

    Below it: the parts of the paper's figure where that is a mean, and what to know about a judge and a submission.
    """
    cells = [_cells(path, result) for path, result in results]
    heads = list(cells[0])
    rows = [heads, *([row.get(head, "-") for head in heads] for row in cells)]
    blocks = [_aligned(rows, left=(0, len(heads) - 1)) + "\n\nms: median over the questions."]
    parts = [result["figure"]["parts"] for _, result in results if result["figure"]]
    if parts and len(parts[0]) > 1:
        lines = [[name, *(f"{part[name]:.2f}" for part in parts)] for name in parts[0]]
        blocks.append(_aligned([["", *(row["setting"] for row in cells)], *lines], left=(0,)))
    blocks += [note for _, result in results for note in _notes(result)]
    return "\n\n".join(blocks)


def _cells(path: Path, result: dict[str, Any]) -> dict[str, str]:
    """A row of the table by heads of columns. A benchmark has a figure, an accuracy, both, or neither."""
    summary, figure = result["summary"], result["figure"]
    accuracy, tokens = summary["accuracy"], summary["tokens_after"]
    cells = {"setting": result["setting"]}
    if figure:
        cells[figure["label"]] = f"{figure['value']:.2f}"
    if accuracy:
        low, high = accuracy["interval"]
        cells["accuracy % (95 % interval)"] = f"{accuracy['percent']:.1f} ({low:.1f} to {high:.1f})"
    scores = [f"{name} {value:.2f}" for task in result["tasks"].values() for name, value in task["scores"].items()]
    if scores and not figure and not accuracy:
        cells["lmms-eval's scores"] = ", ".join(scores)
    cells |= {
        "tokens/video": f"{tokens['mean']:.1f}" if tokens else "-",
        "min": f"{tokens['min']}" if tokens else "-",
        "max": f"{tokens['max']}" if tokens else "-",
    }
    for stage in TABLE_STAGES:
        times = summary["milliseconds"].get(stage)
        cells[f"{stage.replace('_', ' ')} ms"] = f"{times['median']:.1f}" if times else "-"
    return cells | {"result": str(path)}


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """What to know about one setting apart from its numbers."""
    if submission := result["submission"]:
        yield (
            f"{result['setting']}: the right answers are not public. The benchmark's server scores the submission:\n"
            f"curl -X POST -H 'Content-Type: application/json' -d @{submission['path']} {submission['server']}"
        )
    if judge := result["judge"]:
        unusable = f", of which {judge['unusable']} could not be read and count as 0" if judge["unusable"] else ""
        yield (
            f"{result['setting']}: {judge['verdicts']} verdicts{unusable}, by {', '.join(judge['models'])} at "
            f"{judge['base_url']}."
        )


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows in columns, the first row underlined; the columns `left` are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
