"""Files that come with the package: the tiny trained model."""

from importlib.resources import files
from pathlib import Path


def tiny_model_path() -> Path:
    """Folder of the bundled tiny checkpoint, in the original LLaVA layout."""
    return Path(str(files(__name__) / "tiny"))
