"""The beginning of a prompt, with its images and videos, read once for many continuations."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from llava.errors import UserError
from llava.model.newlines import VisualTokens


@dataclass(frozen=True)
class VisualPrefix:
    """What `read_prefix` returns: prompts that begin like this skip everything up to here, vision tower included.

    It holds the keys and values of `length` positions, on the model's device: 12,288 bytes for each in 16 bits at the
    shape of LLaVA-OneVision-0.5B, 57,344 at that of 7B. They are freed with the object.

    Attributes:
        input_ids: (n,) int64, ends with the last placeholder.
        items: the tokens of each placeholder's image or video.
        source_positions: whether kept tokens have the rotary positions of their representatives.
        length: positions that these ids and items take.
        cache: the keys and values of these positions.
    """

    input_ids: torch.Tensor
    items: list[VisualTokens]
    source_positions: bool
    length: int
    cache: DynamicCache
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_begins(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Refuse prompts (rows, length) that are not one row, unpadded, which begins like this and goes on."""
        n = len(self.input_ids)
        if input_ids.shape[0] != 1 or (attention_mask is not None and not attention_mask.all()):
            raise UserError("A prompt that goes on from a prefix must be a single one, without padding.")
        if input_ids.shape[1] <= n or not torch.equal(input_ids[0, :n], self.input_ids):
            raise UserError("The prompt does not begin with the prefix, or ends with it.")

    @contextlib.contextmanager
    def lent(self, rows: int) -> Iterator[DynamicCache]:
        """The cache, for `rows` continuations at the same time; afterwards it is as before.

        One row appends to the cache itself, which is cut back at the end; another thread waits for that. Several rows
        take a copy each.
        """
        with self._lock:
            if rows > 1:
                yield self._copies(rows)
                return
            try:
                yield self.cache
            finally:
                new = self.cache.get_seq_length() - self.length
                if new > 0:
                    self.cache.crop(-new)

    def _copies(self, rows: int) -> DynamicCache:
        copies = DynamicCache()
        layers: Any = self.cache.layers
        for index, layer in enumerate(layers):
            copies.update(layer.keys.repeat(rows, 1, 1, 1), layer.values.repeat(rows, 1, 1, 1), index)
        return copies
