"""LLaVA-Scissor: training-free video token compression in a LLaVA-OneVision model tree."""

import sys
from pathlib import Path

from llava.versions import check_versions

__version__ = "0.1.0"

# The command checks by itself, where it can print an error as one line; as `python -m llava.cli` it is "-m" until then.
if not sys.argv or Path(sys.argv[0]).stem not in ("llava-scissor", "-m"):
    check_versions()
