"""Train a tiny Video-LLM: one seeded, resumable run on CPU cores or a GPU.

    python -m eval.train_tiny --out runs/tiny-wide --size tiny-wide --seed 1 --workers 2

Six stages, each through the shipped model tree:

    tower   the SigLIP tower learns what each patch shows from dense labels, then stays frozen
    memory  the first layers of the language model learn what each visual token must remember of the frames before it,
            and what is to be known of each object that is named, again from dense labels. Labels are embedded in
            place of visual tokens: no pixels yet
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
import multiprocessing
import os
import threading
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from eval.tiny_lessons import Lessons
from eval.tiny_model import SIZES
from eval.tiny_stages import STAGES, make_optimizers, schedule

logger = logging.getLogger("train_tiny")

SNAPSHOT_SECONDS = 60.0


class Trainer:
    """The loop over stages and steps, with snapshots; every worker process holds one."""

    def __init__(self, args: argparse.Namespace, rank: int):
        self.args, self.rank, self.out = args, rank, Path(args.out)
        self.lessons = Lessons(SIZES[args.size], args.seed, args.workers, rank, args.device)

    def run(self) -> None:
        """All stages up to the last one wanted, each from its last snapshot."""
        for stage in STAGES:
            self.fit(stage)
            if stage == self.args.until:
                break

    def fit(self, stage: str) -> None:
        """One stage, from its last snapshot."""
        config = STAGES[stage]
        named = self.lessons.trainable(stage)
        for parameter in self.lessons.everything.parameters():
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
            loss, metrics = self.lessons.loss(stage, step)
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
                "weights": {name: p.detach() for name, p in self.lessons.trainable(stage)},
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
        state = torch.load(self.snapshot(stage), map_location=self.lessons.device, weights_only=True)
        if state["run"] != run_identity(self.args, stage):
            raise SystemExit(
                f"error: {self.snapshot(stage)} belongs to a run with other settings; "
                "choose another --out or remove it."
            )
        for name, parameter in self.lessons.trainable(stage):
            parameter.data.copy_(state["weights"][name])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]


def run_identity(args: argparse.Namespace, stage: str) -> str:
    """What must agree for a snapshot to be continued."""
    return json.dumps(
        {"size": args.size, "seed": args.seed, "workers": args.workers, stage: asdict(STAGES[stage])}, sort_keys=True
    )


def _worker(rank: int, args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.workers > 1:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    Trainer(args, rank).run()
    if args.workers > 1:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, however that was ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder of snapshots and logs (default: %(default)s)")
    parser.add_argument(
        "--size", choices=list(SIZES), default="tiny", help="which of the models (default: %(default)s)"
    )
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
