"""Accuracy of a tiny checkpoint on unseen videos by kind of question, with controls that must fall to chance.

    python -m eval.measure_tiny --videos 400

Each video is drawn, sampled and preprocessed as the evaluation does, but is not encoded as a file. All questions about
a video are answered in one forward pass (`eval.tiny_data`); an answer is right if the most probable next token of the
whole vocabulary is. Controls: the same questions with the next video's frames (`swapped`), and with a uniformly gray
video (`blank`).
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.questions import Question, ask
from eval.report import clustered_wilson
from eval.tiny_data import Packer, answer_tokens
from eval.videos import Video, make_videos
from eval.world import Split
from llava.assets import tiny_model_path
from llava.model.builder import load_pretrained_model
from llava.model.pooling import pool_2x2

CONTROLS = ("video", "swapped", "blank")
BATCH = 8


class Measurement:
    """The answers given, per (control, kind); kinds without options end in "/free"."""

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
                    videos, scores = zip(*answers, strict=True)
                    low, high = clustered_wilson(scores, videos)
                    rows.append(
                        {"control": control, "kind": name, "asked": len(answers)}
                        | {"accuracy": round(sum(scores) / len(scores), 4)}
                        | {"low": round(low, 4), "high": round(high, 4)}
                    )
        return rows


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
        packed = packer.pack(questions, random.Random(seed))
        for control, frames in controls.items():
            tokens = answer_tokens(model, packed, list(_encode(model, torch.stack(frames))))
            right = (tokens == packed.targets[packed.weights == 1.0]).tolist()
            asked = [str(video.index) for video, row in zip(batch, questions, strict=True) for _ in row]
            for kind, video, correct in zip(packed.kinds, asked, right, strict=True):
                result.add(control, kind, video, correct)
    return result


def _asked_about(video: Video) -> list[tuple[Question, bool]]:
    free = [q for q in ask(video.scenes, 0, random.Random(video.index)) if q.free_text_answer is not None]
    return [*((question, True) for question in video.questions), *((question, False) for question in free)]


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
        lines.append(
            f"| {name} | {real['asked']} | {real['accuracy']:.1%} ({real['low']:.1%} to {real['high']:.1%}) "
            f"| {swapped['accuracy']:.1%} | {blank['accuracy']:.1%} |"
        )
    return "\n".join(lines)


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
    print(table(rows))


if __name__ == "__main__":
    main()
