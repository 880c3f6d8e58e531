"""Run the suite: `python -m eval.suite configs/suite/default.yaml [key=value ...]`.

<output_dir>/<name>/<model>/questions-*.jsonl   every question, with what it is about
                            features-*.safetensors  what is compressed
                            <setting>.json      the answers of one setting in the order of the questions, with the
                                                environment; written when it is finished, and not run again
                            accuracy.png, .svg
<output_dir>/<name>/results.md                  the tables
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.environment import describe_environment
from eval.suite.answers import answer
from eval.suite.config import Suite, load_suite
from eval.suite.features import Data, prepare
from eval.suite.plots import write_plot
from eval.suite.report import Key, Outcome, key_of
from llava.answer_log import settings_fingerprint
from llava.assets import checkpoint_path
from llava.cli_errors import run
from llava.config import setting_name
from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.token_compression import CompressionConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.suite", description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a YAML file such as configs/suite/default.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    arguments = parser.parse_args(argv)
    suite = load_suite(arguments.config, arguments.overrides)
    torch.set_num_threads(suite.threads)
    start, home = time.monotonic(), Path(suite.output_dir) / suite.name
    texts = []
    try:
        for path in suite.models:
            texts.append(_run(suite, path, home))
            (home / "results.md").write_text("\n".join([f"# {suite.name}\n", *texts]))
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    except OSError as error:
        raise UserError(
            f"Cannot write results to {home}: {error.strerror or error}. Make room, or choose another folder with "
            "output_dir=FOLDER, and run the same command again: what is finished is kept."
        ) from error
    print("\n".join(texts))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; the tables are in {home / 'results.md'}")
    return 0


def _run(suite: Suite, path: str, home: Path) -> str:
    """Everything about one model; its tables."""
    checkpoint = checkpoint_path(path)
    folder = home / Path(checkpoint).name
    tokenizer, model, processor, _ = load_pretrained_model(
        checkpoint, None, "llava_qwen", device_map="cpu", torch_dtype="float32", attn_implementation="sdpa"
    )
    data = prepare(suite, model, processor, settings_fingerprint(model_path=checkpoint), folder)
    code = [
        (Path(__file__).parents[1] / name).read_text()
        for name in ("tiny_data.py", "tiny_wordings.py", "suite/answers.py")
    ]
    cells: dict[Key, dict[str, Any]] = {}
    for config in tqdm(suite.settings(), desc=folder.name, unit="setting"):
        fingerprint = settings_fingerprint(config, data.fingerprint, *code, model_path=checkpoint)
        file = folder / f"{setting_name(config)}.json"
        cells[key_of(config)] = _finished(file, fingerprint) or _answered(
            (tokenizer, model), data, config, suite, file, fingerprint
        )
    outcome = Outcome(suite, [one for row in data.asked for one in row], cells)
    if not write_plot(outcome, f"{folder.name}, {len(outcome.questions.asked)} questions", folder / "accuracy"):
        print("No curves are drawn: matplotlib is not installed; it comes with the extra `plot`.", file=sys.stderr)
    return outcome.markdown(folder.name)


def _finished(file: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        cell = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return cell if cell.get("fingerprint") == fingerprint else None


def _answered(
    host: tuple[Any, Any], data: Data, config: CompressionConfig, suite: Suite, file: Path, fingerprint: str
) -> dict[str, Any]:
    tokenizer, model = host
    cell = {
        "fingerprint": fingerprint,
        "compression": dataclasses.asdict(config),
        **dataclasses.asdict(answer(model, tokenizer, data, config, suite.batch)),
        "environment": describe_environment(),
    }
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(cell) + "\n")
    os.replace(partial, file)
    return cell


if __name__ == "__main__":
    sys.exit(run(main))
