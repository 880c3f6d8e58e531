"""The pictures of docs/results.md, from a finished run of the suite.

    python -m docs.pictures [configs/suite/methods.yaml] [key=value ...]

Writes docs/images/curves.svg: accuracy against retention of the methods in `CURVES`, a panel for each model, with 95 %
intervals; and success.png and failure.png: one question each about the last model, at a tenth of the tokens, the
components of `scissor` above those of the recommended preset (as `llava-scissor show` draws them). Success: the first
question that the preset alone answers rightly. Failure: of the kind of question that costs it most, the first, about
another video, that it answers wrongly and the uncompressed model rightly. Prints what is asked and answered.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

from eval.suite.config import Suite, load_suite
from eval.suite.features import Asked
from eval.suite.report import Key, Outcome, key_of
from eval.videos import make_videos
from eval.world import Split
from llava.config import setting_name
from llava.show.picture import colors, draw
from llava.token_compression import CompressionConfig, compress

FOLDER = Path(__file__).parent / "images"
RATIO = 0.1
PRESET = "scissor_placed-position_ids=source"
CURVES = (PRESET, "scissor-position_ids=source", "uniform-position_ids=source", "scissor", "uniform", "random")
SHOWN = 8
"""Frames in a row."""
PIXELS = 150
"""Of each of them."""


def main(arguments: Sequence[str]) -> None:
    suite = load_suite(arguments[0] if arguments else "configs/suite/methods.yaml", arguments[1:])
    FOLDER.mkdir(exist_ok=True)
    folders = [Path(suite.output_dir) / suite.name / Path(model).name for model in suite.models]
    outcomes = [read(suite, folder) for folder in folders]
    draw_curves([folder.name for folder in folders], outcomes)
    good = success(outcomes[-1])
    for name, number in (("success", good), ("failure", failure(outcomes[-1], good))):
        draw_question(suite, folders[-1], outcomes[-1].questions.asked[number]).save(FOLDER / f"{name}.png")
        tell(name, outcomes[-1], number)


def read(suite: Suite, folder: Path) -> Outcome:
    """What a run has left in its folder of the methods in `CURVES`."""
    questions = newest(folder, "questions-*.jsonl")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    asked = [Asked(**row | {"options": tuple(row["options"])}) for row in rows]
    cells = {}
    for config in suite.settings():
        if key_of(config)[0] in (*CURVES, "uncompressed"):
            cells[key_of(config)] = json.loads((folder / f"{setting_name(config)}.json").read_text())
    return Outcome(suite, asked, cells)


def newest(folder: Path, pattern: str) -> Path:
    """Other runs, of other videos or code, may have left theirs."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def draw_curves(names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    figure = Figure(figsize=(5 * len(outcomes) + 1, 4.2), layout="tight")
    panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for axes, name, outcome in zip(panels, names, outcomes, strict=True):
        ratios = sorted(outcome.suite.retention_ratios)
        for number, method in enumerate(CURVES):
            figures = [outcome.accuracy[method, ratio] for ratio in ratios]
            known = [(100 * ratio, own) for ratio, own in zip(ratios, figures, strict=True) if own]
            x = [ratio for ratio, _ in known]
            axes.plot(x, [own.value for _, own in known], color=f"C{number}", marker="o", markersize=3, label=method)
            low, high = zip(*(own.interval for _, own in known), strict=True)
            axes.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        whole = outcome.accuracy["uncompressed", 1.0]
        if whole:
            axes.axhline(whole.value, color="gray", linestyle=":", label="uncompressed")
        axes.axhline(25, color="lightgray", linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([100 * ratio for ratio in ratios], [f"{100 * ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("tokens kept, %")
        axes.set_title(name, fontsize="medium")
    panels[0].set_ylabel("right, %")
    panels[-1].legend(fontsize="x-small", loc="upper left")
    figure.savefig(FOLDER / "curves.svg", metadata={"Date": None})


def success(outcome: Outcome) -> int:
    """Number of the question."""
    others = [outcome.right[method, RATIO] for method in CURVES if method != PRESET]
    return next(
        number
        for number, own in enumerate(outcome.right[PRESET, RATIO])
        if own and outcome.right["uncompressed", 1.0][number] and not any(other[number] for other in others)
    )


def failure(outcome: Outcome, other: int) -> int:
    """Number of the question, about another video than question `other`."""
    whole, own = outcome.right["uncompressed", 1.0], outcome.right[PRESET, RATIO]
    lost: dict[str, list[int]] = {}
    for number, one in enumerate(outcome.questions.asked):
        lost.setdefault(one.kind, []).append(whole[number] - own[number])
    worst = max(lost, key=lambda kind: float(np.mean(lost[kind])))
    asked = outcome.questions.asked
    elsewhere = [n for n, one in enumerate(asked) if one.kind == worst and one.video != asked[other].video]
    return next(n for n in elsewhere if whole[n] and not own[n])


def draw_question(suite: Suite, folder: Path, asked: Asked) -> Image.Image:
    """Frames with the components of `scissor` above those of the preset."""
    with safe_open(newest(folder, "features-*.safetensors"), framework="pt") as file:
        features = file.get_slice("features")[asked.video]
    videos = make_videos(Split[suite.split], asked.video + 1, suite.seed)
    video = next(itertools.islice(videos, asked.video, None))
    index = np.linspace(0, len(video.frames) - 1, len(features), dtype=int)
    side = round(features.shape[1] ** 0.5)
    sheet = Image.new("RGB", (SHOWN * (PIXELS + 4) - 4, 2 * PIXELS + 4), "white")
    for row, method in enumerate(("scissor", "scissor_placed")):
        result = compress(features, CompressionConfig(method=method, retention_ratio=RATIO))
        palette = colors(len(result.tokens))
        labels = result.assignment.view(-1, side, side).numpy()
        frame_of, token = np.divmod(result.positions.numpy(), side * side)
        kept = np.stack(np.divmod(token, side), 1)
        for column, frame in enumerate(np.linspace(0, len(features) - 1, SHOWN).round().astype(int)):
            picture = draw(video.frames[index[frame]], labels[frame], kept[frame_of == frame], palette)
            place = (column * (PIXELS + 4), row * (PIXELS + 4))
            sheet.paste(picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS), place)
    return sheet.quantize(128)


def tell(name: str, outcome: Outcome, number: int) -> None:
    asked = outcome.questions.asked[number]
    print(f"{name}: video {asked.video}, {asked.kind}: {asked.text} {', '.join(asked.options)}; right: {asked.letter}")
    keys: list[Key] = [("uncompressed", 1.0), *((method, RATIO) for method in CURVES)]
    for key in keys:
        letter = outcome.cells[key]["chosen"][number]
        print(f"  {key[0]}: {letter}, {asked.options['ABCD'.index(letter)]}")


if __name__ == "__main__":
    main(sys.argv[1:])
