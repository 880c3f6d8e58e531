"""Tables on disk: Markdown for reading, CSV with everything."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.tables.bootstrap import Estimate
from eval.tables.cells import COMPUTED, STATES, Cell, Grid
from llava.errors import UserError

FIELDS = (
    *("table", "base_model", "method", "label", "retention", "column", "benchmark", "published", "ours", "low", "high"),
    *("change", "change_low", "change_high", "published_change", "difference", "outside_noise", "state", "reason"),
    *("source", "result"),
)

LEGEND = (
    "A cell: ours with its 95 % interval; its change from the uncompressed run; what is published; and the difference "
    "between our change and the published one (of the figures themselves without compression), with `!` where what is "
    "published lies outside the 95 % interval of what is measured. Intervals are of a bootstrap over videos; that of a "
    "change is paired with the uncompressed run on the same questions. Numbers in brackets say why there is no figure."
)


def markdown(grid: Grid, rows: Sequence[Sequence[Cell]]) -> str:
    """The table for reading; rows of other base models are in a table of their own."""
    table, experiment = grid.table, grid.base
    title = f"Table {table.name}: {table.title}" if table.name[0].isdigit() else table.title
    about = [
        f"Published: {table.source}.",
        f"Ours: `{experiment.model.path}`, data: {experiment.evaluation.data}, by `bash scripts/reproduce_tables.sh "
        f"--table {table.name}`.",
    ]
    reasons: dict[str, int] = {}
    blocks = [f"# {title}", " ".join(about)]
    own = [cells for cells in rows if cells[0].row.base_model is None]
    if not grid.comparable:
        blocks.append("What is published is of another base model or other data, and not beside ours but below.")
    draw = _methods_by_retention if table.every_method_at else _grid
    blocks += [draw(own, reasons), LEGEND]
    blocks += [f"[{number}] {reason}." for reason, number in reasons.items()]
    others = [cells for cells in rows if cells[0].row.base_model]
    if not grid.comparable and any(value is not None for row in table.rows for value in row.values):
        blocks += [f"## Published, base model of {table.config}", _grid(own, {}, theirs=True)]
    if others:
        blocks += ["## Published, other base models", _grid(others, {}, theirs=True)]
    if table.notes:
        blocks += ["## Before comparing", "\n".join(f"- {note.strip()}" for note in table.notes)]
    return "\n\n".join(blocks) + "\n"


def _grid(rows: Sequence[Sequence[Cell]], reasons: dict[str, int], theirs: bool = False) -> str:
    heads = ["method", "retention %", *(cell.column.head for cell in rows[0])]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' + ' --: |' * (len(heads) - 1)}"]
    places = [max(_decimals(cell.printed) for cell in column) for column in zip(*rows, strict=True)]
    for cells in rows:
        row = cells[0].row
        figures = [
            _text(cell.printed, digits) if theirs else _figure(cell, digits, reasons)
            for cell, digits in zip(cells, places, strict=True)
        ]
        lines.append(f"| {row.name} | {100 * row.retention:g} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _methods_by_retention(rows: Sequence[Sequence[Cell]], reasons: dict[str, int]) -> str:
    """One table for each column, of which a row is a method and a column a retention."""
    retentions = sorted({cells[0].row.retention for cells in rows}, reverse=True)
    blocks = []
    for index, column in enumerate(cell.column for cell in rows[0]):
        lines = [f"| {column.head}, of tokens kept | {' | '.join(f'{100 * r:g} %' for r in retentions)} |"]
        lines.append(f"|{' --- |' + ' --: |' * len(retentions)}")
        for name in dict.fromkeys(cells[0].row.name for cells in rows):
            found = {cells[0].row.retention: cells[index] for cells in rows if cells[0].row.name == name}
            figures = [_figure(found[r], 2, reasons) if r in found else "" for r in retentions]
            lines.append(f"| {name} | {' | '.join(figures)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _decimals(value: float | None) -> int:
    return 0 if value is None else len(f"{value:g}".partition(".")[2])


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _figure(cell: Cell, digits: int, reasons: dict[str, int]) -> str:
    published = "" if cell.published is None else f"published {_text(cell.published, digits)}"
    if cell.ours is None:
        text = f"{cell.state}: {cell.reason}" if cell.reason else cell.state
        number = reasons.setdefault(" ".join(text.split()).rstrip("."), len(reasons) + 1)
        return f"{published} [{number}]".strip()
    parts = [
        f"**{cell.ours.value:.2f}**" if cell.state == COMPUTED else f"**{cell.ours.value:.2f}** {_range(cell.ours)}"
    ]
    if cell.change is not None:
        parts.append(f"change {cell.change.value:+.2f} {_range(cell.change, '+')}")
    if cell.difference is not None:
        parts += [published, f"difference {cell.difference:+.2f}{' !' if cell.outside_noise else ''}"]
    return "<br>".join(parts)


def _range(estimate: Estimate, sign: str = "") -> str:
    low, high = estimate.interval
    return f"({low:{sign}.2f} to {high:{sign}.2f})"


def comma_separated(grid: Grid, rows: Sequence[Sequence[Cell]]) -> str:
    """Every cell as one line of CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for cell in (cell for cells in rows for cell in cells):
        row = cell.row
        writer.writerow(
            [
                *(grid.table.name, row.base_model or grid.base.model.path, row.method, row.name, row.retention),
                *(cell.column.head, cell.column.benchmark, cell.published),
                *_estimated(cell.ours),
                *_estimated(cell.change),
                *(cell.published_change, cell.difference, cell.outside_noise, cell.state, cell.reason),
                *(row.source or grid.table.source, cell.result),
            ]
        )
    return file.getvalue()


def _estimated(estimate: Estimate | None) -> list[float | None]:
    if estimate is None:
        return [None, None, None]
    return [round(value, 4) for value in (estimate.value, *estimate.interval)]


def summary(tables: Sequence[tuple[Grid, Sequence[Sequence[Cell]]]]) -> str:
    """How many cells of each table are in which state."""
    counts = {grid.table.name: Counter(cell.state for cells in rows for cell in cells) for grid, rows in tables}
    states = [state for state in STATES if any(count[state] for count in counts.values())]
    lines = [["table", "cells", *states]]
    lines += [[name, str(count.total()), *(str(count[state]) for state in states)] for name, count in counts.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"Cannot write tables to {path.parent}: {error.strerror or error}. Make room, or choose another folder "
            "with evaluation.output_dir=FOLDER, and run the same command again: what is finished is kept."
        ) from error
