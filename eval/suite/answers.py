"""Answer all questions under one setting: compress every video, one forward pass for all questions about it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.suite.features import Asked, Data
from eval.tiny_data import PackedBatch, Packer, answer_tokens
from eval.tiny_wordings import WORDINGS
from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.compress import CompressionResult
from llava.token_compression.registry import get_method


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, data: Data, config: CompressionConfig, batch: int
) -> tuple[list[str], list[int], float]:
    """The most probable next token after each question, as text, in the order of `data.asked`.

    Returns:
        Besides, how many tokens of each video were kept, and the mean milliseconds of `compress`.

    Raises:
        ConfigError: the method needs something that the features do not come with.
    """
    needed = get_method(config.method).needed(config.options)
    missing = [name for name in needed if name not in data.inputs]
    if missing:
        raise ConfigError(f"Method {config.method!r} needs {', '.join(missing)}, which these models do not compute.")
    said: list[str] = []
    kept: list[int] = []
    milliseconds = 0.0
    for start in range(0, len(data.asked), batch):
        numbers = range(start, min(start + batch, len(data.asked)))
        results = [
            compress(data.features[i], config, **{name: data.inputs[name][i] for name in needed}) for i in numbers
        ]
        milliseconds += sum(result.stats.milliseconds for result in results)
        kept += [result.stats.kept_tokens for result in results]
        said += _answers(model, tokenizer, results, [data.asked[i] for i in numbers], config.position_ids == "source")
    return said, kept, milliseconds / len(data.asked)


def _answers(
    model: Any, tokenizer: Any, results: Sequence[CompressionResult], asked: Sequence[Sequence[Asked]], source: bool
) -> list[str]:
    questions = [[(one.question(), WORDINGS["videomme"]) for one in row] for row in asked]
    packed = Packer(tokenizer, len(results[0].tokens) + 1).pack(questions)
    if source:
        _number_by_source(packed, results)
    tokens = answer_tokens(model, packed, [result.tokens for result in results])
    return [tokenizer.decode([token]) for token in tokens.tolist()]


def _number_by_source(packed: PackedBatch, results: Sequence[CompressionResult]) -> None:
    """Leave kept tokens, the newline and the text after them at the positions that they have without compression."""
    start = packed.video.start
    for row, result in enumerate(results):
        positions: Tensor = packed.position_ids[row]
        positions[packed.video.stop :] += result.stats.source_tokens - result.stats.kept_tokens
        positions[start : packed.video.stop - 1] = start + result.positions
        positions[packed.video.stop - 1] = start + result.stats.source_tokens
