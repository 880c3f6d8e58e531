"""Training batches: a video and many questions about it, packed into one sequence per video.

    head | video | "\n" | question 1 | question 2 | ...

The chat head, the video and the line break after it are shared by all questions; each question sees only them and
itself, at the positions it would have in a prompt of its own. So the loss is that of single-question prompts, at a
fraction of the cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.questions import Question
from eval.tiny_tokenizer import SYSTEM
from eval.tiny_wordings import Wording

HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"

Asking = tuple[Question, Wording | str]
"""A question, and how it is worded: with its options, or free, with this text after it."""


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

    def pack(self, questions: Sequence[Sequence[Asking]]) -> PackedBatch:
        """Pack the questions about each video."""
        rows = [_Row(self._encode, self._video_tokens, askings) for askings in questions]
        length = max(len(row.ids) for row in rows)
        head = len(self._encode(HEAD))

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (length - len(value)) for value in values])

        branch = padded([row.branch for row in rows], -1)
        see, seen = branch[:, :, None], branch[:, None, :]
        mask = ((seen == 0) | (seen == see)).tril()  # a token sees the trunk (0) and its own branch
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
def answer_logits(model: Any, batch: PackedBatch, videos: Sequence[Tensor]) -> Tensor:
    """Logits (answers, vocabulary) of the next token at every answer of weight 1.

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
    return model.lm_head(hidden[batch.target_rows[answers], batch.target_columns[answers]])


class _Row:
    """One sequence under construction."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]], video_tokens: int, askings: Sequence[Asking]):
        self.encode = encode
        self.ids: list[int] = []
        self.branch: list[int] = []
        self.positions: list[int] = []
        self.targets: list[tuple[int, int, float]] = []  # column, token, weight
        self.kinds: list[str] = []
        self._add([*encode(HEAD), *[0] * video_tokens, *encode("\n")], 0, 0)
        trunk = len(self.ids)
        for number, (question, wording) in enumerate(askings, start=1):
            before = wording.before if isinstance(wording, Wording) else ""
            asked = [*encode(before + question.text)]
            answer = question.free_text_answer
            if answer is not None:
                # The answer itself, asked for at the question mark: what the options are then compared with.
                self._target(asked, encode(f" {answer}")[0], 0.5)
            if isinstance(wording, Wording):
                reply = question.letter
                self.kinds.append(question.kind)
                asked += encode(wording.between)
                for place, (letter, option) in enumerate(wording.options(question)):
                    asked += [*(encode("\n") if place else ()), *encode(option)]
                    # Every option is asked whether it is the one, at its last word.
                    self._target(asked, encode(" yes" if letter == reply else " no")[0], 0.5)
                asked += encode(wording.after + TURN)
            else:
                assert answer is not None
                reply = answer
                self.kinds.append(f"{question.kind}/free")
                asked += encode(wording + TURN)
            for offset, token in enumerate((*encode(reply), *encode(END))):
                self._target(asked, token, 0.5 if offset else 1.0)
                asked.append(token)
            self._add(asked[:-1], number, trunk)

    def _target(self, asked: list[int], token: int, weight: float) -> None:
        """Ask for `token` after all of `asked`, which is added next."""
        self.targets.append((len(self.ids) + len(asked) - 1, token, weight))

    def _add(self, ids: list[int], branch: int, start: int) -> None:
        """Append tokens at positions `start`, `start` + 1, ..."""
        self.positions += range(start, start + len(ids))
        self.ids += ids
        self.branch += [branch] * len(ids)
