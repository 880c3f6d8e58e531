"""What a command prints, and the status it exits with, when something stops it."""

from __future__ import annotations  # so that a Python that is too old gets as far as being refused

import errno
import logging
import os
import sys
from collections.abc import Callable

from llava.errors import UserError

logger = logging.getLogger(__name__)


def run(main: Callable[[], int | None]) -> int:
    """Call a command's main function and return the exit status; an expected error becomes one line on stderr.

    0 or what `main` returns; 1 out of memory, disk full, output closed; 2 a user's mistake (`UserError`);
    130 interrupted. Any other exception is a defect and keeps its traceback. The traceback of an expected error is
    shown where the level of the "llava" logger is DEBUG.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _stop(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        return _stop(130, "Interrupted.")
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        _discard_output()
        return 1
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        return _stop(1, f"error: {message}")


def _explain(error: Exception) -> str | None:
    """One line for an exhausted resource, None for anything else."""
    torch = sys.modules.get("torch")  # an error of torch's cannot come from a process that has not imported it
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "The GPU ran out of memory. Use fewer frames (video.num_frames=8), keep fewer tokens "
            "(compression.retention_ratio=0.1) or a smaller dtype (model.dtype=bfloat16)."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return (
            "This machine ran out of memory. Use fewer frames (video.num_frames=8), a smaller dtype "
            "(model.dtype=bfloat16) or a smaller model."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"No space is left on the disk{where}. Free some, then run the same command again."
    return None


def _stop(status: int, line: str) -> int:
    logger.debug("Stopped here:", exc_info=True)
    sys.stderr.write(f"{line}\n")
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written would be written again, and fail again, when Python ends
        _discard_output()
    return status


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
