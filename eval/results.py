"""Where results lie, when they are finished, and how they are kept.

results/<name>/<benchmark>/<setting>/result.json     scores, token and time statistics, environment
                                     samples.jsonl   every question with its answer, score, tokens and times
                                     answers-*.jsonl  the same as they were given: what a run is resumed from
                                     submission.json  where a server scores the answers
                                     submissions/     what lmms-eval's task itself writes, if anything
                             verdicts/               what the judge said, where there is one
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import find_benchmark
from llava.answer_log import settings_fingerprint
from llava.assets import checkpoint_path
from llava.config import Experiment, setting_name
from llava.errors import UserError
from llava.token_compression import CompressionConfig


def benchmark_folder(experiment: Experiment) -> Path:
    return Path(experiment.evaluation.output_dir) / experiment.name / experiment.evaluation.benchmark


def setting_folder(experiment: Experiment, compression: CompressionConfig | None) -> Path:
    return benchmark_folder(experiment) / setting_name(compression)


def answer_fingerprint(experiment: Experiment, compression: CompressionConfig | None) -> str:
    """Of everything that an answer of this setting depends on, apart from the question."""
    return settings_fingerprint(
        experiment.model, experiment.video, compression, model_path=checkpoint_path(experiment.model.path)
    )


def result_fingerprint(experiment: Experiment, compression: CompressionConfig | None, standin: Path | None) -> str:
    """Of everything that a result file depends on; the name of the stand-in's folder says which data it holds."""
    evaluation = experiment.evaluation
    parts = (
        answer_fingerprint(experiment, compression),
        evaluation.benchmark,
        repr(evaluation.judge) if find_benchmark(evaluation.benchmark).verdict else "",
        str(evaluation.limit),
        str(evaluation.max_new_tokens),
        standin.name if standin else "hub",
        *(Path(__file__).with_name(name).read_text() for name in ("worker.py", "report.py", "benchmarks.py")),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def finished_result(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result in `folder` if it is that of `fingerprint`."""
    result = _read_result(folder / "result.json")
    return result if result and result.get("fingerprint") == fingerprint else None


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make `folder` ready for a run: keep an older result under another name, forget answers unless `resume`.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("writable")
        probe.unlink()
        older = _read_result(folder / "result.json")
        if older:
            suffix = str(older.get("fingerprint"))[:12]
            for name in ("result.json", "samples.jsonl", "submission.json"):
                if (folder / name).exists():
                    os.replace(folder / name, (folder / name).with_suffix(f".{suffix}{Path(name).suffix}"))
        if not resume:
            for path in folder.glob("answers-*.jsonl"):
                path.unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from error


def append_event(events: Path, event: Mapping[str, Any]) -> None:
    """Tell the process that follows `events`, a file of JSON lines, of progress or of an error."""
    with events.open("a") as file:
        file.write(json.dumps(event) + "\n")


def write_submission(folder: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write submission.json, the answers in the form that the benchmark's server takes; return where it lies."""
    answers = {question: answer for sample in samples for question, answer in sample["submission"].items()}
    try:
        _write_whole(folder / "submission.json", json.dumps(answers, indent=1) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder / "submission.json"


def write_result(folder: Path, result: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
    """Write samples.jsonl, then result.json, each of them whole or not at all."""
    try:
        _write_whole(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        _write_whole(folder / "result.json", json.dumps(result, indent=2, default=str) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from error


def as_plain(experiment: Experiment, compression: CompressionConfig) -> dict[str, Any]:
    """The full configuration of one setting, ready for JSON."""
    plain = dataclasses.asdict(experiment)
    del plain["compressions"]
    return plain | {"compression": dataclasses.asdict(compression)}


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) else None


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"Cannot write results to {folder}: {error.strerror or error}. Make room, or choose another folder with "
        "evaluation.output_dir=FOLDER, and run the same command again: what is finished is kept."
    )
