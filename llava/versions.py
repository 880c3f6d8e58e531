"""The versions of Python, torch and transformers that this package supports, and whether they are installed.

They are stated once, in pyproject.toml: read from there in a checkout, else from the metadata of the installed package.
Nothing here needs a supported version of anything.
"""

import operator
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path

from llava.errors import VersionError

CHECKED = ("torch", "transformers")
TESTED_TRANSFORMERS = ">=5.0,<5.25"
"""With the models of transformers itself (`llava.hf`), at both ends."""

COMPARE = {">=": operator.ge, "<": operator.lt}


def supported_versions() -> dict[str, str]:
    """The supported range of "python", "torch" and "transformers", such as `>=3.10,<3.14`."""
    statement = Path(__file__).parents[1] / "pyproject.toml"
    text = statement.read_text(encoding="utf-8") if statement.is_file() else ""
    if 'name = "llava-scissor"' in text:
        (python,) = re.findall(r'^requires-python = "(.*)"$', text, re.MULTILINE)
        requirements = re.findall(r'^    "(.*)",$', text, re.MULTILINE)
    else:
        installed = metadata.metadata("llava-scissor")
        python, requirements = installed["Requires-Python"], installed.get_all("Requires-Dist", [])
    ranges = {"python": python}
    for requirement in requirements:
        name, specifier = re.findall(r"^([\w.-]+)([^;]*)", requirement)[0]
        if name in CHECKED:
            ranges[name] = specifier.strip()
    return ranges


def check_versions() -> None:
    """Nothing where Python, torch and transformers are in the supported range; without importing them.

    Raises:
        VersionError: what is installed, what is supported, and the command that mends it.
    """
    supported = supported_versions()
    if not is_in_range(platform.python_version(), supported["python"]):
        raise VersionError(
            f"This is Python {platform.python_version()}, and llava-scissor supports {supported['python']}: make an "
            f"environment with another one, as in `python3.{_newest_minor(supported['python'])} -m venv .venv`."
        )
    found = {name: _installed_version(name) for name in CHECKED}
    wrong = [name for name, version in found.items() if version is None or not is_in_range(version, supported[name])]
    if wrong:
        installed = " and ".join(f"{name} {found[name] or 'is not installed'}" for name in wrong)
        wanted = [f"{name}{supported[name]}" for name in wrong]
        raise VersionError(
            f"Found {installed}, and llava-scissor supports {' and '.join(wanted)}: run "
            f"`python -m pip install {' '.join(map(repr, wanted))}`."
        )


def warn_if_untested(transformers_version: str) -> None:
    """A UserWarning where compression of the models of transformers was not tested with this version of it."""
    if not is_in_range(transformers_version, TESTED_TRANSFORMERS):
        warnings.warn(
            f"Compression of the models of transformers was tested with {TESTED_TRANSFORMERS}, not with "
            f"{transformers_version}; compare a few answers at retention_ratio=1.0 with those of the bare model.",
            stacklevel=5,
        )


def is_in_range(version: str, specifier: str) -> bool:
    """Whether the release that a version belongs to is in a range of `>=` and `<`; `2.6.0a0+nv25` belongs to 2.6.0."""
    return all(
        COMPARE[sign](*_align(_release(version), _release(bound)))
        for sign, bound in re.findall(r"([<>=!~]+)\s*([\w.]+)", specifier)
    )


def _release(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"^\d+(?:\.\d+)*", version)[0].split(".")]


def _align(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    length = max(len(first), len(second))
    return first + [0] * (length - len(first)), second + [0] * (length - len(second))


def _newest_minor(specifier: str) -> int:
    return _release(specifier.partition("<")[2])[1] - 1


def _installed_version(name: str) -> "str | None":
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
