"""Answers on disk: one JSON line each, written as it finishes, so that an interrupted evaluation loses nothing.

    log = AnswerLog(folder, settings_fingerprint(model, video, compression), rank=0)
    record = log.get(key) or answer_it()
    log.add(key, record)

Every process of a run appends to its own file and reads those of all. The settings are part of the file name and what
was asked is part of the key, so an answer is never taken from a run of another model, video sampling, compression,
version of the code or file. A last line that was cut off is ignored.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.errors import UserError


class AnswerLog:
    """The answers given under one group of settings in `folder`.

    Raises:
        UserError: the folder or its files cannot be read or written.
    """

    def __init__(self, folder: Path, settings: str, rank: int = 0) -> None:
        self._path = folder / f"answers-{settings[:12]}.rank{rank}.jsonl"
        self._records: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"answers-{settings[:12]}.rank*.jsonl")):
                for record in _read_lines(path):
                    self._records[record["key"]] = record
            _end_last_line(self._path)
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of an earlier answer to the same question, or None."""
        return self._records.get(key)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The record of an answer that was given."""
        return self._records[key]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record, JSON values only; it is on disk when this returns."""
        record = {"key": key, **record}
        self._records[key] = record
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise _cannot_write(self._path.parent, error) from error


def settings_fingerprint(*settings: Any, model_path: str) -> str:
    """Hexadecimal digest of everything but the question that an answer depends on, the package's own code included.

    Args:
        settings: dataclasses or values whose `repr` tells them apart.
        model_path: a checkpoint folder, told apart by its files, or a hub name.
    """
    parts = [
        *map(repr, settings),
        _checkpoint_identity(model_path),
        source_digest(Path(__file__).parent),
        torch.__version__,
        transformers.__version__,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def question_key(request: str, prompt: str, options: Any, files: Sequence[str]) -> str:
    """Hexadecimal digest of one question: its kind, prompt and generation options, and the files it is about."""
    stamps = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files if os.path.exists(path)]
    return hashlib.sha256(json.dumps([request, prompt, options, list(files), stamps]).encode()).hexdigest()


def source_digest(folder: Path) -> str:
    """Digest of all Python files below `folder`: a changed method must not be given the answers of the old one."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _checkpoint_identity(model_path: str) -> str:
    folder = Path(model_path)
    if not folder.is_dir():
        return model_path
    return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off in the middle of a write
            continue
        if isinstance(record, dict) and "key" in record:
            records.append(record)
    return records


def _end_last_line(path: Path) -> None:
    """Give a line that was cut off its line end, so that the next record starts on a line of its own."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"Cannot write answers to {folder}: {error.strerror or error}. Make room or choose another folder, and run "
        "the same command again: what is finished is kept."
    )
