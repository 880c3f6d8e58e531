"""Training-free compression of video tokens: pure functions on tensors, and a context manager for models.

    result = compress(features, CompressionConfig(retention_ratio=0.1))

Every file of this folder is imported here, so that a file with a `@register`ed function is all a new method takes.
"""

import importlib
import pkgutil

from llava.token_compression.compress import CompressionResult, CompressionStats, compress, compress_batch
from llava.token_compression.config import CompressionConfig
from llava.token_compression.context import apply, compression, remove
from llava.token_compression.registry import list_methods, register
from llava.token_compression.stream import CompressedWindow, StreamingCompressor

__all__ = [
    "CompressedWindow",
    "CompressionConfig",
    "CompressionResult",
    "CompressionStats",
    "StreamingCompressor",
    "apply",
    "compress",
    "compress_batch",
    "compression",
    "list_methods",
    "register",
    "remove",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
