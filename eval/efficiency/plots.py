"""Plots of a result, as PNG and SVG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.efficiency.report import LABELS, PARTS, cell_of
from llava.errors import UserError


def write_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `stages-batch<B>` and `first_token-batch<B>` for each batch size; return where they lie.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "The plots need matplotlib: pip install 'llava-scissor[plot]', then run the same command again. What was "
            "measured is kept."
        ) from None
    paths = []
    measured = [cell for cell in result["cells"] if cell["status"] == "measured"]
    for batch in dict.fromkeys(cell_of(cell).batch_size for cell in measured):
        cells = [cell for cell in measured if cell_of(cell).batch_size == batch]
        for name, draw in (("stages", _draw_stages), ("first_token", _draw_first_token)):
            figure = Figure(figsize=(8, max(3, 0.3 * len(cells))) if name == "stages" else (7, 4.5), layout="tight")
            axes = figure.add_subplot()
            draw(axes, cells)
            axes.set_title(f"{result['name']}, batch {batch}")
            axes.legend(fontsize="small")
            for suffix in ("png", "svg"):
                paths.append(folder / f"{name}-batch{batch}.{suffix}")
                figure.savefig(paths[-1], dpi=150)
    return paths


def _draw_stages(axes: Any, cells: list[Mapping[str, Any]]) -> None:
    """Where the time to first token goes: one bar per cell."""
    names = [cell_of(cell).name.replace(f", batch {cell_of(cell).batch_size}", "") for cell in cells]
    left = [0.0] * len(cells)
    for part in PARTS:
        entries = [cell["milliseconds"][part] for cell in cells]
        if None in entries:  # this model does it within another part
            continue
        widths = [max(0.0, entry["median"]) for entry in entries]
        axes.barh(names, widths, left=left, label=LABELS[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds to the first token (medians)")


def _draw_first_token(axes: Any, cells: list[Mapping[str, Any]]) -> None:
    """Time to first token against retention: a line per number of frames and method, its bars from p10 to p90."""
    settings = [cell_of(cell) for cell in cells]
    groups = dict.fromkeys((setting.frames, setting.method) for setting in settings if setting.method != "none")
    for frames, method in groups or dict.fromkeys((setting.frames, "none") for setting in settings):
        chosen = [
            (setting.retention_ratio, cell["milliseconds"]["time_to_first_token"])
            for setting, cell in zip(settings, cells, strict=True)
            if setting.frames == frames and setting.method in (method, "none")
        ]
        chosen.sort(key=lambda pair: pair[0])
        ratios = [100 * ratio for ratio, _ in chosen]
        median = [time["median"] for _, time in chosen]
        below = [time["median"] - time["p10"] for _, time in chosen]
        above = [time["p90"] - time["median"] for _, time in chosen]
        axes.errorbar(ratios, median, yerr=[below, above], marker="o", capsize=3, label=f"{frames} frames, {method}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({100 * setting.retention_ratio for setting in settings}), [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens kept, % (100: uncompressed)")
    axes.set_ylabel("milliseconds to the first token")
