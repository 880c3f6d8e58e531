"""Measure a grid of settings: `python -m eval.efficiency CONFIG... [section.key=value ...]`.

Writes result.json, result.md and plots to results/efficiency/<name>/. A cell that is finished is not measured again
unless its settings, the code or the hardware have changed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from eval.efficiency.config import Cell, Harness, load_harness
from eval.efficiency.inputs import write_clip
from eval.efficiency.measure import measure_cell
from eval.efficiency.models import load_subject
from eval.efficiency.plots import write_plots
from eval.efficiency.report import report
from eval.efficiency.subject import Subject
from eval.environment import describe_environment, describe_hardware
from llava.answer_log import settings_fingerprint, source_digest
from llava.assets import checkpoint_path
from llava.cli_errors import run
from llava.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="eval.efficiency", description=__doc__.partition("\n")[0])
    parser.add_argument("arguments", nargs="+", metavar="CONFIG or section.key=value")
    arguments = parser.parse_args(argv).arguments
    overrides = [argument for argument in arguments if "=" in argument]
    configs = [argument for argument in arguments if "=" not in argument]
    if not configs:
        raise UserError("Name at least one file to measure, for example configs/efficiency/tiny_cpu.yaml.")
    harnesses = [load_harness(config, overrides) for config in configs]
    for harness in harnesses:
        folder = Path(harness.measurement.output_dir) / harness.name
        result = measure(harness, folder)
        text = report(result)
        _write(folder / "result.md", text)
        print(f"{text}\n{folder / 'result.json'}", flush=True)
        try:
            write_plots(result, folder)
        except UserError as error:
            print(error, file=sys.stderr)
    return 0


def measure(harness: Harness, folder: Path) -> dict[str, Any]:
    """Measure every cell that is not finished, writing result.json after each of them; return its content.

    Raises:
        UserError: the model cannot be loaded, or nothing can be written to `folder`.
    """
    settings = harness.measurement
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    base = fingerprint(harness)
    cells = {cell: _digest(base, cell) for cell in harness.cells()}
    earlier = _read(folder / "result.json") if settings.resume else {}
    finished = {entry["fingerprint"]: entry for entry in earlier.get("cells", [])}
    inputs = {
        frames: entry
        for frames, entry in earlier.get("inputs", {}).items()
        if entry["fingerprint"] == base and int(frames) in harness.grid.frames
    }
    result = {"name": harness.name, "settings": dataclasses.asdict(harness), "environment": describe_environment()}
    result |= {"model": earlier.get("model", {}), "inputs": inputs, "cells": []}
    pending = [cell for cell, digest in cells.items() if digest not in finished]
    if pending:
        for cell, entry in _measured(harness, pending, result, base):
            finished[cells[cell]] = {"cell": dataclasses.asdict(cell), "fingerprint": cells[cell], **entry}
            result["cells"] = [finished[digest] for digest in cells.values() if digest in finished]
            _write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    result["cells"] = [finished[digest] for digest in cells.values()]
    _write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def fingerprint(harness: Harness) -> str:
    """Of everything but the cell that a measurement depends on: settings, code, versions and hardware."""
    settings = dataclasses.replace(harness.measurement, output_dir="", resume=True)
    path = harness.model.path or f"shape {harness.model.shape}"
    return settings_fingerprint(
        harness.model,
        settings,
        describe_hardware(),
        source_digest(Path(__file__).parent),
        Path(__file__).parents[1].joinpath("bench_compress.py").read_text(),
        model_path=checkpoint_path(path),
    )


def _measured(
    harness: Harness, pending: list[Cell], result: dict[str, Any], base: str
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Load the model and measure the pending cells one by one; what else is learnt goes into `result`."""
    settings = harness.measurement
    subject = load_subject(harness.model, settings)
    result["model"] = _described(harness, subject)
    with tempfile.TemporaryDirectory() as clips:
        for frames, group in groupby(pending, key=lambda cell: cell.frames):
            clip = Path(clips) / "clip.mp4"
            write_clip(clip, frames, settings.clip_width, settings.clip_height)
            times, pixels = subject.inputs(clip, frames, settings)
            result["inputs"][str(frames)] = {**times, "fingerprint": base}
            for cell in group:
                print(f"{harness.name}: {cell.name}", file=sys.stderr, flush=True)
                yield cell, measure_cell(subject, cell, pixels, settings)


def _described(harness: Harness, subject: Subject) -> dict[str, str]:
    settings, model = harness.model, subject.model
    features = f"The clip is synthetic, {harness.measurement.clip_width} x {harness.measurement.clip_height} H.264."
    if settings.shape is not None:
        features += " What is compressed are eval.bench_compress.synthetic_features, put in after the pooling."
    return {
        "description": settings.path or f"Random weights in the shape {settings.shape}",
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "features": features,
    }


def _digest(base: str, cell: Cell) -> str:
    return hashlib.sha256(f"{base}\n{cell!r}".encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"Cannot write results to {path.parent}: {error.strerror or error}. Make room, or choose another folder "
            "with measurement.output_dir=FOLDER, and run the same command again: what is finished is kept."
        ) from error


if __name__ == "__main__":
    sys.exit(run(main))
