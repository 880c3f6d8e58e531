"""The lmms-eval model `llava_scissor`: videos and images in, answers out, with tokens and times of every sample.

    python -m lmms_eval --model llava_scissor --tasks videomme \
        --model_args pretrained=lmms-lab/llava-onevision-qwen2-7b-ov,num_frames=32,retention_ratio=0.1,log_dir=answers

lmms-eval finds it through the entry-point group `lmms_eval.models`; `eval.run` uses the class directly. Answers go to
an `AnswerLog` as they finish, and one that is there already is not computed again.
"""

import contextlib
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from tqdm import tqdm

from llava.answer_log import AnswerLog, question_key, settings_fingerprint
from llava.config import BUDGETS, ModelConfig
from llava.errors import ConfigError, UserError
from llava.images import is_image_file
from llava.instrument import record
from llava.pipeline import VideoQA, Visual
from llava.read_ahead import ReadAhead
from llava.token_compression import CompressionConfig, compression
from llava.video import VideoConfig
from llava.yaml_schema import build, did_you_mean

DEFAULT_MAX_NEW_TOKENS = 1024

Progress = Callable[[int, int], None]


def manifest() -> Any:
    """What lmms-eval registers. A function, as importing the registry imports this module."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_scissor", simple_class_path=f"{__name__}.LlavaScissor")


def make_accelerator() -> Accelerator:
    """One whose processes wait for the slowest of them, which may be hours behind. The first one made decides."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


class LlavaScissor(lmms):
    """Answers the requests of one process; under `accelerate launch` each process has its own device and requests.

    Attributes:
        keys: for each (task, document number) the keys of its answers in the log.
    """

    is_simple = True

    def __init__(self, model: ModelConfig, video: VideoConfig, compression: CompressionConfig | None = None) -> None:
        """`compression=None` follows the checkpoint's config.json.

        Raises:
            UserError: the checkpoint, the device or the configuration is wrong.
        """
        super().__init__()
        self.accelerator = make_accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.accelerator.device.type == "cuda" and model.device in ("auto", "cuda"):
            model = dataclasses.replace(model, device=f"cuda:{self.accelerator.local_process_index}")
        self.qa = VideoQA.from_config(model, video)
        # Benchmarks ask several questions in a row about a video; it is decoded, and its decoding timed, once.
        self.videos = ReadAhead(self.qa.load_video)
        self.qa.load_video = self.videos
        self.reads_ahead = self.device.type == "cuda"  # else the model needs the processor itself
        self.on_video = False  # the last request was
        self.start(compression)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "LlavaScissor":
        """From lmms-eval's `--model_args`: `pretrained`, the fields of the model, video and compression sections of an
        experiment, and `log_dir`.

        Raises:
            ConfigError: an unknown name or an impossible value.
        """
        arguments = simple_parse_args_string(arg_string) or {}
        log_dir = arguments.pop("log_dir", None)
        if "pretrained" in arguments:
            arguments["path"] = arguments.pop("pretrained")
        device = (additional_config or {}).get("device")
        if device is not None:
            arguments.setdefault("device", device)
        batch_size = (additional_config or {}).get("batch_size")
        if batch_size not in (None, 1, "1"):
            raise ConfigError(f"batch_size is {batch_size}; llava_scissor answers one question at a time.")
        model, video, budget = _split(arguments)
        lm = cls(model, video, budget)
        if log_dir is not None:
            fingerprint = settings_fingerprint(model, video, budget, model_path=model.path)
            lm.start(budget, AnswerLog(Path(log_dir), fingerprint, lm.rank))
        return lm

    def start(
        self,
        compression: CompressionConfig | None,
        log: AnswerLog | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Begin a run with another compression on the model that is loaded.

        Args:
            compression: None follows the checkpoint's config.json.
            log: where answers are kept and looked up; None keeps none.
            on_progress: called with the number of finished and of all requests of this process.
        """
        self.compression = self.qa.compression(compression)
        self.log, self.on_progress = log, on_progress
        self.keys: dict[tuple[str, int], list[str]] = defaultdict(list)

    @property
    def device(self) -> torch.device:
        return self.qa.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, or sampled ones where the task asks for it.

        Like lmms-eval's own LLaVA models this ends an answer at the end of the turn and ignores `until`.
        """
        return [self._generate(request) for request in self._progress(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each continuation its mean negative log-likelihood per token and whether greedy decoding gives it.

        lmms-eval's documentation asks for a log-likelihood, but it takes the choice with the smallest number, as its
        own LLaVA models return a loss.
        """
        return [self._score(request) for request in self._progress(requests)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("llava_scissor does not support tasks of several rounds (generate_until_multi_round).")

    def _generate(self, request: Instance) -> str:
        question, options, doc_to_visual, doc_id, task, split = request.args
        visuals = self._visuals(doc_to_visual, task, split, doc_id)
        options = {key: value for key, value in options.items() if key not in ("until", "image_aspect_ratio")}
        options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)

        def answer() -> str:
            return self.qa.generate(question, visuals, **options)

        return self._once("generate_until", question, options, visuals, (task, doc_id), answer)

    def _score(self, request: Instance) -> tuple[float, bool]:
        question, target, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        continuation = target(document) if callable(target) else target
        visuals = self._visuals(doc_to_visual, task, split, doc_id)

        def score() -> tuple[float, bool]:
            return self.qa.score(question, continuation, visuals)

        loss, greedy = self._once("loglikelihood", question, continuation, visuals, (task, doc_id), score)
        return loss, greedy

    def _expect(self, following: Instance | None) -> None:
        """Have the first video of the request `following` the next one read while that one is answered."""
        path = None
        if following is not None:
            _, _, doc_to_visual, doc_id, task, split = following.args
            with contextlib.suppress(UserError):  # which is raised when its turn comes
                path = next(filter(_is_video, self._visuals(doc_to_visual, task, split, doc_id)), None)
        self.videos.expect(path, self.qa.reading())

    def _visuals(self, doc_to_visual: Callable[[Any], Any], task: str, split: str, doc_id: int) -> list[Visual]:
        """Videos and images of a document; none for a question on text alone.

        Raises:
            UserError: something else than files and images, or a video that the benchmark's data lack.
        """
        try:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        except (SystemExit, FileNotFoundError) as error:  # what tasks of lmms-eval do about a missing video
            raise UserError(
                f"{task}, document {doc_id}: {error}. lmms-eval keeps a benchmark's videos in the folder that HF_HOME "
                "names (default ~/.cache/huggingface): remove the benchmark's folder there to have them fetched anew."
            ) from None
        for visual in visuals:
            if not isinstance(visual, str | Image.Image):
                raise UserError(
                    f"{task} gives {type(visual).__name__} objects, but llava_scissor takes files and PIL images."
                )
        self.on_video = any(map(_is_video, visuals))
        return list(visuals)

    def _once(
        self,
        kind: str,
        question: str,
        options: Any,
        visuals: list[Visual],
        document: tuple[str, int],
        compute: Callable,
    ) -> Any:
        """The logged response to a request, or a new one, which is measured and logged."""
        names = [_fingerprint(visual) if isinstance(visual, Image.Image) else str(visual) for visual in visuals]
        key = question_key(kind, question, options, names)
        self.keys[document].append(key)
        if self.log is not None and (logged := self.log.get(key)):
            return logged["response"]
        with compression(self.qa.model, self.compression), record() as recorder:
            response = compute()
        if self.log is not None:
            entry = {
                "request": kind,
                "task": document[0],
                "doc_id": document[1],
                "question": question,
                "options": options,
                "visuals": names,
                "response": response,
                "videos": [dataclasses.asdict(stats) for stats in recorder.compressions],
                "milliseconds": dict(recorder.milliseconds),
            }
            self.log.add(key, entry)
        return response

    def _progress(self, requests: Sequence[Instance]) -> Iterable[Instance]:
        """The requests in their order, in which questions on the same video follow each other."""
        total = sum(not request.metadata.get("__padding_only__") for request in requests)
        with tqdm(total=total, disable=self.rank != 0, desc="Answering") as bar:
            for done, request in enumerate(requests, start=1):
                if self.reads_ahead and self.on_video:
                    self._expect(requests[done] if done < len(requests) else None)
                yield request
                bar.update()
                if self.on_progress:
                    self.on_progress(min(done, total), total)


def _is_video(visual: Visual) -> TypeGuard[str]:
    return isinstance(visual, str) and not is_image_file(visual)


def _fingerprint(image: Image.Image) -> str:
    """A name for an image without a file, the same for the same pixels only."""
    digest = hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest()
    return f"image {image.width}x{image.height} {digest[:32]}"


def _split(arguments: dict[str, Any]) -> tuple[ModelConfig, VideoConfig, CompressionConfig | None]:
    """Sort flat arguments into the three sections by their names."""
    sections = (ModelConfig, VideoConfig, CompressionConfig)
    names = {section: [field.name for field in dataclasses.fields(section)] for section in sections}
    names[CompressionConfig].append("preset")
    known = [*names[ModelConfig], *names[VideoConfig], *names[CompressionConfig]]
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"model_args: unknown name {key!r}{did_you_mean(key, ['pretrained', 'log_dir', *known])}."
            )
    given = {section: {k: v for k, v in arguments.items() if k in names[section]} for section in sections}
    options = given[CompressionConfig]
    if options and "method" not in options and not any(budget in options for budget in BUDGETS):
        raise ConfigError(f"model_args: {', '.join(options)} need one of {', '.join(BUDGETS)}.")
    return (
        build(ModelConfig, given[ModelConfig], "model_args"),
        build(VideoConfig, given[VideoConfig], "model_args"),
        CompressionConfig.from_dict(options, "model_args") if options else None,
    )
