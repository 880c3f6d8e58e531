"""Other libraries' messages and long lists, cut to the length of an error message."""

from collections.abc import Iterable

from llava.errors import UserError

LONGEST_MESSAGE = 200


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "\u2026"


def reason(error: BaseException) -> str:
    """The message of one of our own errors, or of another library's with its kind (a KeyError's is only the key)."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def sample(names: Iterable[str], limit: int | None = 4) -> str:
    """The first names in alphabetical order, and how many more there are; all of them for None."""
    ordered = sorted(names)
    rest = 0 if limit is None else len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")
