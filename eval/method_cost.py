"""Operations and memory of every method, counted while it runs: `python -m eval.method_cost`.

Counted are, whatever the machine: two operations for each multiplication with addition of a matrix product, one for
each number that any other operator of PyTorch makes; and for memory the numbers in the largest tensor. What a
docstring states as `Cost: O(...) operations, O(...) memory` is a sum of products of F, N, T, K, D with whole powers
(`F N^2 D + K T`), and log (`T log T`); see docs/methods.md for the letters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from docs.methods import documentation
from eval.bench_compress import synthetic_features
from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, list_methods
from llava.token_compression.inner import DecodingStep, InnerVideo
from llava.token_compression.inputs import SHAPES
from llava.token_compression.registry import Method, get_method

DIM, RATIO = 64, 0.2
SIZES = {"base": (8, 64), "twice the frames": (16, 64), "four times the tokens": (8, 256)}
"""Frames and tokens per frame."""


@dataclass(frozen=True)
class Count:
    """What one call computed: operations, and numbers in the largest tensor."""

    operations: int
    memory: int


class Meter(TorchDispatchMode):
    """Counts the operators that run in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.memory = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        packet = function._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif not function.is_view:
            self.operations += sum(sizes)
        self.memory = max(self.memory, *sizes, 0)
        return result


def count(name: str, frames: int, tokens_per_frame: int) -> Count:
    """What choosing a fifth of the tokens of one synthetic video takes, without the final merge.

    Of a method that prunes inside the language model it is that choice, with one head, and all tokens having entered.

    Raises:
        ConfigError: the method needs more than the tokens.
    """
    method = get_method(name)
    unknown = [given for given in method.inputs if given not in SHAPES]
    if unknown:
        raise ConfigError(f"Method {name!r} needs {', '.join(unknown)}, which synthetic features do not come with.")
    sizes = {"frames": frames, "tokens": tokens_per_frame, "any": DIM, "patches": 4 * tokens_per_frame}
    generator = torch.Generator().manual_seed(0)
    inputs = {
        given: torch.rand(*(sizes[what] for what in SHAPES[given]), generator=generator) for given in method.inputs
    }
    features = synthetic_features(frames, tokens_per_frame, DIM)
    config = CompressionConfig(method=name, retention_ratio=1.0 if name == "none" else RATIO)
    if method.before is not None:
        hidden = features.flatten(0, 1)
        attention = torch.rand(1, 1, len(hidden), generator=generator)
        groups = torch.arange(len(hidden)) // tokens_per_frame
        video = InnerVideo(attention, hidden, groups, hidden[:1], config.options)
        with torch.no_grad(), Meter() as meter:
            _prune(method, video, config)
        return Count(meter.operations, meter.memory)
    with torch.no_grad(), Meter() as meter:
        method.keep(features, config, config.budget(frames * tokens_per_frame), **inputs)
    return Count(meter.operations, meter.memory)


def _prune(method: Method, video: InnerVideo, config: CompressionConfig) -> None:
    """Let a method choose inside the language model."""
    left = config.options.left(config, len(video.hidden))
    if not config.options.while_decoding:
        method.keep(video, left)
        return
    attention = video.attention[0]
    everything = torch.ones_like(attention, dtype=torch.bool)
    counts, previous = torch.tensor([left]), attention.flip(1)
    method.keep(DecodingStep(attention, previous, everything, counts, everything, config.options))


def stated(name: str) -> tuple[str, str]:
    """The formulas for operations and memory in the method's docstring.

    Raises:
        ConfigError: there are none.
    """
    cost = documentation(name).cost
    match = re.match(r"O\(([^()]*)\) operations, O\(([^()]*)\) memory", cost)
    if match is None:
        raise ConfigError(f"Method {name!r}: Cost: {cost!r} does not begin O(...) operations, O(...) memory.")
    return match[1], match[2]


def evaluate(formula: str, letters: Mapping[str, float]) -> float:
    """The value of a sum of products, such as `F N^2 D + T log T`.

    Raises:
        ConfigError: a letter that is not known, or something else.
    """
    total = 0.0
    for term in formula.split("+"):
        product = 1.0
        for factor in re.sub(r"\blog\s+", "log:", term).split():
            match = re.fullmatch(r"(log:)?(\w+?)(?:\^(\d+))?", factor)
            if match is None or not (match[2] in letters or match[2].isdecimal()):
                raise ConfigError(f"{formula!r}: {factor!r} is not one of {', '.join(letters)}, a power or log of one.")
            value = letters.get(match[2]) or float(match[2])
            product *= (math.log2(value) if match[1] else value) ** int(match[3] or 1)
        total += product
    return total


def growth(name: str) -> dict[str, tuple[Count, dict[str, tuple[float, float]]]]:
    """For each size its count and, by "operations" and "memory", how much it and what is stated grow from the base."""
    formulas = dict(zip(("operations", "memory"), stated(name), strict=True))
    found: dict[str, tuple[Count, dict[str, tuple[float, float]]]] = {}
    base = count(name, *SIZES["base"])
    for label, size in SIZES.items():
        counted = count(name, *size)
        ratios = {
            what: (
                getattr(counted, what) / getattr(base, what),
                evaluate(formula, _letters(*size)) / evaluate(formula, _letters(*SIZES["base"])),
            )
            for what, formula in formulas.items()
        }
        found[label] = counted, ratios
    return found


def _letters(frames: int, tokens: int) -> dict[str, float]:
    total = frames * tokens
    return {"F": frames, "N": tokens, "T": total, "K": round(RATIO * total), "D": DIM}


def main() -> None:
    print("| method | size | M operations | grow (stated) | K numbers | grow (stated) |\n|---|---|--:|--:|--:|--:|")
    for name in list_methods():
        try:
            rows = growth(name)
        except ConfigError as error:
            print(f"| {name} | {error} | | | | |")
            continue
        for label, (counted, ratios) in rows.items():
            operations, memory = ("{:.1f} ({:.1f})".format(*ratios[what]) for what in ("operations", "memory"))
            numbers = f"{counted.operations / 1e6:.2f} | {operations} | {counted.memory / 1e3:.1f} | {memory}"
            print(f"| {name} | {label}: {' x '.join(map(str, SIZES[label]))} | {numbers} |")


if __name__ == "__main__":
    main()
