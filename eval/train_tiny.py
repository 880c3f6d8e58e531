"""Train the bundled tiny Video-LLM: one seeded, resumable run on CPU cores or a GPU.

    bash scripts/train_tiny.sh                     # what the bundled checkpoint was made with
    python -m eval.train_tiny --out runs/tiny --workers 2 --seed 0

Six stages, each through the shipped model tree:

    tower   the SigLIP tower learns what each patch shows from dense labels, then stays frozen
    memory  the first layers of the language model learn what each visual token must remember of the frames before it,
            again from dense labels. Labels are embedded in place of visual tokens: no pixels yet
    words   the language model learns to answer free questions about those videos
    lm      option letters as well. Wrong options are first drawn at random, then from what the video shows
    align   the projector learns by regression to produce those embeddings from the tower's features
    joint   projector and language model together on rendered videos

Batches are drawn fresh from seeds of the training split, so no video is seen twice. A run interrupted at any moment
continues from its last snapshot and gives the result that it would have given. `--workers` processes share every
batch; the result depends on their number only through the order of additions and the draw of scenes.
"""

import argparse
import json
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eval.questions import Question, ask
from eval.tiny_data import HEAD, PackedBatch, Packer
from eval.tiny_memory import MEMORY_LAYERS, MemoryHeads, memory_targets
from eval.tiny_model import FRAMES, GRID, IMAGE_SIZE, MASK_SAMPLES, DenseHeads, Oracle, build_model
from eval.tiny_stages import (
    EASY_STEPS,
    HARD,
    MEMORY_WEIGHT,
    QUESTIONS_PER_VIDEO,
    STAGES,
    WEIGHTS,
    WITH_OPTIONS,
    make_optimizers,
    schedule,
)
from eval.tiny_tokenizer import build_tokenizer
from eval.world import (
    LABEL_GROUPS,
    Scenes,
    Split,
    draw_scenes,
    frame_times,
    patch_labels,
    patch_masks,
    render,
    seed_for,
)
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.pooling import pool_2x2

logger = logging.getLogger("train_tiny")


SNAPSHOT_SECONDS = 60.0
TOKENS = (GRID // 2) ** 2
"""Per frame, after pooling."""


class Trainer:
    """Model, data and snapshots of one run; every worker process holds one."""

    def __init__(self, args: argparse.Namespace, rank: int):
        self.args, self.rank, self.device = args, rank, torch.device(args.device)
        self.out = Path(args.out)
        self.tokenizer = build_tokenizer()
        model = build_model(self.tokenizer, args.seed)
        model.config._attn_implementation = "blocked_causal"
        tower = model.get_vision_tower()
        assert tower is not None
        self.model: LlavaQwenForCausalLM = model
        self.tower = tower
        self.heads = DenseHeads(tower.hidden_size)
        self.oracle = Oracle(model.config.hidden_size)
        self.memory = MemoryHeads(model.config.hidden_size)
        modules = {"model": model, "heads": self.heads, "oracle": self.oracle, "memory": self.memory}
        self.everything = nn.ModuleDict(modules).to(self.device)
        self.packer = Packer(self.tokenizer, FRAMES * TOKENS + 1)
        self.head = torch.tensor(self.tokenizer(HEAD, add_special_tokens=False).input_ids, device=self.device)

    # ---- data -------------------------------------------------------------------------------------------------

    def scenes(self, stage: str, step: int, min_objects: int = 1) -> tuple[Scenes, Tensor, int]:
        """This worker's share of the scenes of a step, the times of their frames, and their seed."""
        index = list(STAGES).index(stage) << 28 | step << 4 | self.rank
        seed = seed_for(Split.TRAIN, self.args.seed, index)
        scenes = draw_scenes(STAGES[stage].videos // self.args.workers, seed, min_objects)
        return scenes, frame_times(scenes, FRAMES), seed

    def pixels(self, scenes: Scenes, times: Tensor, seed: int) -> Tensor:
        """Rendered frames (B * F, 3, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1], some blurred as video codecs do."""
        chunks = [render(scenes[i : i + 4], times[i : i + 4], IMAGE_SIZE, seed + i) for i in range(0, len(scenes), 4)]
        frames = torch.cat(chunks)  # (B, F, 3, S, S)
        g = torch.Generator().manual_seed(seed)
        luma = frames.mean(2, keepdim=True)
        chroma = (frames - luma).flatten(0, 1)
        coarse = nn.functional.interpolate(nn.functional.avg_pool2d(chroma, 2), scale_factor=2).view_as(frames)
        strength = (torch.rand(len(frames), 1, 1, 1, 1, generator=g) - 0.3).clamp(min=0)
        frames = luma + (chroma.view_as(frames) * (1 - strength) + coarse * strength)
        soft = nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(frames)
        strength = (torch.rand(len(frames), 1, 1, 1, 1, generator=g) - 0.4).clamp(min=0)
        frames = frames * (1 - strength) + soft * strength
        return (frames * 2 - 1).flatten(0, 1).to(self.device)

    def labels(self, scenes: Scenes, times: Tensor) -> Tensor:
        """What the patches show: (B * F, GRID * GRID, LABEL_WIDTH)."""
        return patch_labels(scenes, times, GRID).flatten(0, 1).to(self.device)

    def questions(
        self, scenes: Scenes, rng: random.Random, hard: float, with_options: float
    ) -> list[list[tuple[Question, bool]]]:
        """Per video a weighted choice of questions, each with options (True) or without."""
        rows = []
        for row in range(len(scenes)):
            priority = []
            for question in ask(scenes, row, rng, hard):
                weight = WEIGHTS.get(question.kind, 1.0)
                options = bool(question.options) and rng.random() < with_options
                if question.free_text_answer is None:
                    options, weight = True, weight if with_options else 0.0
                if weight:
                    priority.append((rng.random() ** (1 / weight), (question, options)))
            priority.sort(key=lambda pair: pair[0], reverse=True)
            rows.append([pair for _, pair in priority[:QUESTIONS_PER_VIDEO]])
        return rows

    # ---- forward passes ---------------------------------------------------------------------------------------

    def project(self, pixels: Tensor) -> Tensor:
        """Frames (B * F, 3, S, S) -> projected patches (B * F, GRID * GRID, D); the tower is frozen."""
        with torch.no_grad():
            features = self.tower(pixels)
        return self.model.get_model().mm_projector(features)

    def video_tokens(self, patches: Tensor) -> Tensor:
        """Patches (B * F, GRID * GRID, D) -> pooled tokens (B, F * TOKENS, D)."""
        pooled = pool_2x2(patches, self.model.config.mm_spatial_pool_mode)  # (B * F, TOKENS, D)
        return pooled.view(-1, FRAMES * TOKENS, pooled.shape[-1])

    def answer_loss(self, patches: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss of all targets, logits (M, vocabulary), and hidden states (B, L, D) after `MEMORY_LAYERS`.

        patches: (B * F, GRID * GRID, D).
        """
        core = self.model.get_model()
        newline = core.image_newline.expand(len(batch.input_ids), 1, -1)
        text = self.model.get_input_embeddings()(batch.input_ids.to(self.device))
        before, after = text[:, : batch.video.start], text[:, batch.video.stop :]
        output = core(
            inputs_embeds=torch.cat([before, self.video_tokens(patches), newline, after], 1),
            attention_mask=batch.mask.to(self.device),
            position_ids=batch.position_ids.to(self.device),
            use_cache=False,
            output_hidden_states=True,
        )
        logits = self.model.lm_head(output.last_hidden_state[batch.target_rows, batch.target_columns])
        losses = nn.functional.cross_entropy(logits, batch.targets.to(self.device), reduction="none")
        weights = batch.weights.to(self.device)
        return (losses * weights).sum() / weights.sum(), logits, output.hidden_states[MEMORY_LAYERS]

    def recall(self, hidden: Tensor, scenes: Scenes, times: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies of what the visual tokens remember, from hidden states (B, L, D) of the prompt."""
        start = len(self.head)
        tokens = hidden[:, start : start + FRAMES * TOKENS].unflatten(1, (FRAMES, TOKENS))
        return self.memory(tokens, memory_targets(scenes, times, GRID // 2))

    # ---- stages -----------------------------------------------------------------------------------------------

    def tower_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, times, seed = self.scenes("tower", step, min_objects=2)
        # One frame of each video: frames of one video are too alike to learn from together.
        chosen = torch.randint(FRAMES, (len(scenes), 1), generator=torch.Generator().manual_seed(seed))
        times = times.gather(1, chosen)
        labels = self.labels(scenes, times)
        masks = patch_masks(scenes, times, GRID, MASK_SAMPLES).flatten(0, 1).to(self.device)
        features = self.tower(self.pixels(scenes, times, seed))
        return self.heads(features, labels, masks)

    def memory_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, times, _ = self.scenes("memory", step)
        core = self.model.get_model()
        head = self.model.get_input_embeddings()(self.head).expand(len(scenes), -1, -1)
        hidden = torch.cat([head, self.video_tokens(self.oracle(self.labels(scenes, times)))], 1)
        length = hidden.shape[1]
        positions = torch.arange(length, device=self.device).expand(len(scenes), -1)
        causal = torch.ones(len(scenes), 1, length, length, dtype=torch.bool, device=self.device).tril()
        rotary = core.rotary_emb(hidden, positions)
        for layer in core.layers[:MEMORY_LAYERS]:
            hidden = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
        return self.recall(hidden, scenes, times)

    def words_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self._oracle_qa("words", step, hard=0.0, with_options=0.0)

    def lm_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self._oracle_qa("lm", step, HARD * min(1.0, step / EASY_STEPS), WITH_OPTIONS)

    def align_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, times, seed = self.scenes("align", step)
        labels = self.labels(scenes, times)
        with torch.no_grad():
            target = self.oracle(labels)
        busy = (labels[..., : LABEL_GROUPS["color"]].sum(-1, keepdim=True) > 0.01).float()
        error = (self.project(self.pixels(scenes, times, seed)) - target).square() * (1 + 8 * busy)
        loss = error.mean() / target.var()
        return loss, {"error": loss.item()}

    def joint_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, times, seed = self.scenes("joint", step)
        return self._qa(scenes, times, seed, self.project(self.pixels(scenes, times, seed)), HARD, WITH_OPTIONS)

    def _oracle_qa(self, stage: str, step: int, hard: float, with_options: float) -> tuple[Tensor, dict[str, float]]:
        scenes, times, seed = self.scenes(stage, step)
        return self._qa(scenes, times, seed, self.oracle(self.labels(scenes, times)), hard, with_options)

    def _qa(
        self, scenes: Scenes, times: Tensor, seed: int, patches: Tensor, hard: float, with_options: float
    ) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(seed)
        batch = self.packer.pack(self.questions(scenes, rng, hard, with_options), rng)
        loss, logits, hidden = self.answer_loss(patches, batch)
        recall, remembered = self.recall(hidden, scenes, times)
        return loss + MEMORY_WEIGHT * recall, {**accuracy_by_kind(logits, batch), **remembered}

    def trainable(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that a stage trains."""
        core = self.model.get_model()
        language = [core.embed_tokens, core.layers, core.norm, self.memory]
        modules: dict[str, list[nn.Module]] = {
            "tower": [self.tower, self.heads],
            "memory": [core.embed_tokens, *core.layers[:MEMORY_LAYERS], self.memory, self.oracle],
            "words": [*language, self.oracle],
            "lm": [*language, self.oracle],
            "align": [core.mm_projector],
            "joint": [*language, core.mm_projector],
        }
        chosen = {id(p) for module in modules[stage] for p in module.parameters()}
        if stage in ("words", "lm", "joint"):
            chosen.add(id(core.image_newline))
        return [(name, p) for name, p in self.everything.named_parameters() if id(p) in chosen]

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All stages up to the last one wanted, each from its last snapshot."""
        losses: dict[str, Callable[[int], tuple[Tensor, dict[str, float]]]] = {
            "tower": self.tower_loss,
            "memory": self.memory_loss,
            "words": self.words_loss,
            "lm": self.lm_loss,
            "align": self.align_loss,
            "joint": self.joint_loss,
        }
        for stage, loss in losses.items():
            self.fit(stage, loss)
            if stage == self.args.until:
                break

    def fit(self, stage: str, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]]) -> None:
        config = STAGES[stage]
        named = self.trainable(stage)
        for parameter in self.everything.parameters():
            parameter.requires_grad_(False)
        parameters = [parameter for _, parameter in named]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizers = make_optimizers(named, config)
        step, seconds = self.load(stage, optimizers)
        begun = saved = time.monotonic()
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        while step < config.steps:
            for optimizer, rate in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule(step, config)
            loss, metrics = loss_of(step)
            loss.backward()
            self.average_gradients(parameters)
            for optimizer, _ in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            for name, value in [("loss", loss.item()), *metrics.items()]:
                if value == value:  # a kind that no question of this batch had is NaN
                    sums[name][0] += value
                    sums[name][1] += 1
            if step % 50 == 0 or step == config.steps:
                self.log(stage, step, seconds + time.monotonic() - begun, sums)
                sums.clear()
            if step == config.steps or time.monotonic() - saved > SNAPSHOT_SECONDS:
                saved = time.monotonic()
                self.save(stage, optimizers, step, seconds + saved - begun)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """The mean gradient over the workers, as if one had seen the whole batch."""
        if self.args.workers == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.args.workers
        start = 0
        for p in parameters:
            if p.grad is not None:
                p.grad.copy_(flat[start : start + p.numel()].view_as(p))
                start += p.numel()

    def log(self, stage: str, step: int, seconds: float, sums: dict[str, list[float]]) -> None:
        if self.rank:
            return
        means = {name: round(total / count, 4) for name, (total, count) in sorted(sums.items())}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "seconds": round(seconds, 1), **means}) + "\n")
        summary = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        logger.info("%s %d/%d %.0f s: %s", stage, step, STAGES[stage].steps, seconds, summary)

    def snapshot(self, stage: str) -> Path:
        return self.out / f"{stage}.pt"

    def save(
        self, stage: str, optimizers: list[tuple[torch.optim.Optimizer, float]], step: int, seconds: float
    ) -> None:
        if self.rank:
            return
        partial = self.snapshot(stage).with_suffix(".partial")
        torch.save(
            {
                "weights": {name: p.detach() for name, p in self.trainable(stage)},
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "step": step,
                "seconds": seconds,
                "run": run_identity(self.args, stage),
            },
            partial,
        )
        os.replace(partial, self.snapshot(stage))

    def load(self, stage: str, optimizers: list[tuple[torch.optim.Optimizer, float]]) -> tuple[int, float]:
        """Restore a stage's snapshot if there is one; returns its step and the seconds it took so far."""
        if not self.snapshot(stage).exists():
            return 0, 0.0
        state = torch.load(self.snapshot(stage), map_location=self.device, weights_only=True)
        if state["run"] != run_identity(self.args, stage):
            raise SystemExit(
                f"error: {self.snapshot(stage)} belongs to a run with other settings; "
                "choose another --out or remove it."
            )
        for name, parameter in self.trainable(stage):
            parameter.data.copy_(state["weights"][name])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]


def run_identity(args: argparse.Namespace, stage: str) -> str:
    """What must agree for a snapshot to be continued."""
    return json.dumps({"seed": args.seed, "workers": args.workers, stage: asdict(STAGES[stage])}, sort_keys=True)


def accuracy_by_kind(logits: Tensor, batch: PackedBatch) -> dict[str, float]:
    """Share of right answers per kind of question and over all four-option questions."""
    right = (logits.argmax(-1).cpu() == batch.targets)[batch.weights == 1.0].tolist()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, value in zip(batch.kinds, right, strict=True):
        by_kind[kind].append(value)
        by_kind["FREE" if kind.endswith("/free") else "MC"].append(value)
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}


def _worker(rank: int, args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    Trainer(args, rank).run()
    if args.workers > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder of snapshots and logs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that share a batch on the CPU")
    parser.add_argument("--device", default="cpu", help='"cpu", or "cuda" with one worker')
    parser.add_argument("--until", choices=list(STAGES), help="stop after this stage")
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    try:
        if args.workers == 1:
            _worker(0, args)
        else:
            args.rendezvous = str((Path(args.out) / f"rendezvous-{os.getpid()}").resolve())
            torch.multiprocessing.spawn(_worker, (args,), nprocs=args.workers)
    except KeyboardInterrupt:
        raise SystemExit(
            f"\nInterrupted. Run the same command again to go on from the snapshots in {args.out}."
        ) from None


if __name__ == "__main__":
    main()
