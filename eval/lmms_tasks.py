"""lmms-eval's own tasks of a benchmark, loaded, with their data checked before a model is loaded for them."""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from lmms_eval.tasks import TaskManager, get_task_dict

from eval.benchmarks import Benchmark
from llava.errors import UserError

Tasks = dict[str, Any]
"""lmms-eval's Task objects by name."""


def load_tasks(benchmark: Benchmark) -> Tasks:
    """The tasks of `benchmark` in alphabetical order; lmms-eval fetches their data, or finds them in its cache.

    Raises:
        UserError: an unknown benchmark, or data that are neither here nor to be had.
    """
    manager = _task_manager(benchmark)
    if benchmark.task not in manager.all_tasks:
        raise UserError(
            f"lmms-eval has no task {benchmark.task!r}: `python -m lmms_eval --tasks list` prints those it has."
        )
    if benchmark.dataset and not (_home(benchmark).exists() or HF_HUB_OFFLINE or get_token()):
        # lmms-eval would find out after the download.
        raise UserError(_cannot_load(benchmark, "there is no login to the Hugging Face hub on this machine"))
    try:
        return dict(sorted(_leaves(get_task_dict([benchmark.task], manager, "simple"))))
    except Exception as error:  # datasets and huggingface_hub raise many kinds for the same thing
        attempt = getattr(error, "last_attempt", None)  # lmms-eval tries several times
        cause = (attempt and attempt.exception()) or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise UserError(_cannot_load(benchmark, reason)) from error


def check_videos(benchmark: Benchmark, tasks: Tasks, limit: int | None) -> None:
    """Look for the video of every question that will be asked.

    Raises:
        UserError: some are missing.
    """
    missing: Counter[str] = Counter()
    first, total = None, 0
    for name, task in tasks.items():
        for document in islice(task.eval_docs_no_media, limit):
            total += 1
            try:
                (video,) = task.doc_to_visual(document)
            except (SystemExit, FileNotFoundError) as error:  # what tasks of lmms-eval do about a missing video
                video = str(error)
            if not os.path.exists(video):
                missing[name] += 1
                first = first or video
    if missing:
        raise UserError(
            f"{missing.total()} of {total} questions of {benchmark.name} have no video in {_home(benchmark)} ("
            + ", ".join(f"{name}: {count}" for name, count in missing.items())
            + f"; the first: {first}). Put them there, or remove that folder, fetch the data with "
            f"`{benchmark.download}` and run the same command again, which unpacks them. {benchmark.advice}".rstrip()
        )


def in_document_order(tasks: Tasks, processes: int) -> None:
    """Have the tasks aggregate results in the order of their documents, whatever the number of processes.

    lmms-eval gives process r the documents r, r + processes, ..., and strings together what each of them returns.
    Video-ChatGPT pairs neighbours, so that an answer to the second question of a pair must not come first.
    """
    for task in tasks.values():
        for metric, aggregate in task.aggregation().items():
            task.aggregation()[metric] = _reordered(aggregate, processes)


def split_of(task: Any) -> str:
    """The split of the dataset that `task` asks about."""
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def _task_manager(benchmark: Benchmark) -> TaskManager:
    folder = Path(lmms_eval.tasks.__file__).parent / (benchmark.folder or benchmark.task)
    if folder.is_dir():
        return TaskManager("WARNING", include_path=str(folder), include_defaults=False)
    return TaskManager("WARNING")


def _leaves(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


def _reordered(aggregate: Callable, processes: int) -> Callable:
    @functools.wraps(aggregate)  # lmms-eval looks at the names of its arguments
    def aggregate_in_order(results: Sequence[Any], **more: Any) -> Any:
        ordered = [None] * len(results)
        rest = iter(results)
        for rank in range(processes):
            mine = range(rank, len(results), processes)
            for index in mine:
                ordered[index] = next(rest)
        return aggregate(ordered, **more)

    return aggregate_in_order


def _cannot_load(benchmark: Benchmark, reason: str) -> str:
    message = f"The data of {benchmark.name} cannot be loaded ({reason}). "
    if benchmark.dataset is None:
        return message + "lmms-eval downloads them on first use: check the network, and for gated data `hf auth login`."
    return (
        f"{message}Fetch them with `{benchmark.download}` (lmms-eval asks for a login even where data are open), then "
        f"run the same command again: it unpacks the videos into {_home(benchmark)}. For a machine "
        "without a network, do both on one that has one and copy the folder that HF_HOME names, or use "
        "evaluation.data=standin."
    )


def _home(benchmark: Benchmark) -> Path:
    """Where the videos of `benchmark` are looked for."""
    return Path(os.environ["HF_HOME"]) / str(benchmark.unpacked)
