"""Compression of a video that is still arriving, window by window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError, UserError
from llava.token_compression.compress import CompressionResult, check_shape, compress
from llava.token_compression.config import CompressionConfig
from llava.token_compression.inner import refuse_inner
from llava.token_compression.registry import get_method


@dataclass(frozen=True)
class CompressedWindow:
    """Some consecutive frames of a stream, compressed.

    Attributes:
        first_frame: number of the window's first frame in the stream.
        result: what `compress` returns for the window's frames alone; its positions count from `first_frame`.
    """

    first_frame: int
    result: CompressionResult


class StreamingCompressor:
    """Compresses frames as they come, `window` at a time, holding no more than one window of them.

        compressor = StreamingCompressor(CompressionConfig(retention_ratio=0.1), window=64)
        for frames in source:
            for part in compressor.push(frames):
                ...
        last = compressor.finish()

    The result of a window is that of `compress` for its frames alone, bit for bit, however the frames were pushed.
    Sizes are those of a window: `retained_tokens` is so many tokens for each one, the last and shorter one included.
    Nothing is joined across windows.

    Args:
        config: method and size.
        window: frames that are compressed together.

    Raises:
        ConfigError: a window without frames; a method that needs more than frames.
    """

    def __init__(self, config: CompressionConfig, window: int = 32):
        if window < 1:
            raise ConfigError(f"A window must have at least one frame, got window={window}.")
        refuse_inner(config)
        inputs = get_method(config.method).needed(config.options)
        if inputs:
            raise ConfigError(
                f"Method {config.method!r} needs the input {inputs[0]!r} besides frames, which a stream does not "
                "carry; compress whole videos with compress(features, config, ...)."
            )
        self.config = config
        self.window = window
        self._first_frame = 0
        self._held = 0
        self._frames: Tensor | None = None
        self._finished = False

    @torch.no_grad()
    def push(self, frames: Tensor) -> list[CompressedWindow]:
        """Take in frames (any number, tokens_per_frame, dim); returns the windows that they complete.

        Raises:
            UserError: frames that `compress` refuses, or that do not fit to those before; any after `finish`.
        """
        if self._finished:
            raise UserError("This stream is finished; make a new StreamingCompressor for another one.")
        check_shape(frames)
        if self._frames is None:
            self._frames = frames.new_empty(self.window, *frames.shape[1:])
        kind, expected = ((item.shape[1:], item.dtype, item.device) for item in (frames, self._frames))
        if kind != expected:
            raise UserError(f"Frames of a stream must be alike: got {_words(*kind)} after {_words(*expected)}.")
        complete = []
        while len(frames) > 0:
            taken = frames[: self.window - self._held]
            self._frames[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            frames = frames[len(taken) :]
            if self._held == self.window:
                complete.append(self._compressed())
        return complete

    def finish(self) -> CompressedWindow | None:
        """End the stream; returns the window of the frames that are left, None if there are none."""
        self._finished = True
        last = self._compressed() if self._held > 0 else None
        self._frames = None
        return last

    def _compressed(self) -> CompressedWindow:
        assert self._frames is not None
        window = CompressedWindow(self._first_frame, compress(self._frames[: self._held], self.config))
        self._first_frame += self._held
        self._held = 0
        return window


def _words(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{shape[0]} tokens of {shape[1]} dimensions in {str(dtype).removeprefix('torch.')} on {device}"
