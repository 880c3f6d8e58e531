"""Figures against retention, as PNG and SVG: the paper's Figure 4, and the same for any table that asks for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.tables.cells import Cell, Grid
from llava.errors import UserError

CROWD = 12
"""So many methods are named beside the plot, not in it."""


def write_plot(grid: Grid, rows: Sequence[Sequence[Cell]], folder: Path) -> list[Path]:
    """Write `<table>.png` and `.svg`: per column, a line for each method, its bars the 95 % interval, and what is
    published as crosses. Nothing is drawn where nothing is known.

    Raises:
        UserError: matplotlib is not installed.
    """
    known = [cell for cells in rows for cell in cells if cell.ours or cell.published is not None]
    heads = list(dict.fromkeys(cell.column.head for cell in known))
    if not heads:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "The plots need matplotlib: pip install 'llava-scissor[plot]', then run the same command again. What was "
            "measured is kept."
        ) from None
    crowded = len({cell.row.method for cell in known}) > CROWD
    figure = Figure(figsize=((10 if crowded else 6.5) * len(heads), 4.5), layout="tight")
    for index, head in enumerate(heads):
        axes = figure.add_subplot(1, len(heads), index + 1)
        _draw(axes, [cell for cell in known if cell.column.head == head])
        axes.set_xlabel("tokens kept, %")
        axes.set_xscale("log")
        shares = sorted({cell.row.retention for cell in known if cell.row.method != "none"})
        axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
        axes.minorticks_off()
        axes.set_ylabel(head)
        axes.set_title(grid.base.model.path, fontsize="medium")
        if crowded:
            axes.legend(fontsize="xx-small", ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            axes.legend(fontsize="small")
    paths = [folder / f"{grid.table.name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw(axes: Any, cells: Sequence[Cell]) -> None:
    methods = dict.fromkeys(cell.row.name for cell in cells if cell.row.method != "none")
    for number, method in enumerate(methods):
        color = f"C{number % 10}"
        mine = sorted((cell for cell in cells if cell.row.name == method), key=lambda cell: cell.row.retention)
        if ours := [(100 * cell.row.retention, cell.ours) for cell in mine if cell.ours]:
            values = [figure.value for _, figure in ours]
            low = [figure.value - figure.interval[0] for _, figure in ours]
            high = [figure.interval[1] - figure.value for _, figure in ours]
            shape = {"marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar([x for x, _ in ours], values, (low, high), color=color, label=method, **shape)
        if printed := [(100 * cell.row.retention, cell.published) for cell in mine if cell.published is not None]:
            axes.plot(*zip(*printed, strict=True), "x", color=color, label=f"{method}, published")
    for cell in cells:
        if cell.row.method == "none" and cell.ours:
            axes.axhline(cell.ours.value, color="gray", linestyle=":", label="uncompressed")
