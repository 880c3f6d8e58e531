"""What the harness asks of a model: `tree` answers for this package's own models, `hf` for those of transformers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eval.efficiency.config import Cell, Measurement
from llava.serving import VideoTokens


@dataclass(frozen=True)
class Prefill:
    """The prompts of a batch, read once.

    Attributes:
        positions: of each prompt, as the language model got it.
        cache_bytes: of keys and values.
        operators: floating-point operations of the language model by operator.
    """

    positions: int
    cache_bytes: int
    operators: dict[str, int]


class Subject(Protocol):
    """A model under measurement.

    Attributes:
        model: in eval mode on its device.
        decoder: configuration of its language model.
        stages: of the time to first token, in their order, as the recorder of `llava.instrument` names them.
        longest_prompt: positions that it reads.
        has_block: whether `compression` puts hooks on it, whose cost is worth knowing.
    """

    model: Any
    decoder: Any
    stages: tuple[str, ...]
    longest_prompt: int
    has_block: bool

    def inputs(self, clip: Path, frames: int, settings: Measurement) -> tuple[dict[str, dict[str, float]], Any]:
        """Milliseconds of what comes before the model, and pixels in main memory."""
        ...

    def layout(self, frames: int) -> VideoTokens:
        """Tokens of a video without compression."""
        ...

    def arguments(self, cell: Cell, pixels: Any, settings: Measurement) -> tuple[dict[str, Any], int]:
        """What `generate` takes, and the positions of each prompt without compression."""
        ...

    def features(self, cell: Cell, seed: int) -> AbstractContextManager[int]:
        """Within it, features of random weights are plausible ones, which occupy so many bytes on the device."""
        ...

    def setting(self, cell: Cell) -> AbstractContextManager[None]:
        """Within it, the model compresses as the cell says, and its stages are recorded."""
        ...

    def generate(self, arguments: dict[str, Any], **options: Any) -> Any:
        """The model's `generate`, from main memory on."""
        ...

    def further_question(self, arguments: dict[str, Any]) -> Callable[[], float] | None:
        """Milliseconds to the first token about a video that was read before, where the model can do that."""
        ...

    def prefill(self, arguments: dict[str, Any]) -> Prefill:
        """Read the prompts once."""
        ...
