"""Other libraries' messages and long lists, cut to the length of an error message."""

from collections.abc import Iterable

LONGEST_MESSAGE = 200


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "\u2026"


def sample(names: Iterable[str], limit: int = 4) -> str:
    """The first names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")
