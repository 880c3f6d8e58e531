"""Files that come with the package: the tiny trained model and a demo video."""

from importlib.resources import files
from pathlib import Path

BUNDLED = ("tiny",)
"""Names of the checkpoints that come with the package."""


def tiny_model_path(name: str = "tiny") -> Path:
    """Folder of a bundled checkpoint, in the original LLaVA layout."""
    return Path(str(files(__name__) / name))


def checkpoint_path(path: str) -> str:
    """`path`, or the folder of the bundled checkpoint of that name."""
    return str(tiny_model_path(path)) if path in BUNDLED else path
