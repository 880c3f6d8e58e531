"""Training batches: a video and many questions about it, packed into one sequence per video.

    head | video | "\\n" | benchmark instruction | question 1 | question 2 | ...

The prompt is a tree: the chat head, the video and the line break after it are shared by all questions, the benchmark's
instruction line by all four-option questions, and each question sees only its own path to the root, at the positions
it would have in a prompt of its own. So the loss is that of single-question prompts, at a fraction of the cost.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.questions import LETTERS, Question
from eval.tiny_tokenizer import FREE_REQUEST, MC_INSTRUCTION, MC_REQUEST, SYSTEM

HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass
class PackedBatch:
    """Text side of a batch of B sequences of L tokens, V of them video slots.

    input_ids (B, L), 0 in the video slots, which lie at `video`; mask (B, 1, L, L) bool, True where attention is
    allowed; position_ids (B, L); target_rows and target_columns (M,): where a next token is asked for; targets (M,):
    that token; weights (M,): its weight in the loss; kinds: for every answer (weight 1) `kind` or `kind/free`.
    """

    input_ids: Tensor
    mask: Tensor
    position_ids: Tensor
    target_rows: Tensor
    target_columns: Tensor
    targets: Tensor
    weights: Tensor
    kinds: list[str]
    video: slice


class Packer:
    """Turns lists of questions, one list per video, into a `PackedBatch`.

    Args:
        tokenizer: the tiny model's tokenizer.
        video_tokens: video slots V per sequence, newline tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, video_tokens: int):
        self._encode = lru_cache(maxsize=None)(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self._video_tokens = video_tokens

    def pack(self, questions: Sequence[Sequence[tuple[Question, bool]]], rng: random.Random) -> PackedBatch:
        """Pack per video a sequence of (question, with options?) pairs."""
        rows = [_Row(self._encode, self._video_tokens, pairs, rng) for pairs in questions]
        length = max(len(row.ids) for row in rows)
        head = len(self._encode(HEAD))

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (length - len(value)) for value in values])

        branch = padded([row.branch for row in rows], -1)
        options = padded([row.options for row in rows], 0).bool()
        see, seen = branch[:, :, None], branch[:, None, :]
        # A token sees the trunk (0), its own branch and, in a four-option question, the instruction (1).
        mask = ((seen == 0) | (seen == see) | ((seen == 1) & options[:, :, None])).tril()
        targets = [(r, *target) for r, row in enumerate(rows) for target in row.targets]
        at_rows, at_columns, tokens, weights = zip(*targets, strict=True)
        return PackedBatch(
            input_ids=padded([row.ids for row in rows], 0),
            mask=mask[:, None],
            position_ids=padded([row.positions for row in rows], 0),
            target_rows=torch.tensor(at_rows),
            target_columns=torch.tensor(at_columns),
            targets=torch.tensor(tokens),
            weights=torch.tensor(weights),
            kinds=[kind for row in rows for kind in row.kinds],
            video=slice(head, head + self._video_tokens),
        )


@torch.inference_mode()
def answer_tokens(model: Any, batch: PackedBatch, videos: Sequence[Tensor]) -> Tensor:
    """The most probable next token (answers,) int64 of the whole vocabulary at every answer of weight 1.

    Args:
        model: the tiny Video-LLM.
        batch: packed for as many video slots as there are visual tokens and the newline after them.
        videos: the visual tokens (V - 1, dim) of each video.
    """
    newline = model.get_model().image_newline[None]
    visual = torch.stack([torch.cat([tokens, newline]) for tokens in videos])
    text = model.get_input_embeddings()(batch.input_ids)
    embeds = torch.cat([text[:, : batch.video.start], visual, text[:, batch.video.stop :]], 1)
    hidden = model.get_model()(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    answers = batch.weights == 1.0
    return model.lm_head(hidden[batch.target_rows[answers], batch.target_columns[answers]]).argmax(-1)


class _Row:
    """One sequence under construction."""

    def __init__(self, encode, video_tokens: int, pairs: Sequence[tuple[Question, bool]], rng: random.Random):
        self.ids: list[int] = []
        self.branch: list[int] = []
        self.options: list[int] = []
        self.positions: list[int] = []
        self.targets: list[tuple[int, int, float]] = []  # column, token, weight
        self.kinds: list[str] = []
        trunk = [*encode(HEAD), *[0] * video_tokens, *encode("\n")]
        trunk_end = self._add(trunk, 0, 0, 0)
        instruction_end = self._add([*encode(MC_INSTRUCTION), *encode("\n")], 1, 1, trunk_end)
        for number, (question, with_options) in enumerate(pairs, start=2):
            asked = [*encode(question.text), *encode("\n")]
            answer = question.free_text_answer
            column = len(self.ids)
            if with_options:
                for letter, option in zip(LETTERS, question.options, strict=True):
                    asked += encode(f"{letter}. {option}")
                    # Every option is asked whether it is the one, at its last word.
                    verdict = " yes" if letter == question.letter else " no"
                    self.targets.append((column + len(asked) - 1, encode(verdict)[0], 0.5))
                    asked += encode("\n")
                asked += [*encode("\n"), *encode(MC_REQUEST), *encode(TURN)]
                start, reply = instruction_end, [*encode(question.letter), *encode(END)]
                self.kinds.append(question.kind)
            else:
                assert answer is not None
                request = [*encode("\n"), *encode(FREE_REQUEST)] if rng.random() < 0.5 else []
                asked = [*encode(question.text), *request, *encode(TURN)]
                start, reply = trunk_end, [*encode(answer), *encode(END)]
                self.kinds.append(f"{question.kind}/free")
            self._add([*asked, *reply[:-1]], number, int(with_options), start)
            last = column + len(asked) - 1
            for offset, token in enumerate(reply):
                self.targets.append((last + offset, token, 1.0 if offset == 0 else 0.5))
            if answer is not None:
                # The answer itself, asked for at the question mark: what the options are then compared with.
                self.targets.append((column + len(encode(question.text)) - 1, encode(f" {answer}")[0], 0.5))

    def _add(self, ids: list[int], branch: int, options: int, start: int) -> int:
        """Append tokens at positions `start`, `start` + 1, ...; returns the position after the last one."""
        self.ids += ids
        self.branch += [branch] * len(ids)
        self.options += [options] * len(ids)
        self.positions += range(start, start + len(ids))
        return start + len(ids)
