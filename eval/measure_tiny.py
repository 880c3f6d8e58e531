"""Accuracy of a tiny checkpoint on unseen videos by kind of question, with controls that must fall to chance.

    python -m eval.measure_tiny --videos 400

Each video is drawn, sampled and preprocessed as the evaluation does, but is not encoded as a file. All questions about
a video are answered in one forward pass (`eval.tiny_data`); an answer is right if the most probable next token of the
whole vocabulary is. Controls: the same questions with the next video's frames (`swapped`), and with a uniformly gray
video (`blank`). The four-option questions are worded as Video-MME's are, then once as every other benchmark's.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.questions import ask
from eval.report import clustered_wilson
from eval.tiny_data import Asking, PackedBatch, Packer, answer_logits
from eval.tiny_wordings import FREE_WORDINGS, WORDINGS
from eval.videos import Video, make_videos
from eval.world import Split
from llava.assets import tiny_model_path
from llava.model.builder import load_pretrained_model
from llava.model.pooling import pool_2x2

CONTROLS = ("video", "swapped", "blank")
WORDED = WORDINGS["videomme"]
BATCH = 8


class Measurement:
    """The answers given, per (control, kind); kinds without options end in "/free".

    Beside the controls there are the names of `WORDINGS`: the right video, worded so, all kinds together ("all").
    """

    def __init__(self) -> None:
        self.answers: defaultdict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)

    def add(self, control: str, kind: str, video: str, right: bool) -> None:
        self.answers[control, kind].append((video, right))

    def rows(self) -> list[dict[str, object]]:
        """One row per control and kind, with totals: accuracy and its 95 % interval (Wilson, clustered by video)."""
        kinds = sorted({kind for _, kind in self.answers})
        groups = [(kind, [kind]) for kind in kinds]
        for name, free in (("all", False), ("all/free", True)):
            groups.append((name, [kind for kind in kinds if kind.endswith("/free") == free]))
        rows = []
        for control in CONTROLS:
            for name, members in groups:
                answers = [answer for kind in members for answer in self.answers[control, kind]]
                if answers:
                    rows.append(_row(control, name, answers))
        rows += [_row(name, "all", self.answers[name, "all"]) for name in WORDINGS if (name, "all") in self.answers]
        return rows


def _row(control: str, kind: str, answers: list[tuple[str, bool]]) -> dict[str, object]:
    videos, scores = zip(*answers, strict=True)
    low, high = clustered_wilson(scores, videos)
    accuracy = round(sum(scores) / len(scores), 4)
    return {"control": control, "kind": kind, "asked": len(answers), "accuracy": accuracy} | {
        "low": round(low, 4),
        "high": round(high, 4),
    }


def measure(checkpoint: Path, split: Split, seed: int, count: int) -> Measurement:
    """Ask about `count` videos of `split`: the four-option questions of the benchmark, and every free question."""
    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, "llava_qwen", device_map="cpu", torch_dtype="float32", attn_implementation="sdpa"
    )
    packer = Packer(tokenizer, model.config.mm_num_frames * _tokens_per_frame(model) + 1)
    result = Measurement()
    videos = tqdm(make_videos(split, count, seed), total=count, desc="Videos", unit="video")
    for batch in _batches(videos, BATCH):
        pixels = [_pixels(video, model.config.mm_num_frames, processor) for video in batch]
        controls = {
            "video": pixels,
            "swapped": [*pixels[1:], pixels[0]],
            "blank": [torch.zeros_like(frames) for frames in pixels],
        }
        questions = [_asked_about(video) for video in batch]
        encoded = {control: list(_encode(model, torch.stack(frames))) for control, frames in controls.items()}
        packed = packer.pack(questions)
        for control, tokens in encoded.items():
            for number, kind, right in _answered(model, packed, tokens, questions):
                result.add(control, kind, str(batch[number].index), right)
        for name, wording in WORDINGS.items():
            worded = [[(question, wording) for question in video.questions] for video in batch]
            for number, _, right in _answered(model, packer.pack(worded), encoded["video"], worded):
                result.add(name, "all", str(batch[number].index), right)
    return result


def _answered(
    model: Any, packed: PackedBatch, videos: Sequence[torch.Tensor], questions: Sequence[Sequence[Asking]]
) -> Iterator[tuple[int, str, bool]]:
    """For every question the number of its video, its kind, and whether it is answered rightly."""
    said = answer_logits(model, packed, videos).argmax(-1)
    right = (said == packed.targets[packed.weights == 1.0]).tolist()
    numbers = [number for number, row in enumerate(questions) for _ in row]
    yield from zip(numbers, packed.kinds, right, strict=True)


def _asked_about(video: Video) -> list[Asking]:
    rng = random.Random(video.index)
    free = [question for question in ask(video.scenes, 0, rng) if question.free_text_answer is not None]
    return [
        *((question, WORDED) for question in video.questions),
        *((question, rng.choice(FREE_WORDINGS)) for question in free),
    ]


def _tokens_per_frame(model) -> int:
    side = model.get_vision_tower().num_patches_per_side
    return ((side + 1) // 2) ** 2


def _pixels(video: Video, frames: int, processor) -> torch.Tensor:
    index = np.linspace(0, len(video.frames) - 1, frames, dtype=int)
    return processor.preprocess(video.frames[index], return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def _encode(model, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Visual tokens (V, D) of each video of pixels (B, F, 3, S, S), as `encode_images` makes them."""
    for video in pixels:
        patches = model.get_model().mm_projector(model.get_vision_tower()(video))
        yield pool_2x2(patches, model.config.mm_spatial_pool_mode).flatten(0, 1)


def _batches(videos: Iterator[Video], size: int) -> Iterator[list[Video]]:
    batch: list[Video] = []
    for video in videos:
        batch.append(video)
        if len(batch) == size:
            yield batch
            batch = []
    if len(batch) > 1:
        yield batch


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a line per kind, a column per control."""
    by = {(row["control"], row["kind"]): row for row in rows}
    lines = ["| question | asked | accuracy (95 % interval) | swapped | blank |", "| --- | --: | --: | --: | --: |"]
    kinds = sorted(
        {str(row["kind"]) for row in rows}, key=lambda kind: (kind.endswith("/free"), kind.startswith("all"), kind)
    )
    for kind in kinds:
        real, swapped, blank = (by[control, kind] for control in CONTROLS)
        name = {"all": "**all, four options**", "all/free": "**all, free text**"}.get(
            kind, kind.replace("/free", ", free")
        )
        lines.append(f"| {name} | {_shown(real)} | {swapped['accuracy']:.1%} | {blank['accuracy']:.1%} |")
    return "\n".join(lines)


def wording_table(rows: list[dict[str, object]]) -> str:
    """Markdown: a line per wording of the four-option questions."""
    lines = ["| worded as in | asked | accuracy (95 % interval) |", "| --- | --: | --: |"]
    lines += [f"| {row['control']} | {_shown(row)} |" for row in rows if row["control"] in WORDINGS]
    return "\n".join(lines)


def _shown(row: dict[str, object]) -> str:
    return f"{row['asked']} | {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=tiny_model_path())
    parser.add_argument("--split", choices=["DEV", "EVAL"], default="EVAL")
    parser.add_argument("--seed", type=int, default=1, help="seed 0 is the stand-in benchmark's")
    parser.add_argument("--videos", type=int, default=400)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    rows = measure(args.checkpoint, Split[args.split], args.seed, args.videos).rows()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows), wording_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
