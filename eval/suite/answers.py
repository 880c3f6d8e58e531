"""Answer all questions under one setting: compress every video, one forward pass for all questions about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval.questions import LETTERS
from eval.suite.features import Asked, Data
from eval.tiny_data import PackedBatch, Packer, answer_logits
from eval.tiny_wordings import WORDINGS
from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.compress import CompressionResult
from llava.token_compression.registry import get_method


@dataclass
class Answers:
    """What a model answers under one setting, in the order of `Data.asked`.

    Attributes:
        chosen: the most probable of the letters A to D: the figures count these.
        said: the most probable next token of all, as text: what generation begins with.
        kept_tokens: of each video.
        milliseconds: mean time of `compress` for one video.
    """

    chosen: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    kept_tokens: list[int] = field(default_factory=list)
    milliseconds: float = 0.0


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, data: Data, config: CompressionConfig, batch: int) -> Answers:
    """Compress every video and answer all questions about it.

    Raises:
        ConfigError: the method needs something that the features do not come with.
    """
    needed = get_method(config.method).needed(config.options)
    missing = [name for name in needed if name not in data.inputs]
    if missing:
        raise ConfigError(f"Method {config.method!r} needs {', '.join(missing)}, which these models do not compute.")
    answers = Answers()
    for start in range(0, len(data.asked), batch):
        numbers = range(start, min(start + batch, len(data.asked)))
        results = [
            compress(data.features[i], config, **{name: data.inputs[name][i] for name in needed}) for i in numbers
        ]
        answers.milliseconds += sum(result.stats.milliseconds for result in results) / len(data.asked)
        answers.kept_tokens += [result.stats.kept_tokens for result in results]
        asked = [data.asked[i] for i in numbers]
        logits = _logits(model, tokenizer, results, asked, config.position_ids == "source")
        answers.said += [tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
        answers.chosen += [LETTERS[i] for i in logits[:, tokenizer.convert_tokens_to_ids([*LETTERS])].argmax(-1)]
    return answers


def _logits(
    model: Any, tokenizer: Any, results: Sequence[CompressionResult], asked: Sequence[Sequence[Asked]], source: bool
) -> Tensor:
    """(questions, vocabulary), of the first token of each answer."""
    questions = [[(one.question(), WORDINGS["videomme"]) for one in row] for row in asked]
    packed = Packer(tokenizer, len(results[0].tokens) + 1).pack(questions)
    if source:
        _number_by_source(packed, results)
    return answer_logits(model, packed, [result.tokens for result in results])


def _number_by_source(packed: PackedBatch, results: Sequence[CompressionResult]) -> None:
    """Leave kept tokens, the newline and the text after them at the positions that they have without compression."""
    start = packed.video.start
    for row, result in enumerate(results):
        positions: Tensor = packed.position_ids[row]
        positions[packed.video.stop :] += result.stats.source_tokens - result.stats.kept_tokens
        positions[start : packed.video.stop - 1] = start + result.positions
        positions[packed.video.stop - 1] = start + result.stats.source_tokens
