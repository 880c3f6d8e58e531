"""The data files of eval/published: the cells of each table, what is printed in them, and where."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava.errors import ConfigError
from llava.token_compression import list_methods
from llava.yaml_schema import build, did_you_mean, read_mapping

FOLDER = Path(__file__).resolve().parents[1] / "published"


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        head: how this repository calls it; `printed_head`: how its source does, where that is another.
        benchmark: a name of `eval.benchmarks` or a task of lmms-eval; None for what is computed.
        of: "accuracy", what the names of the judge's scores begin with, or "flops" (Eq. 9, in T) and "flops_share".
        task: of the questions of this task alone.
        mean_over: the figure is the mean over these groups of questions (tasks, categories, the judge's metrics).
    """

    head: str
    benchmark: str | None = None
    of: str = "accuracy"
    task: str | None = None
    mean_over: Literal["task", "task_type", "metric"] | None = None
    printed_head: str | None = None


@dataclass(frozen=True)
class Row:
    """One method at one retention.

    Attributes:
        method: as `CompressionConfig` would call it, whether there is such a method or not.
        retention: share of the visual tokens, 1 for no compression.
        values: printed figures by column, None where nothing is printed; average: the printed mean.
        label: the method's name in the table, where there is more to say than `method`.
        options: further settings of `compression`.
        base_model: the model that it was measured on, where that is not the table's.
        source: where it is printed, where that is not the table's.
    """

    method: str
    retention: float
    values: tuple[float | None, ...] = ()
    average: float | None = None
    label: str | None = None
    options: dict[str, Any] | None = None
    base_model: str | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.method


@dataclass(frozen=True)
class Table:
    """One data file.

    Attributes:
        config: the experiment whose model the figures are of.
        relative: figures are percent of the same method's uncompressed model.
        average: heads of the columns whose ratios to the uncompressed model the printed mean is over.
        average_of_tables: the same, over the `average` columns of these tables.
        every_method_at: adds a row for each registered method at each of these retentions.
        plot: whether to draw figures against retention.
        notes: what must be known before comparing.
    """

    name: str
    title: str
    source: str
    config: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = ()
    relative: bool = False
    average: tuple[str, ...] = ()
    average_of_tables: tuple[str, ...] = ()
    every_method_at: tuple[float, ...] = ()
    plot: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ConfigError(f"{row.name} at {row.retention:g} has {len(row.values)} values.")
        heads = [column.head for column in self.columns]
        for head in self.average:
            if head not in heads:
                raise ConfigError(f"average: there is no column {head!r}{did_you_mean(head, heads)}.")


def table_names() -> list[str]:
    """What `--table` accepts: the numbers of the paper's tables, figure4, since, methods."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_table(name: str) -> Table:
    """The table of this name.

    Raises:
        ConfigError: its file is not as described here.
    """
    path = FOLDER / f"{name}.yaml"
    mapping = read_mapping(path)
    ratios = mapping.get("every_method_at", [])
    blank = [None] * len(mapping.get("columns", []))
    rows = [{"method": "none", "retention": 1, "values": blank}] if ratios else []
    rows += [
        {"method": method, "retention": ratio, "values": blank}
        for method in list_methods()
        if method != "none"
        for ratio in ratios
    ]
    return build(Table, {"name": name, **mapping, "rows": [*mapping.get("rows", []), *rows]}, str(path))


SPLITS = {"mlvu_test": "mlvu_dev", "egoschema_subset": "egoschema"}
"""Benchmarks that are not those of the published figures, and those that they can be run in place of."""


def with_split(table: Table, split: str) -> Table:
    """The table with another split of a benchmark; nothing is published for it there.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: there is no such split{did_you_mean(split, SPLITS)}.")
    replaced = [column.benchmark == SPLITS[split] for column in table.columns]
    if not any(replaced):
        return table
    columns = [
        dataclasses.replace(column, benchmark=split, head=f"{column.head} ({split})") if other else column
        for column, other in zip(table.columns, replaced, strict=True)
    ]
    heads = {old.head: new.head for old, new in zip(table.columns, columns, strict=True)}
    rows = [
        dataclasses.replace(
            row,
            values=tuple(None if other else value for value, other in zip(row.values, replaced, strict=True)),
            average=None,
        )
        for row in table.rows
    ]
    return dataclasses.replace(
        table,
        name=f"{table.name}-{split}",
        columns=tuple(columns),
        rows=tuple(rows),
        average=tuple(heads[head] for head in table.average),
    )


def find_tables(names: list[str]) -> list[Table]:
    """The tables that `--table` asks for, "4" meaning 4a and 4b.

    Raises:
        ConfigError: there is none of such a name.
    """
    found: dict[str, Table] = {}
    for name in names:
        matches = [known for known in table_names() if known == name or known.rstrip("ab") == name]
        if not matches:
            raise ConfigError(f"--table {name}: there is no such table{did_you_mean(name, table_names())}.")
        found |= {match: load_table(match) for match in matches}
    return list(found.values())
