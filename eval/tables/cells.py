"""What is known of each cell of a table: the printed figure, ours if it has been measured, and if not, why not."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache

from eval.benchmarks import find_benchmark
from eval.efficiency.flops import paper_flops
from eval.judge import KEY
from eval.results import finished_result, result_fingerprint, setting_folder
from eval.run import CHECKOUT
from eval.standin import standin_home
from eval.tables.bootstrap import DRAWS, Estimate, Sample, estimate, same_questions
from eval.tables.published import Column, Row, Table
from llava.assets import BUNDLED
from llava.config import Experiment, load_experiment, setting_name
from llava.errors import ConfigError, UserError
from llava.token_compression import list_methods

MEASURED, COMPUTED, NO_METHOD, OTHER_MODEL = "measured", "computed", "no such method", "other base model"
NEEDS_WEIGHTS, NEEDS_JUDGE, NEEDS_SERVER = "needs weights", "needs a judge", "needs the benchmark's server"
STALE, FAILED, NOT_RUN = "out of date", "failed", "not run"
STATES = (MEASURED, COMPUTED, NOT_RUN, STALE, NEEDS_WEIGHTS, NEEDS_JUDGE, NEEDS_SERVER, NO_METHOD, OTHER_MODEL, FAILED)

LAYERS, HIDDEN, INTERMEDIATE, TOKENS = 28, 3584, 18944, 32 * 196
"""Qwen2.5-7B and the visual tokens of 32 frames: what the paper's Table 5 is computed for."""

NOTHING_RIGHT = "the uncompressed run has nothing right, of which there is no percentage"

MEAN = "mean % of uncompressed"

Failures = Mapping[tuple[str, str, str], str]
"""Why a run came to nothing, by config, benchmark and setting; the setting "" stands for all of them."""


@dataclass(frozen=True)
class Cell:
    """One figure of one row.

    Attributes:
        printed: the published figure. published: the same, unless it is of another base model or other data than ours.
        ours: our figure. change: its distance from that of the uncompressed run on the same questions.
        published_change: the same for the printed figures.
        state: one of `STATES`; reason: the rest of the sentence where it is not measured.
        result: the file that ours comes from.
    """

    row: Row
    column: Column
    printed: float | None = None
    published: float | None = None
    ours: Estimate | None = None
    change: Estimate | None = None
    published_change: float | None = None
    state: str = NOT_RUN
    reason: str = ""
    result: Path | None = None

    @property
    def _comparison(self) -> tuple[Estimate, float] | None:
        """What is compared: our change with the printed one, or the figures themselves without compression."""
        for measured, printed in ((self.change, self.published_change), (self.ours, self.published)):
            if measured is not None and printed is not None:
                return measured, printed
        return None

    @property
    def difference(self) -> float | None:
        """Of our change and the printed one; without compression, of our figure and the printed one."""
        compared = self._comparison
        return compared[0].value - compared[1] if compared else None

    @property
    def outside_noise(self) -> bool:
        """Whether what is printed lies outside the 95 % interval of what is measured."""
        compared = self._comparison
        if compared is None or self.state == COMPUTED:
            return False
        low, high = compared[0].interval
        return not low <= compared[1] <= high


class Grid:
    """The cells of one table, run with one experiment file.

    Args:
        table: what is wanted.
        config: an experiment file in place of the table's own; overrides: `section.key=value` for it.

    Raises:
        ConfigError: the file or an override is wrong.
    """

    def __init__(self, table: Table, config: str | None = None, overrides: Sequence[str] = ()) -> None:
        self.table, self.overrides = table, list(overrides)
        own = str(CHECKOUT / table.config)
        self.config = config or own
        self.base, published_on = load_experiment(self.config, self.overrides), load_experiment(own)
        self.comparable = _decisive(self.base) == _decisive(published_on)

    def runs(self) -> dict[str, list[list[str]]]:
        """By benchmark, the overrides of each setting that can be tried; the uncompressed one first."""
        rows = sorted((row for row in self.table.rows if self._obstacle(row) is None), key=lambda row: -row.retention)
        benchmarks = dict.fromkeys(column.benchmark for column in self.table.columns if column.benchmark)
        return {benchmark: [_variant(row) for row in rows] for benchmark in benchmarks}

    def cells(self, failures: Failures) -> list[list[Cell]]:
        """A list for each row, with a cell for each column."""
        rows = [[self._cell(row, column, failures) for column in self.table.columns] for row in self.table.rows]
        uncompressed = next((cells for cells in rows if cells[0].row.method == "none"), None)
        return [
            [self._compared(cell, base) for cell, base in zip(cells, uncompressed or cells, strict=True)]
            for cells in rows
        ]

    @staticmethod
    def load(config: str, benchmark: str, overrides: Sequence[str], variant: Sequence[str]) -> Experiment:
        """The experiment of one setting.

        Raises:
            ConfigError: a method does not have the options of `variant`.
        """
        return load_experiment(config, [*overrides, f"evaluation.benchmark={benchmark}", *variant])

    def _obstacle(self, row: Row) -> tuple[str, str] | None:
        if row.base_model:
            return OTHER_MODEL, f"published for another base model: {row.base_model}"
        if row.method not in list_methods():
            return NO_METHOD, f"there is no method {row.method!r} here"
        try:
            load_experiment(self.config, [*self.overrides, *_variant(row)])
        except ConfigError as error:
            return FAILED, str(error)
        return None

    def _cell(self, row: Row, column: Column, failures: Failures) -> Cell:
        printed = row.values[self.table.columns.index(column)]
        cell = Cell(row, column, printed, printed if self.comparable and not row.base_model else None)
        if column.benchmark is None:
            return dataclasses.replace(cell, ours=_operations(row, column), state=COMPUTED)
        if obstacle := self._obstacle(row):
            return dataclasses.replace(cell, state=obstacle[0], reason=obstacle[1])
        experiment = self.load(self.config, column.benchmark, self.overrides, _variant(row))
        evaluation, (compression,) = experiment.evaluation, experiment.compressions
        folder, benchmark = setting_folder(experiment, compression), find_benchmark(column.benchmark)
        standin = None
        if evaluation.data == "standin":
            try:
                standin = standin_home(evaluation).resolve()
            except UserError as error:
                return dataclasses.replace(cell, state=FAILED, reason=str(error))
        result = finished_result(folder, result_fingerprint(experiment, compression, standin))
        if result is None:
            keys = [(self.config, column.benchmark, setting) for setting in ("", setting_name(compression))]
            failure = next((failures[key] for key in keys if key in failures), "")
            state, reason = _missing(experiment, folder, bool(benchmark.verdict), failure)
            return dataclasses.replace(cell, state=state, reason=reason)
        ours = estimate(column, read_samples(folder))
        if ours is None:
            file = (result["submission"] or {}).get("path", folder)
            state, reason = NEEDS_SERVER, f"the answers in {file} have no public solution; its server scores them"
            return dataclasses.replace(cell, state=state, reason=reason, result=folder / "result.json")
        return dataclasses.replace(cell, ours=ours, state=MEASURED, result=folder / "result.json")

    def _compared(self, cell: Cell, base: Cell) -> Cell:
        """With its change from the uncompressed run, and as percent of it where the table has that."""
        relative = self.table.relative
        if cell.published is not None and base.published is not None and cell.row.method != "none":
            cell = dataclasses.replace(cell, published_change=cell.published - base.published)
        if cell.ours is None or cell.state == COMPUTED:
            return cell
        if base.ours is None:
            return dataclasses.replace(cell, ours=None, state=base.state, reason=base.reason) if relative else cell
        assert cell.result is not None
        assert base.result is not None
        if not same_questions(read_samples(cell.result.parent), read_samples(base.result.parent)):
            return dataclasses.replace(
                cell, ours=None, state=FAILED, reason="it was asked other questions than the uncompressed run"
            )
        if relative and base.ours.value == 0:
            return dataclasses.replace(cell, ours=None, state=FAILED, reason=NOTHING_RIGHT)
        one = base.ours.percent_of(base.ours)
        ours = cell.ours.percent_of(base.ours) if relative else cell.ours
        if cell.row.method == "none":
            return dataclasses.replace(cell, ours=ours)
        return dataclasses.replace(cell, ours=ours, change=ours.minus(one if relative else base.ours))


def mean_cells(grid: Grid, rows: list[list[Cell]], others: Mapping[str, tuple[Table, list[list[Cell]]]]) -> list[Cell]:
    """The mean of each row over benchmarks, of percent of the uncompressed run; empty where the table has none.

    Only what is printed for a row counts, as in the paper, and everything where nothing is.

    Args:
        grid, rows: the table and its cells.
        others: the tables that `average_of_tables` names, and their cells.
    """
    table = grid.table
    sources = [others[name] for name in table.average_of_tables] or ([(table, rows)] if table.average else [])
    return [
        _mean(grid, cells, [pair for source in sources for pair in _averaged(*source, cells)])
        for cells in rows
        if sources
    ]


def _averaged(table: Table, rows: list[list[Cell]], like: list[Cell]) -> list[tuple[Cell, Cell]]:
    """The cells of the row that is like another one, and of the uncompressed row, that a mean is over."""
    base = next(cells for cells in rows if cells[0].row.method == "none")
    same = (like[0].row.name, like[0].row.retention)
    row = next((cells for cells in rows if (cells[0].row.name, cells[0].row.retention) == same), None)
    if row is None:
        return []
    pairs = [pair for pair in zip(row, base, strict=True) if pair[0].column.head in table.average]
    values = dict(zip((column.head for column in table.columns), row[0].row.values, strict=True))
    return [pair for pair in pairs if values[pair[0].column.head] is not None] or pairs


def _mean(grid: Grid, cells: list[Cell], pairs: list[tuple[Cell, Cell]]) -> Cell:
    row = cells[0].row
    published = row.average if grid.comparable and not row.base_model else None
    mean = Cell(
        row, Column(MEAN), row.average, published, published_change=None if published is None else published - 100
    )
    estimates = []
    for cell, base in pairs:
        if cell.ours is None or base.ours is None:
            lacking = cell if cell.ours is None else base
            return dataclasses.replace(mean, state=lacking.state, reason=lacking.reason)
        if base.ours.value == 0:
            return dataclasses.replace(mean, state=FAILED, reason=f"{cell.column.head}: {NOTHING_RIGHT}")
        relative = grid.table.relative and not grid.table.average_of_tables
        estimates.append(cell.ours if relative else cell.ours.percent_of(base.ours))
    if not estimates:
        return dataclasses.replace(mean, state=NOT_RUN, reason="none of its parts is in another table")
    ours = Estimate.mean(estimates)
    change = Estimate(ours.value - 100, ours.draws - 100)
    return dataclasses.replace(mean, ours=ours, change=change if row.method != "none" else None, state=MEASURED)


def read_samples(folder: Path) -> list[Sample]:
    """The questions of one setting."""
    return _read(folder / "samples.jsonl", (folder / "samples.jsonl").stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read(path: Path, version: int) -> list[Sample]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _decisive(experiment: Experiment) -> tuple[object, ...]:
    """What must be the same for figures to be compared: the model, how it sees videos, and the questions."""
    evaluation = experiment.evaluation
    return (
        experiment.model.path,
        experiment.video,
        evaluation.data,
        evaluation.videos,
        evaluation.seed,
        evaluation.limit,
    )


def _variant(row: Row) -> list[str]:
    """The overrides that make the row's setting of an experiment."""
    if row.method == "none":
        return ["compression.method=none"]
    options = [f"compression.{key}={json.dumps(value)}" for key, value in (row.options or {}).items()]
    # The size first: a method without one is refused.
    return [f"compression.retention_ratio={row.retention}", f"compression.method={row.method}", *options]


def _operations(row: Row, column: Column) -> Estimate:
    """The paper's Eq. 9 for a method that is done before the language model, or, as FastV, after three layers of it."""
    full = paper_flops(LAYERS, HIDDEN, INTERMEDIATE, TOKENS) / 1e12
    kept = paper_flops(LAYERS, HIDDEN, INTERMEDIATE, round(row.retention * TOKENS)) / 1e12
    value = (3 * full + (LAYERS - 3) * kept) / LAYERS if row.method == "fastv" else kept
    value = value if column.of == "flops" else 100 * value / full
    return Estimate(value, np.full(DRAWS, value))


def _missing(experiment: Experiment, folder: Path, judged: bool, failure: str) -> tuple[str, str]:
    """The state of a cell that has no result, and the rest of the sentence; `failure` is what the last attempt met."""
    path = experiment.model.path
    attempt = f" ({failure.rstrip('.')})" if failure else ""
    if (folder / "result.json").exists() and not failure:
        return STALE, "its result is of other settings or another version of the code"
    if not (path in BUNDLED or Path(path).is_dir() or try_to_load_from_cache(path, "config.json")):
        return NEEDS_WEIGHTS, f"`hf download {path}`{attempt}"
    if judged and not os.environ.get(KEY):
        return NEEDS_JUDGE, f"set {KEY}, and evaluation.judge.* for another one than lmms-eval's{attempt}"
    return (FAILED, failure) if failure else (NOT_RUN, f"on {experiment.evaluation.benchmark}")
