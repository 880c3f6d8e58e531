"""Write a trained tiny model as a checkpoint in the original LLaVA layout, with a model card that was measured.

python -m eval.export_tiny --run runs/tiny --to llava/assets/tiny --videos 400
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from eval.measure_tiny import measure, table, wording_table
from eval.tiny_model import SIZES, build_model
from eval.tiny_stages import STAGES
from eval.tiny_tokenizer import save_tokenizer
from eval.world import Split
from llava.errors import UserError

CARD = """\
# The tiny Video-LLM

A {parameters:.2f} M-parameter Video-LLM in the shape of LLaVA-OneVision: SigLIP vision tower (3 layers of 96, patch 8,
{pixels} pixels), 2-layer MLP projector, 2x2 pooling to {tokens} tokens per frame, Qwen2 language model (5 layers of
{width}), {frames} frames, {video_tokens} video tokens, its own tokenizer of {vocabulary} tokens. Checkpoint in the
original LLaVA layout.
Licence: Apache-2.0, like the project.

It knows one small world: videos of one to four colored shapes that move, appear, vanish and change color on textured,
drifting, noisy backgrounds (`eval/world.py`), and questions about them (`eval/questions.py`). It exists so that token
compression can be seen, tested and compared on any machine. It knows nothing of real videos.

## Training

`bash scripts/train_tiny.sh OUT --size {name} --seed {seed} --workers {workers}` repeats it: {minutes:.0f} minutes of
training in all on {hardware}, PyTorch {torch}, transformers {transformers}.

| stage | steps | videos per step | minutes |
| --- | --: | --: | --: |
{stages}

Training, development and evaluation videos come from disjoint seeds (`eval.world.seed_for`); no training video is seen
twice.

## Accuracy

All tokens kept, {videos} videos of the evaluation split (`python -m eval.measure_tiny --videos {videos}`). Four
options, the wrong ones drawn from what the same video shows wherever it shows enough; chance is 25 %. "Swapped": the
same questions about the next video's frames; "blank": about a gray video.

{table}

{verdict}

The same questions in the wording of each benchmark (`eval/tiny_wordings.py`); some have a fifth option.

{wordings}
"""


def export(run: Path, target: Path, videos: int) -> None:
    """Write checkpoint, tokenizer and model card of a finished run into `target`.

    Raises:
        UserError: a stage of the run has not been finished.
    """
    states: dict[str, dict[str, Any]] = {}
    for stage, config in STAGES.items():
        path = run / f"{stage}.pt"
        states[stage] = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"step": 0}
        if states[stage]["step"] < config.steps:
            raise UserError(
                f"Stage {stage} of {run} has {states[stage]['step']} of {config.steps} steps; "
                f"finish it with `python -m eval.train_tiny --out {run}`."
            )
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(target)
    settings = json.loads(states["joint"]["run"])
    size = SIZES[settings["size"]]
    model = build_model(tokenizer, settings["seed"], size)
    weights = {name: value for state in states.values() for name, value in state["weights"].items()}
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        if name.startswith("model."):
            parameters[name.removeprefix("model.")].data.copy_(value)
    model.save_pretrained(target)

    rows = measure(target, Split.EVAL, 1, videos).rows()
    (target / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    card = CARD.format(
        pixels=size.image_size,
        tokens=f"{size.grid // 2} x {size.grid // 2} = {size.tokens}",
        width=size.width,
        frames=size.frames,
        video_tokens=size.frames * size.tokens,
        name=settings["size"],
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        vocabulary=len(tokenizer),
        seed=settings["seed"],
        workers=settings["workers"],
        minutes=sum(state["seconds"] for state in states.values()) / 60,
        hardware=f"{settings['workers']} cores of {_processor()}",
        torch=torch.__version__,
        transformers=transformers.__version__,
        stages="\n".join(
            f"| {stage} | {config.steps} | {config.videos} | {states[stage]['seconds'] / 60:.0f} |"
            for stage, config in STAGES.items()
        ),
        videos=videos,
        table=table(rows),
        wordings=wording_table(rows),
        verdict=_verdict(rows),
    )
    (target / "README.md").write_text(card)


def _verdict(rows: list[dict]) -> str:
    """Names the four-option kinds whose interval reaches down to chance."""
    weak = [row["kind"] for row in rows if row["control"] == "video" and row["low"] <= 0.30 and "/" not in row["kind"]]
    if weak:
        return f"Not learnt (no clear difference from chance): {', '.join(weak)}."
    return "Every kind of four-option question is answered clearly above chance."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=400, help="videos of the evaluation split to measure on")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.to, args.videos)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
