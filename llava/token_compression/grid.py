"""The tokens of a frame as rows and columns."""

import math
from dataclasses import dataclass

from llava.errors import ConfigError


@dataclass(frozen=True)
class GridOptions:
    """Options of methods that look at where in its frame a token is.

    Attributes:
        rows: rows of tokens in a frame; None for square frames.
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"rows must be at least 1, got {self.rows}.")

    def shape(self, tokens_per_frame: int) -> tuple[int, int]:
        """Rows and columns of a frame.

        Raises:
            ConfigError: the frame is not a square, or has another number of tokens than whole rows.
        """
        rows = math.isqrt(tokens_per_frame) if self.rows is None else self.rows
        if self.rows is None and rows * rows != tokens_per_frame:
            raise ConfigError(
                f"Frames of {tokens_per_frame} tokens are not square; give their rows: options={{'rows': ...}}."
            )
        if tokens_per_frame % rows != 0:
            raise ConfigError(f"Frames of {tokens_per_frame} tokens do not have {rows} rows of the same length.")
        return rows, tokens_per_frame // rows
