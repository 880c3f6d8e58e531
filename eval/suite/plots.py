"""Accuracy against retention, as PNG and SVG."""

from pathlib import Path
from typing import Any

from eval.suite.report import Outcome


def write_plot(outcome: Outcome, title: str, path: Path) -> list[Path]:
    """Write `path` with the suffixes .png and .svg: a line for each method, none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(9, 5.5), layout="tight")
    axes = figure.add_subplot()
    lines = 0
    for number, method in enumerate(outcome.methods):
        points = [
            (100 * ratio, own)
            for ratio in sorted(outcome.suite.retention_ratios)
            if (own := outcome.accuracy.get((method, ratio)))
        ]
        if points:
            is_reference = method == outcome.suite.reference
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            shape: dict[str, Any] = {
                "linewidth": 2.5 if is_reference else 1.2,
                "marker": "o",
                "markersize": 3,
                "linestyle": style,
            }
            color = "black" if is_reference else f"C{number % 10}"
            axes.plot([x for x, _ in points], [own.value for _, own in points], color=color, label=method, **shape)
            lines += 1
    whole = outcome.accuracy.get(("uncompressed", 1.0))
    if whole:
        axes.axhline(whole.value, color="gray", linestyle=":", label="uncompressed")
    axes.axhline(25, color="lightgray", linestyle=":")
    axes.set_xscale("log")
    ratios = sorted(outcome.suite.retention_ratios)
    axes.set_xticks([100 * ratio for ratio in ratios], [f"{100 * ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("tokens kept, %")
    axes.set_ylabel("right, % (mean over kinds of questions)")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="x-small", ncols=1 + lines // 24, loc="center left", bbox_to_anchor=(1, 0.5))
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in paths:
        figure.savefig(target, dpi=150)
    return paths
