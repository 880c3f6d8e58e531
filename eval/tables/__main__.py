"""Run the grid behind the tables of the paper and write them: `python -m eval.tables [--table N] [--config FILE] ...`

Without arguments: every table where there is a GPU; elsewhere every method at equal token counts on the bundled model,
and the state of the cells of all other tables. What is finished is not run again. Tables go to results/tables/<name>/,
with `<name>` that of the experiment, anew after each benchmark.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.run import StoppedError, run_experiment
from eval.tables.cells import Cell, Grid, mean_cells
from eval.tables.plots import write_plot
from eval.tables.published import SPLITS, Table, find_tables, load_table, table_names, with_split
from eval.tables.write import comma_separated, markdown, summary, write_text
from llava.cli_errors import run
from llava.config import setting_name
from llava.errors import ConfigError, UserError

OFFLINE = "methods"
"""The table that needs neither weights nor a network."""

Filled = list[tuple[Grid, list[list[Cell]]]]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    wrong = [override for override in arguments.overrides if "=" not in override]
    if wrong:
        raise ConfigError(f"{wrong[0]} is no section.key=value; a table is named by --table, a file by --config.")
    names = arguments.table or table_names()
    if arguments.config and not arguments.table:
        names = [OFFLINE]
    tables = find_tables(names)
    for split in arguments.split:
        tables = [with_split(table, split) for table in tables]
    grids = [Grid(table, arguments.config, arguments.overrides) for table in tables]
    runs = [] if arguments.only_write else grids
    if not (arguments.table or arguments.config or torch.cuda.is_available()):
        runs = [grid for grid in runs if grid.table.name == OFFLINE]
        print("There is no GPU here: only the bundled model is run. With one, or with --table N, the others are too.")
    start, failures = time.monotonic(), Failures()
    try:
        for config, benchmark, variants in _jobs(runs):
            failures.run(config, benchmark, variants, arguments.overrides)
            fill(grids, failures)
    except KeyboardInterrupt:
        fill(grids, failures)
        print("\nInterrupted. What is finished is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    filled = fill(grids, failures)
    for grid, rows in filled:
        if grid in runs or len(filled) == 1:
            print(f"\n{markdown(grid, rows)}")
    minutes = (time.monotonic() - start) / 60
    print(f"{summary(filled)}\n\n{minutes:.1f} minutes; the tables are in {_folder(grids[0]).parent}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reproduce_tables.sh", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--table", action="append", metavar="N", help=f"one of {', '.join(table_names())} (repeatable; 4: 4a and 4b)"
    )
    parser.add_argument("--config", metavar="FILE", help="an experiment to run in place of the table's own")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT",
        help=f"run this split in place of the one that the published figures are of: {' or '.join(SPLITS)}",
    )
    parser.add_argument("--only-write", action="store_true", help="run nothing, write the tables from what is there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    return parser


class Failures(dict[tuple[str, str, str], str]):
    """Why runs came to nothing: by config, benchmark and setting; the setting "" stands for all that have no result."""

    def run(self, config: str, benchmark: str, variants: Sequence[list[str]], overrides: Sequence[str]) -> None:
        """Evaluate the variants in one process, or in one per GPU. One that fails is left out, and the rest goes on."""
        left = {}
        for variant in variants:
            experiment = Grid.load(config, benchmark, overrides, variant)
            left[setting_name(experiment.compressions[0])] = variant
        while left:
            job = {"config": config, "overrides": [*overrides, f"evaluation.benchmark={benchmark}"]}
            try:
                run_experiment({**job, "variants": list(left.values())})
                return
            except StoppedError as error:
                print(f"error: {error}", file=sys.stderr)
                if error.setting is None:
                    self[config, benchmark, ""] = str(error)
                    return
                self[config, benchmark, error.setting] = str(error)
                del left[error.setting]
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                self[config, benchmark, ""] = str(error)
                return


def _jobs(grids: Sequence[Grid]) -> list[tuple[str, str, list[list[str]]]]:
    """Config, benchmark and settings of every run, those that several tables want once."""
    jobs: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for grid in grids:
        for benchmark, variants in grid.runs().items():
            known = jobs[grid.config, benchmark]
            known += [variant for variant in variants if variant not in known]
    return [(config, benchmark, variants) for (config, benchmark), variants in jobs.items()]


def fill(grids: Sequence[Grid], failures: Failures) -> Filled:
    """The cells of every table, as they are now; written to its files.

    Raises:
        UserError: the files cannot be written.
    """
    parts: dict[str, tuple[Table, list[list[Cell]]]] = {}
    for grid in grids:
        parts[grid.table.name] = grid.table, grid.cells(failures)
    filled = []
    for grid in grids:
        rows = parts[grid.table.name][1]
        others = {
            name: parts.get(name)
            or (other := load_table(name), Grid(other, grid.config, grid.overrides).cells(failures))
            for name in grid.table.average_of_tables
        }
        means = mean_cells(grid, rows, others)
        rows = [[*cells, mean] for cells, mean in zip(rows, means, strict=True)] if means else rows
        folder = _folder(grid)
        write_text(folder / f"{grid.table.name}.md", markdown(grid, rows))
        write_text(folder / f"{grid.table.name}.csv", comma_separated(grid, rows))
        if grid.table.plot:
            write_plot(grid, rows, folder)
        filled.append((grid, rows))
    return filled


def _folder(grid: Grid) -> Path:
    return Path(grid.base.evaluation.output_dir) / "tables" / grid.base.name


if __name__ == "__main__":
    sys.exit(run(main))
