"""Whether a file that a user names is there to be read."""

from pathlib import Path

from llava.errors import UserError


def check_file(path: Path, error: type[UserError]) -> None:
    """Raise an `error` unless `path` is a readable file with something in it."""
    if path.is_dir():
        raise error(f"{path} is a folder: give the path of one file.")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except FileNotFoundError as cause:
        raise error(f"There is no file {path}: check the path (the current folder is {Path.cwd()}).") from cause
    except OSError as cause:
        raise error(f"{path} cannot be opened ({cause.strerror}): check the path and its permissions.") from cause
    if not first:
        raise error(f"{path} is empty (0 bytes): download or record it again.")
