"""Prompt tokens and stopping, and images in the same place: the helpers that LLaVA scripts import."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from llava.anyres import get_anyres_image_grid_shape, select_best_resolution
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.images import (
    divide_to_patches,
    expand2square,
    load_image_from_base64,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
)

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> "list[int] | torch.Tensor":
    """Tokenize a prompt whose every "<image>" becomes `image_token_index`.

    The text between the tags is tokenized piece by piece; a beginning-of-text token is kept once, at the start.

    Args:
        prompt: text with any number of "<image>" tags.
        tokenizer: a transformers tokenizer.
        return_tensors: "pt" for a (length,) int64 tensor, None for a list.

    Raises:
        UserError: another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise UserError(f'return_tensors is {return_tensors!r}; tokenizer_image_token returns "pt" or a list (None).')
    first, *others = [tokenizer(piece).input_ids for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    has_bos = bool(first) and first[0] == tokenizer.bos_token_id
    ids = list(first)
    for piece in others:
        ids += [image_token_index, *piece[has_bos:]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def get_model_name_from_path(model_path: str) -> str:
    """Last component of a path or hub name; `run/checkpoint-100` becomes `run_checkpoint-100`."""
    *parents, last = model_path.strip("/").split("/")
    return f"{parents[-1]}_{last}" if parents and last.startswith("checkpoint-") else last


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a row as soon as its new text holds one of the keywords.

    Args:
        keywords: strings that end the answer.
        tokenizer: decodes the new tokens.
        input_ids: (rows, length) the prompt. Output that begins with it is searched after it only; a LLaVA model
            generates from embeddings, so its output holds new tokens only.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        # A keyword may be split differently in context, but never into more tokens than it has bytes.
        self.window = max((len(keyword.encode()) for keyword in self.keywords), default=0) + 1

    def __call__(self, output_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(rows,) bool: which rows are done."""
        start = self._prompt_length(output_ids)
        tails = self.tokenizer.batch_decode(output_ids[:, start:][:, -self.window :], skip_special_tokens=False)
        done = [any(keyword in tail for keyword in self.keywords) for tail in tails]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _prompt_length(self, output_ids: torch.Tensor) -> int:
        length = self.prompt.shape[1]
        if output_ids.shape[1] < length or output_ids.shape[0] != self.prompt.shape[0]:
            return 0
        return length if torch.equal(output_ids[:, :length], self.prompt.to(output_ids.device)) else 0
