"""What the tiny model is taught in each stage: the batch of a step, and its loss through the shipped model tree."""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eval.questions import ask
from eval.tiny_data import HEAD, Asking, PackedBatch, Packer
from eval.tiny_memory import MEMORY_LAYERS, NAME_LAYERS, NAMES, MemoryHeads, memory_targets, name_targets
from eval.tiny_model import MASK_SAMPLES, DenseHeads, Oracle, TinySize, build_model
from eval.tiny_stages import EASY_STEPS, HARD, MEMORY_WEIGHT, QUESTIONS_PER_VIDEO, STAGES, WEIGHTS, WITH_OPTIONS
from eval.tiny_tokenizer import build_tokenizer
from eval.tiny_wordings import FREE_WORDINGS, WORDINGS, Wording
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

Loss = tuple[Tensor, dict[str, float]]
"""The loss of a step, and accuracies by name; those of what visual tokens remember begin with "~"."""


class Lessons:
    """The model, everything that is trained beside it, and the losses of all stages.

    Args:
        size: of the model.
        seed: of the initial weights and of the training videos.
        workers, rank: every step's videos are shared out among the workers; this one is number `rank`.
        device: where the model lives; data is drawn on the CPU.
    """

    def __init__(self, size: TinySize, seed: int, workers: int, rank: int, device: str):
        self.size = size
        self.seed, self.workers, self.rank, self.device = seed, workers, rank, torch.device(device)
        self.tokenizer = build_tokenizer()
        model = build_model(self.tokenizer, seed, size)
        model.config._attn_implementation = "blocked_causal"
        tower = model.get_vision_tower()
        assert tower is not None
        self.model: LlavaQwenForCausalLM = model
        self.tower = tower
        self.heads = DenseHeads(tower.hidden_size, size.grid)
        self.oracle = Oracle(size.width, size.grid)
        self.memory = MemoryHeads(size.width, size.frames)
        modules = {"model": model, "heads": self.heads, "oracle": self.oracle, "memory": self.memory}
        self.everything = nn.ModuleDict(modules).to(self.device)
        self.packer = Packer(self.tokenizer, size.frames * size.tokens + 1)
        self.head = torch.tensor(self.tokenizer(HEAD, add_special_tokens=False).input_ids, device=self.device)
        self.names = torch.tensor([self._word(f" {name}") for name in NAMES], device=self.device)

    def loss(self, stage: str, step: int) -> Loss:
        """The loss of one step, and what to log beside it."""
        losses = {
            "tower": self._tower,
            "memory": self._memory,
            "words": self._words,
            "lm": self._lm,
            "align": self._align,
            "joint": self._joint,
        }
        return losses[stage](step)

    def _word(self, text: str) -> int:
        [token] = self.tokenizer(text, add_special_tokens=False).input_ids
        return token

    def trainable(self, stage: str) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that a stage trains."""
        core = self.model.get_model()
        language = [core.embed_tokens, core.layers, core.norm, self.memory]
        modules: dict[str, list[nn.Module]] = {
            "tower": [self.tower, self.heads],
            "memory": [core.embed_tokens, *core.layers[:NAME_LAYERS], self.memory, self.oracle],
            "words": [*language, self.oracle],
            "lm": [*language, self.oracle],
            "align": [core.mm_projector],
            "joint": [*language, core.mm_projector],
        }
        chosen = {id(p) for module in modules[stage] for p in module.parameters()}
        if stage in ("words", "lm", "joint"):
            chosen.add(id(core.image_newline))
        return [(name, p) for name, p in self.everything.named_parameters() if id(p) in chosen]

    # ---- data -------------------------------------------------------------------------------------------------

    def scenes(self, stage: str, step: int, min_objects: int = 1) -> tuple[Scenes, Tensor, int]:
        """This worker's share of the scenes of a step, the times of their frames, and their seed."""
        index = list(STAGES).index(stage) << 28 | step << 4 | self.rank
        seed = seed_for(Split.TRAIN, self.seed, index)
        scenes = draw_scenes(STAGES[stage].videos // self.workers, seed, min_objects)
        return scenes, frame_times(scenes, self.size.frames), seed

    def pixels(self, scenes: Scenes, times: Tensor, seed: int) -> Tensor:
        """Rendered frames (B * F, 3, S, S) in [-1, 1], some blurred as video codecs do."""
        chunks = [
            render(scenes[i : i + 4], times[i : i + 4], self.size.image_size, seed + i)
            for i in range(0, len(scenes), 4)
        ]
        frames = torch.cat(chunks)  # (B, F, 3, S, S)
        rng = np.random.default_rng(seed)

        def strength(rate: float) -> Tensor:
            """Per video, in [0, 1), at this rate above 0."""
            drawn = torch.from_numpy(rng.random((len(frames), 1, 1, 1, 1), dtype=np.float32))
            return (drawn - (1 - rate)).clamp(min=0)

        luma = frames.mean(2, keepdim=True)
        chroma = (frames - luma).flatten(0, 1)
        coarse = nn.functional.interpolate(nn.functional.avg_pool2d(chroma, 2), scale_factor=2).view_as(frames)
        frames = luma + torch.lerp(chroma.view_as(frames), coarse, strength(0.7))
        soft = nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(frames)
        frames = torch.lerp(frames, soft, strength(0.6))
        return (frames * 2 - 1).flatten(0, 1).to(self.device)

    def labels(self, scenes: Scenes, times: Tensor) -> Tensor:
        """What the patches show: (B * F, grid * grid, LABEL_WIDTH)."""
        return patch_labels(scenes, times, self.size.grid).flatten(0, 1).to(self.device)

    def questions(self, scenes: Scenes, rng: random.Random, hard: float, with_options: float) -> list[list[Asking]]:
        """Per video a weighted choice of questions, each in the wording of some benchmark."""
        rows = []
        for row in range(len(scenes)):
            priority: list[tuple[float, Asking]] = []
            for question in ask(scenes, row, rng, hard):
                weight = WEIGHTS.get(question.kind, 1.0)
                options = bool(question.options) and rng.random() < with_options
                if question.free_text_answer is None:
                    options, weight = True, weight if with_options else 0.0
                if weight:
                    wordings: Sequence[Wording | str] = [*WORDINGS.values()] if options else FREE_WORDINGS
                    priority.append((rng.random() ** (1 / weight), (question, rng.choice(wordings))))
            priority.sort(key=lambda pair: pair[0], reverse=True)
            rows.append([pair for _, pair in priority[:QUESTIONS_PER_VIDEO]])
        return rows

    # ---- forward passes ---------------------------------------------------------------------------------------

    def project(self, pixels: Tensor) -> Tensor:
        """Frames (B * F, 3, S, S) -> projected patches (B * F, grid * grid, D); the tower is frozen."""
        with torch.no_grad():
            features = self.tower(pixels)
        return self.model.get_model().mm_projector(features)

    def video_tokens(self, patches: Tensor) -> Tensor:
        """Patches (B * F, grid * grid, D) -> pooled tokens (B, F * tokens, D)."""
        pooled = pool_2x2(patches, self.model.config.mm_spatial_pool_mode)  # (B * F, tokens, D)
        return pooled.view(-1, self.size.frames * self.size.tokens, pooled.shape[-1])

    def answer_loss(self, patches: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss of all targets, logits (M, vocabulary), and hidden states (B, L, D) after `MEMORY_LAYERS`.

        patches: (B * F, grid * grid, D).
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

    def recall(self, hidden: Tensor, scenes: Scenes, times: Tensor) -> Loss:
        """Loss and accuracies of what the visual tokens remember, from hidden states (B, L, D) of the prompt."""
        start, frames, per_frame = len(self.head), self.size.frames, self.size.tokens
        tokens = hidden[:, start : start + frames * per_frame].unflatten(1, (frames, per_frame))
        return self.memory(tokens, memory_targets(scenes, times, self.size.grid // 2))

    # ---- stages -----------------------------------------------------------------------------------------------

    def _tower(self, step: int) -> Loss:
        scenes, times, seed = self.scenes("tower", step, min_objects=2)
        # One frame of each video: frames of one video are too alike to learn from together.
        chosen = torch.from_numpy(np.random.default_rng(seed).integers(self.size.frames, size=(len(scenes), 1)))
        times = times.gather(1, chosen)
        labels = self.labels(scenes, times)
        masks = patch_masks(scenes, times, self.size.grid, MASK_SAMPLES).flatten(0, 1).to(self.device)
        features = self.tower(self.pixels(scenes, times, seed))
        return self.heads(features, labels, masks)

    def _memory(self, step: int) -> Loss:
        scenes, times, seed = self.scenes("memory", step)
        core = self.model.get_model()
        embed = self.model.get_input_embeddings()
        video = self.video_tokens(self.oracle(self.labels(scenes, times)))
        head, names = (embed(ids).expand(len(scenes), -1, -1) for ids in (self.head, self.names))
        hidden = torch.cat([head, video, names], 1)
        length, trunk = hidden.shape[1], hidden.shape[1] - len(NAMES)
        # A name stands some words after the video, where questions have theirs, and sees no other name.
        words = torch.from_numpy(np.random.default_rng(seed).integers(12, size=(len(scenes), len(NAMES))))
        positions = torch.cat([torch.arange(trunk).expand(len(scenes), -1), trunk + words], 1).to(self.device)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        allowed[trunk:, trunk:] = torch.eye(len(NAMES), dtype=torch.bool)
        mask = allowed.expand(len(scenes), 1, -1, -1).to(self.device)
        rotary = core.rotary_emb(hidden, positions)
        states = [hidden]
        for layer in core.layers[:NAME_LAYERS]:
            states.append(layer(states[-1], attention_mask=mask, position_ids=positions, position_embeddings=rotary))
        recall, remembered = self.recall(states[MEMORY_LAYERS], scenes, times)
        naming, known = self.memory.about_names(states[NAME_LAYERS][:, trunk:], name_targets(scenes, times))
        return recall + naming, {**remembered, **known}

    def _words(self, step: int) -> Loss:
        return self._oracle_qa("words", step, hard=0.0, with_options=0.0)

    def _lm(self, step: int) -> Loss:
        return self._oracle_qa("lm", step, HARD * min(1.0, step / EASY_STEPS), WITH_OPTIONS)

    def _align(self, step: int) -> Loss:
        scenes, times, seed = self.scenes("align", step)
        labels = self.labels(scenes, times)
        with torch.no_grad():
            target = self.oracle(labels)
        busy = (labels[..., : LABEL_GROUPS["color"]].sum(-1, keepdim=True) > 0.01).float()
        error = (self.project(self.pixels(scenes, times, seed)) - target).square() * (1 + 8 * busy)
        loss = error.mean() / target.var()
        return loss, {"error": loss.item()}

    def _joint(self, step: int) -> Loss:
        scenes, times, seed = self.scenes("joint", step)
        return self._qa(scenes, times, seed, self.project(self.pixels(scenes, times, seed)), HARD, WITH_OPTIONS)

    def _oracle_qa(self, stage: str, step: int, hard: float, with_options: float) -> Loss:
        scenes, times, seed = self.scenes(stage, step)
        return self._qa(scenes, times, seed, self.oracle(self.labels(scenes, times)), hard, with_options)

    def _qa(self, scenes: Scenes, times: Tensor, seed: int, patches: Tensor, hard: float, with_options: float) -> Loss:
        rng = random.Random(seed)
        batch = self.packer.pack(self.questions(scenes, rng, hard, with_options))
        loss, logits, hidden = self.answer_loss(patches, batch)
        recall, remembered = self.recall(hidden, scenes, times)
        return loss + MEMORY_WEIGHT * recall, {**accuracy_by_kind(logits, batch), **remembered}


def accuracy_by_kind(logits: Tensor, batch: PackedBatch) -> dict[str, float]:
    """Share of right answers per kind of question and over all four-option questions."""
    right = (logits.argmax(-1).cpu() == batch.targets)[batch.weights == 1.0].tolist()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, value in zip(batch.kinds, right, strict=True):
        by_kind[kind].append(value)
        by_kind["FREE" if kind.endswith("/free") else "MC"].append(value)
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}
