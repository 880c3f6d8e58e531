"""One process of an evaluation: `python -m eval.worker JOB`, started by `eval.run`, alone or by `accelerate launch`.

JOB is a JSON file: `config` and `overrides` of the experiment, `settings` to evaluate with their fingerprints, and
`events`, the file to which progress and errors are appended as JSON lines. The model is loaded once, lmms-eval's own
task is run at every setting, and process 0 writes the result files.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import torch
from accelerate.utils import gather_object
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict

from eval.environment import describe_environment
from eval.report import summarize
from eval.results import as_plain, setting_folder, write_result
from eval.standin import read_kinds
from llava.answer_log import AnswerLog
from llava.config import Experiment, load_experiment, setting_name
from llava.errors import UserError
from llava.lmms_eval_model import LlavaScissor
from llava.token_compression import CompressionConfig

Answers = dict[tuple[str, int], list[dict[str, Any]]]

GROUPS = ("task_type", "duration", "question_type", "category")
"""Columns of a benchmark by which accuracy is also given, where they exist; `kind` comes from the stand-in."""


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text())
    events = Path(job["events"])
    try:
        evaluate(load_experiment(job["config"], job["overrides"]), job["settings"], events)
    except UserError as error:
        _append(events, {"error": str(error)})
        return 2
    return 0


def evaluate(experiment: Experiment, settings: dict[str, dict[str, str]], events: Path) -> None:
    """Run the benchmark at each of `settings`, given with the fingerprints of its answers and of its result."""
    evaluation = experiment.evaluation
    if evaluation.threads is not None:
        torch.set_num_threads(evaluation.threads)
    lm = LlavaScissor(experiment.model, experiment.video)
    manager = task_manager(evaluation.benchmark)
    load_data(evaluation.benchmark, manager)
    for compression in experiment.compressions:
        setting = setting_name(compression)
        if setting not in settings:
            continue
        folder, fingerprints = setting_folder(experiment, compression), settings[setting]

        def report(done: int, total: int, setting: str = setting) -> None:
            _append(events, {"setting": setting, "rank": lm.rank, "done": done, "total": total})

        lm.start(compression, AnswerLog(folder, fingerprints["answers"], lm.rank), report)
        output = simple_evaluate(
            model=lm,
            tasks=[evaluation.benchmark],
            batch_size=1,
            limit=evaluation.limit,
            gen_kwargs=f"max_new_tokens={evaluation.max_new_tokens}" if evaluation.max_new_tokens else None,
            task_manager=manager,
            bootstrap_iters=0,
        )
        keys = dict(gather_object(list(lm.keys.items())))
        if lm.rank == 0:
            # The other processes have logged all their answers by now: read them anew.
            log = AnswerLog(folder, fingerprints["answers"])
            answers = {document: [log[key] for key in dict.fromkeys(of)] for document, of in keys.items()}
            result, samples = assemble(experiment, compression, output, answers, lm)
            write_result(folder, {"fingerprint": fingerprints["result"], **result}, samples)


def task_manager(benchmark: str) -> TaskManager:
    """An index of the benchmark's own folder alone where there is one: the index of all tasks takes ten seconds."""
    folder = Path(lmms_eval.tasks.__file__).parent / benchmark
    if folder.is_dir():
        return TaskManager("WARNING", include_path=str(folder), include_defaults=False)
    return TaskManager("WARNING")


def load_data(benchmark: str, manager: TaskManager) -> None:
    """Have lmms-eval fetch the benchmark's data, or find them in its cache.

    Raises:
        UserError: an unknown benchmark, or data that are neither here nor to be had.
    """
    if benchmark not in manager.all_tasks:
        raise UserError(f"lmms-eval has no task {benchmark!r}: `python -m lmms_eval --tasks list` prints those it has.")
    try:
        get_task_dict([benchmark], manager, "simple")
    except Exception as error:  # datasets and huggingface_hub raise many kinds for the same thing
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The data of {benchmark} cannot be loaded ({type(error).__name__}: {reason}). lmms-eval downloads them on "
            "first use: check the network, and for gated data `hf auth login`; on a machine without a network, copy "
            "the folder that HF_HOME names from one that has them, or use evaluation.data=standin."
        ) from error


def assemble(
    experiment: Experiment,
    compression: CompressionConfig | None,
    output: dict[str, Any],
    answers: Answers,
    lm: LlavaScissor,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and the samples of one setting, from lmms-eval's output and the logged answers."""
    benchmark = experiment.evaluation.benchmark
    home = Path(os.environ["HF_HOME"]) if experiment.evaluation.data == "standin" else None
    kinds = read_kinds(home) if home else {}
    samples = [
        _sample(sample, answers[benchmark, sample["doc_id"]], kinds)
        for sample in sorted(output["samples"][benchmark], key=lambda sample: sample["doc_id"])
    ]
    split, dataset = next(iter(lm.task_dict[benchmark].items()))
    result = {
        "name": experiment.name,
        "benchmark": benchmark,
        "setting": setting_name(compression),
        "benchmark_scores": {
            metric.partition(",")[0]: value
            for metric, value in output["results"][benchmark].items()
            if isinstance(value, float | int) and "stderr" not in metric
        },
        "summary": summarize(samples),
        "environment": describe_environment()
        | {
            "processes": lm.world_size,
            "device": str(lm.device),
            "dtype": str(lm.qa.model.dtype).removeprefix("torch."),
            "attn_implementation": lm.qa.model.config._attn_implementation,
            "dataset": {
                "name": output["configs"][benchmark].get("dataset_path"),
                "source": home.name if home else "hub",
                "split": split,
                "rows": len(dataset),
                "fingerprint": dataset._fingerprint,
            },
        },
        "config": as_plain(experiment, lm.compression),
    }
    return result, samples


def _sample(sample: dict[str, Any], records: Sequence[dict[str, Any]], kinds: dict[str, str]) -> dict[str, Any]:
    """One document of the benchmark with its score and what its requests, one or one per choice, took."""
    document = sample["doc"]
    group = {name: document[name] for name in GROUPS if isinstance(document.get(name), str)}
    if document.get("question_id") in kinds:
        group["kind"] = kinds[document["question_id"]]
    milliseconds: dict[str, float] = defaultdict(float)
    for record in records:
        for stage, value in record["milliseconds"].items():
            milliseconds[stage] += value
    return {
        "doc_id": sample["doc_id"],
        "question": records[0]["question"],
        "responses": [record["response"] for record in records],
        "target": sample["target"],
        "score": _score(sample),
        "group": group,
        "visuals": records[0]["visuals"],
        "videos": records[0]["videos"],
        "milliseconds": milliseconds,
    }


def _score(sample: dict[str, Any]) -> float | None:
    """The score between 0 and 1 of one document, where the benchmark's metric has one per document."""
    for name, value in sample.items():
        if name in ("acc", "exact_match") and isinstance(value, float | int):
            return float(value)
        if isinstance(value, dict) and isinstance(value.get("score"), float | int):
            return float(value["score"])
    return None


def _append(events: Path, event: dict[str, Any]) -> None:
    with events.open("a") as file:
        file.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
