"""The command `llava-scissor`: ask about a video, draw its compression, check a checkpoint, calibrate a threshold."""

from __future__ import annotations  # so that a Python that is too old gets as far as being refused

import argparse
import json
import logging
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava import __version__
from llava.cli_errors import run
from llava.errors import ConfigError, UserError
from llava.files import check_file
from llava.versions import check_versions

if TYPE_CHECKING:  # imported when a command runs, so that --help needs neither torch nor a second
    from llava.config import Experiment
    from llava.pipeline import Answer

FLAGS = {
    "retention_ratio": ("compression.retention_ratio", "R", "keep exactly this share of the video tokens, such as 0.1"),
    "threshold": ("compression.similarity_threshold", "T", "join tokens whose cosine similarity is above this"),
    "method": ("compression.method", "M", "compression method, see `llava-scissor methods` (default: scissor)"),
    "preset": ("compression.preset", "P", "settings that work best together: recommended"),
    "model": ("model.path", "PATH", 'checkpoint folder or hub name (default: "tiny", the bundled model)'),
    "device": ("model.device", "D", "auto, cpu, cuda, cuda:1 (default: auto)"),
    "dtype": ("model.dtype", "T", "auto, float32, bfloat16 or float16 (default: auto)"),
    "num_frames": ("video.num_frames", "N", "frames to look at (default: what the checkpoint was trained with)"),
}
"""Options of `ask` and `show` that are short for a `section.key=value`."""

OVERRIDE = re.compile(r"(model|video|compression)\.\w+(\.\w+)*=")
"""What tells a `section.key=value` from the name of a file."""

SIZE = re.compile(r"compression\.(retention_ratio|retained_tokens|similarity_threshold)=")

TEXT_KEYS = ("compression.method", "compression.preset", "model.path", "model.device", "model.dtype")
"""Values that are text even where YAML would read a number or nothing at all, such as the folder `~` or `2024`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    check_versions()
    unknown = [word for word in rest if word.startswith("-") or arguments.command not in ("ask", "show", "calibrate")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see `llava-scissor {arguments.command or ''} --help`.")
    if arguments.command == "ask":
        _ask(arguments, overrides=rest)
    elif arguments.command == "show":
        _show(arguments, overrides=rest)
    elif arguments.command == "check":
        return _check(arguments)
    elif arguments.command == "calibrate":
        _calibrate(arguments, words=arguments.words + rest)
    elif arguments.command == "methods":
        _methods()
    else:
        parser.print_help()
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llava-scissor", description="Ask a video language model, with compressed video tokens.")
    parser.add_argument("--version", action="version", version=f"llava-scissor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    ask = commands.add_parser(
        "ask",
        help="ask a question about a video or an image",
        usage="%(prog)s FILE QUESTION [options] [section.key=value ...]",
        description="Ask a question about a video or an image. Any value of an experiment can be given as "
        "section.key=value, for example video.fps=2 or compression.merge=false. An image is compressed only with "
        "compression.images=true.",
    )
    ask.add_argument("file", metavar="FILE", help="path of a video, or of an image (.jpg, .png, .webp, .bmp)")
    ask.add_argument("question", metavar="QUESTION", help="text in quotes")
    _add_settings(ask)
    ask.add_argument("--max-new-tokens", metavar="N", default="128", help="longest answer, in tokens (default: 128)")
    ask.add_argument("--stream", action="store_true", help="print the answer as it is written")
    ask.add_argument("--verbose", action="store_true", help="show log messages, library warnings and tracebacks")
    show = commands.add_parser(
        "show",
        help="draw what a compression does to a video",
        usage="%(prog)s VIDEO --out DIR [options] [section.key=value ...]",
        description="Write the frames of a video with their components outlined, the same color being one kept token, "
        "and the tokens that represent them marked: PNGs, components.mp4, merge_map.json, and index.html, which holds "
        "everything. Keeps a tenth of the tokens unless a setting says otherwise.",
    )
    show.add_argument("file", metavar="VIDEO", help="path of a video")
    show.add_argument("--out", metavar="DIR", required=True, help="folder to write to; made if it is not there")
    show.add_argument("--question", metavar="TEXT", help="show the answers to it at several retention ratios")
    _add_settings(show)
    show.add_argument("--verbose", action="store_true", help="show log messages, library warnings and tracebacks")
    check = commands.add_parser(
        "check",
        help="say whether a checkpoint would load, what is in it, and what it needs",
        description="Say whether a checkpoint would load, with every reason why not, what is in it, and how much "
        "memory it needs. Only the headers of the weights are read, also on the hub. Exit status 2: it would not load.",
    )
    check.add_argument("checkpoint", metavar="CHECKPOINT", help='folder or hub name ("tiny": the bundled model)')
    check.add_argument("--num-frames", metavar="N", help="count tokens of a video of N frames [video.num_frames]")
    check.add_argument("--json", action="store_true", help="print the facts as JSON")
    check.add_argument("--verbose", action="store_true", help="show log messages, library warnings and tracebacks")
    calibrate = commands.add_parser(
        "calibrate",
        help="find the threshold that keeps a share of the tokens on average",
        usage="%(prog)s --retention-ratio R VIDEO... [options] [section.key=value ...]",
        description="Find the similarity threshold at which videos keep a share of their tokens on average, as the "
        "paper does, and report how far single videos are from it.",
    )
    calibrate.add_argument("words", nargs="+", metavar="VIDEO", help="videos like those that it is to be used on")
    calibrate.add_argument("--retention-ratio", metavar="R", required=True, help="mean share to keep, such as 0.1")
    calibrate.add_argument("--config", metavar="FILE", help="an experiment file whose model, video, compression to use")
    for name in ("method", "preset", "model", "device", "dtype", "num_frames"):
        key, metavar, text = FLAGS[name]
        calibrate.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=f"{text} [{key}]")
    calibrate.add_argument("--json", action="store_true", help="print what is found as JSON")
    calibrate.add_argument("--verbose", action="store_true", help="show log messages, library warnings and tracebacks")
    commands.add_parser("methods", help="list the compression methods", description="List the compression methods.")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="an experiment file whose model, video and compression to use")
    for name, (key, metavar, text) in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=f"{text} [{key}]")


def _ask(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _set_up_logging(arguments.verbose)
    max_new_tokens = _whole_number("--max-new-tokens", arguments.max_new_tokens)

    check_file(Path(arguments.file), UserError)  # before a large model is loaded for nothing

    experiment, compresses = _experiment(arguments, overrides)

    from transformers import TextStreamer

    from llava.pipeline import VideoQA

    if not arguments.verbose:
        _silence_libraries()
    qa = VideoQA.from_config(experiment.model, experiment.video)
    answer = qa.ask(
        arguments.file,
        arguments.question,
        compression=experiment.compressions[0] if compresses else None,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(qa.tokenizer, skip_special_tokens=True) if arguments.stream else None,
    )
    if not arguments.stream:
        print(answer.text)
    print()
    print(report(answer))


def _show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _set_up_logging(arguments.verbose)
    check_file(Path(arguments.file), UserError)
    sizes = [arguments.retention_ratio, arguments.threshold, *(word for word in overrides if SIZE.match(word))]
    if not arguments.config and not any(sizes):
        arguments.retention_ratio = "0.1"
    experiment, compresses = _experiment(arguments, overrides)

    from llava.pipeline import VideoQA
    from llava.show import look, write
    from llava.token_compression import CompressionConfig

    if not arguments.verbose:
        _silence_libraries()
    qa = VideoQA.from_config(experiment.model, experiment.video)
    asked_for = experiment.compressions[0] if compresses else CompressionConfig(retention_ratio=0.1)
    shown = look(qa, arguments.file, qa.compression(asked_for), arguments.question)
    stats = shown.result.stats
    print(f"{stats.kept_tokens} of {stats.source_tokens} tokens are kept ({100 * stats.retention_ratio:.1f} %)")
    for ratio, answer in shown.answers:
        print(f"{100 * ratio:g} %: {answer.text}")
    print(f"see {write(shown, arguments.out)[-1]}")


def _experiment(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Experiment, bool]:
    """The experiment to take the settings from, and whether it says anything about compression."""
    from llava.config import build_experiment
    from llava.yaml_schema import read_mapping

    if arguments.retention_ratio is not None and arguments.threshold is not None:
        raise ConfigError("Give either --retention-ratio or --threshold, not both: each decides how many tokens stay.")
    mapping: dict[str, Any] = read_mapping(arguments.config) if arguments.config else {"name": "ask"}
    given = {key: value for name, (key, _, _) in FLAGS.items() if (value := getattr(arguments, name, None)) is not None}
    overrides = [
        f"{key}={json.dumps(value) if key in TEXT_KEYS else value}" for key, value in given.items()
    ] + overrides
    experiment = build_experiment(mapping, overrides, arguments.config or "command line")
    return experiment, "compression" in mapping or any(override.startswith("compression.") for override in overrides)


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} is {text}: give a whole number of at least 1.")
    return int(text)


def report(answer: Answer) -> str:
    """Frames, tokens before and after compression, and milliseconds per stage, one line each."""
    from llava.instrument import STAGES

    rows = [
        ("frames", f"{answer.frames}"),
        ("tokens before compression", f"{answer.source_tokens}"),
        ("tokens after compression", f"{answer.kept_tokens}  ({100 * answer.retention_ratio:.1f} %)"),
    ]
    if answer.average_tokens != answer.kept_tokens:
        share = 100 * answer.average_tokens / answer.source_tokens
        rows.append(("tokens in a layer, on average", f"{answer.average_tokens:.1f}  ({share:.1f} %)"))
    rows += [(f"{name.replace('_', ' ')}, ms", f"{answer.milliseconds.get(name, 0.0):.1f}") for name in STAGES]
    rows.append(("total, ms", f"{sum(answer.milliseconds.values()):.1f}"))
    width = max(len(label) for label, _ in rows)
    digits = max(len(value.split()[0]) for _, value in rows)
    return "\n".join(
        f"{label:<{width}}  {value.split()[0]:>{digits}}{value[len(value.split()[0]) :]}" for label, value in rows
    )


def _check(arguments: argparse.Namespace) -> int:
    _set_up_logging(arguments.verbose)
    num_frames = None if arguments.num_frames is None else _whole_number("--num-frames", arguments.num_frames)

    from llava.check import check

    if not arguments.verbose:
        _silence_libraries()
    return check(arguments.checkpoint, num_frames, arguments.json)


def _calibrate(arguments: argparse.Namespace, words: list[str]) -> None:
    _set_up_logging(arguments.verbose)
    overrides = [word for word in words if OVERRIDE.match(word)]
    videos = [word for word in words if word not in overrides]
    for video in videos:
        check_file(Path(video), UserError)
    try:
        ratio = float(arguments.retention_ratio)
    except ValueError:
        raise ConfigError(f"--retention-ratio is {arguments.retention_ratio}: give a number such as 0.1.") from None
    # Any size makes a complete setting; the threshold is what is looked for.
    arguments.retention_ratio, arguments.threshold = None, "0"
    experiment, _ = _experiment(arguments, overrides)

    from llava.calibrate import calibrate, report, video_features
    from llava.pipeline import VideoQA

    if not arguments.verbose:
        _silence_libraries()
    qa = VideoQA.from_config(experiment.model, experiment.video)
    setting = qa.compression(experiment.compressions[0])
    found = calibrate([video_features(qa, video) for video in videos], setting, ratio)
    print(report(found, videos, arguments.json))


def _methods() -> None:
    """Each method's name and the first sentence of what is written about it."""
    from llava.token_compression import list_methods
    from llava.token_compression.registry import docstring

    indent = max(map(len, list_methods())) + 2
    for name in list_methods():
        sentence = re.split(r"\.(?=\s+[A-Z]|$)", " ".join(docstring(name).split()), maxsplit=1)[0]
        width = shutil.get_terminal_size().columns
        print(textwrap.fill(f"{name:<{indent}}{sentence}", width, subsequent_indent=" " * indent))


def _set_up_logging(verbose: bool) -> None:
    """This package's warnings in one line each; with `verbose` every message of every library, with its origin."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("llava").setLevel(logging.DEBUG)
    else:
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        logging.getLogger("llava").setLevel(logging.WARNING)


def _silence_libraries() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
