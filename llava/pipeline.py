"""A question about a video or an image, from file to answer.

    qa = VideoQA.from_pretrained()
    answer = qa.ask("clip.mp4", "What color is the circle?", compression=CompressionConfig(retention_ratio=0.25))
    answer.text, answer.source_tokens, answer.kept_tokens, answer.milliseconds

Each step is one call that can be made by itself: `load_video` or `load_image`, `prepare`, `model.generate`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from llava.assets import checkpoint_path
from llava.config import ModelConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.errors import CheckpointError, ConfigError, DeviceError, UserError
from llava.images import is_image_file, load_image, process_image
from llava.instrument import record, stage
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.items import VisualItem
from llava.model.language_model.prefix import VisualPrefix
from llava.model.llava_arch import checkpoint_compression
from llava.model.video_layout import default_frames
from llava.token_compression import CompressionConfig
from llava.token_compression import compression as compressing
from llava.video import Video, VideoConfig, load_video
from llava.yaml_schema import did_you_mean

Visual = str | Path | Image.Image
"""A video file, an image file (told apart by `llava.images.is_image_file`), or an image."""

Videos = Visual | Sequence[Visual] | None
"""One video or image, several, or none for a question on text alone."""


@dataclass(frozen=True)
class Answer:
    """What `VideoQA.ask` returns.

    Attributes:
        text: the answer.
        source_tokens: visual tokens before compression, all videos and images together, newline tokens not counted.
        kept_tokens: visual tokens that the language model saw, newline tokens not counted.
        average_tokens: those that a layer of it saw of the prompt, on average: less where a method prunes inside.
        frames: frames and crops of images that the vision tower saw.
        milliseconds: wall-clock milliseconds per stage (`llava.instrument.STAGES`).
    """

    text: str
    source_tokens: int
    kept_tokens: int
    average_tokens: float
    frames: int
    milliseconds: dict[str, float]

    @property
    def retention_ratio(self) -> float:
        """kept_tokens / source_tokens; 1.0 without a video or image."""
        return self.kept_tokens / self.source_tokens if self.source_tokens else 1.0


@dataclass(frozen=True)
class Inputs:
    """A prompt with its videos and images, as `model.generate(input_ids, images=..., modalities=..., ...)` takes them.

    Attributes:
        input_ids: (1, length) int64 on the model's device; IMAGE_TOKEN_INDEX where each video or image goes.
        items: the videos and images in order; their pixels are float32.
    """

    input_ids: torch.Tensor
    items: list[VisualItem]

    def arguments(self) -> dict[str, Any]:
        """Everything but `input_ids`, as keyword arguments of `model.generate` and `model.forward`."""
        if not self.items:
            return {}
        return {
            "images": [item.pixels for item in self.items],
            "image_sizes": [item.size for item in self.items],
            "modalities": [item.modality for item in self.items],
        }


class VideoQA:
    """A loaded model that answers questions about videos and images.

    Attributes:
        model, tokenizer, image_processor, context_length: as `load_pretrained_model` returns them.
        conv_template: key of `llava.conversation.conv_templates`.
        video: how videos are read unless a call says otherwise.
        load_video: `llava.video.load_video`, or a function like it that remembers videos.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        context_length: int,
        conv_template: str = "qwen_1_5",
        video: VideoConfig | None = None,
    ) -> None:
        if conv_template not in conv_templates:
            raise ConfigError(
                f"model.conv_template: unknown name {conv_template!r}{did_you_mean(conv_template, conv_templates)}."
            )
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.context_length, self.conv_template = context_length, conv_template
        self.video = video or VideoConfig()
        self.load_video: Callable[[str | Path, VideoConfig], Video] = load_video

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, **settings: Any) -> "VideoQA":
        """Load a model.

        Args:
            path: a folder in the original LLaVA layout or a hub name; None loads the bundled tiny model.
            settings: other fields of `llava.config.ModelConfig` (device, dtype, attn_implementation, conv_template).

        Raises:
            UserError: the checkpoint, the device or a setting is wrong.
        """
        return cls.from_config(ModelConfig(path="tiny" if path is None else str(path), **settings))

    @classmethod
    def from_config(cls, config: ModelConfig, video: VideoConfig | None = None) -> "VideoQA":
        """Load the model of an experiment.

        Raises:
            UserError: the checkpoint, the device or a setting is wrong.
        """
        path = checkpoint_path(config.path)
        spread = config.device == "balanced"
        device = resolve_device("auto" if spread else config.device)
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        tokenizer, model, image_processor, context_length = load_pretrained_model(
            path,
            None,
            config.name or get_model_name_from_path(path),
            device_map="balanced" if spread else str(device),
            torch_dtype=dtype,
            attn_implementation="sdpa" if config.attn_implementation == "auto" else config.attn_implementation,
            overwrite_config=config.overwrite_config,
        )
        return cls(model, tokenizer, image_processor, context_length, config.conv_template, video)

    def ask(
        self,
        videos: Videos,
        question: str,
        *,
        compression: CompressionConfig | None = None,
        video: VideoConfig | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Answer:
        """Answer a question, with tokens before and after compression and milliseconds per stage.

        Args:
            videos: one video or image, several, or None.
            question: text; each of them stands before it, or where it says "<image>".
            compression: None does what the checkpoint's config.json says (most say nothing: every token is kept).
            video: how to read the videos; None uses `self.video`.
            max_new_tokens, options: transformers' generation arguments; greedy by default.

        Raises:
            UserError: a video or image cannot be read, or they and the question do not fit together.
        """
        with record() as recorder, compressing(self.model, self.compression(compression)):
            inputs = self.prepare(question, videos, video)
            text = self._generate(inputs, max_new_tokens=max_new_tokens, **options)
        return Answer(
            text=text,
            source_tokens=sum(stats.source_tokens for stats in recorder.compressions),
            kept_tokens=sum(stats.kept_tokens for stats in recorder.compressions),
            average_tokens=sum(stats.average_tokens for stats in recorder.compressions),
            frames=sum(len(item.pixels) for item in inputs.items),
            milliseconds=dict(recorder.milliseconds),
        )

    def watch(
        self,
        videos: Visual | Sequence[Visual],
        *,
        compression: CompressionConfig | None = None,
        video: VideoConfig | None = None,
    ) -> "Watched":
        """Read, encode and compress videos or images, and let the language model read them, once for many questions.

            watched = qa.watch("clip.mp4", compression=CompressionConfig(retention_ratio=0.25))
            watched.ask("What color is the circle?")
            watched.ask("Which shape appears last?")  # starts at the question

        Args:
            videos: one video or image, or several; they come before each question.
            compression, video: as in `ask`.

        Raises:
            UserError: there is none, or one cannot be read.
        """
        if not isinstance(videos, Visual) and len(videos) == 0:
            raise UserError("There is nothing to watch: give a video or an image.")
        config = self.compression(compression)
        with record() as recorder, compressing(self.model, config), torch.inference_mode():
            inputs = self.prepare("", videos, video)
            prefix = self.model.read_prefix(inputs.input_ids, **inputs.arguments())
        return Watched(self, prefix, recorder.compressions, inputs, dict(recorder.milliseconds))

    def compression(self, asked_for: CompressionConfig | None) -> CompressionConfig:
        """What is asked for, else what the checkpoint's config.json says, else "none", which keeps and counts all."""
        return asked_for or checkpoint_compression(self.model.config) or CompressionConfig(method="none")

    def generate(self, question: str, videos: Videos = None, **options: Any) -> str:
        """The answer alone, under whatever compression and recording is active; `options` are transformers'
        generation arguments."""
        return self._generate(self.prepare(question, videos), **options)

    @torch.inference_mode()
    def score(self, question: str, continuation: str, videos: Videos = None) -> tuple[float, bool]:
        """How likely the model is to answer `continuation`.

        Returns:
            Mean negative log-likelihood per token of the continuation and the end of its turn, in nats, and whether
            greedy decoding gives exactly these tokens.
        """
        inputs = self.prepare(question, videos)
        whole = self._tokens(self._prompt(question, len(inputs.items), continuation))
        target = whole[:, inputs.input_ids.shape[1] :]
        count = target.shape[1]
        output = self.model(whole, **inputs.arguments(), logits_to_keep=count + 1, use_cache=False, continuation=count)
        logits = output.logits[0, :-1].float()  # (count, vocabulary): the token after each position but the last
        loss = cross_entropy(logits, target[0])
        return float(loss), bool((logits.argmax(-1) == target[0]).all())

    def prepare(self, question: str, videos: Videos = None, video: VideoConfig | None = None) -> Inputs:
        """Read the videos and images and tokenize the prompt.

        An image is prepared as the checkpoint's `image_aspect_ratio` says. It is padded to a square if the checkpoint
        says nothing, or if there are several images or videos, as lmms-eval does for LLaVA-OneVision.

        Raises:
            VideoError, ImageError: a video or an image cannot be read.
            CheckpointError: there is one, but the model has no vision tower.
        """
        visuals = [videos] if isinstance(videos, Visual) else list(videos or [])
        if visuals:
            self._check_sees()
        alone = len(visuals) == 1
        items = [
            self._image(visual, alone)
            if isinstance(visual, Image.Image) or is_image_file(visual)
            else self._video(visual, video or self.video)
            for visual in visuals
        ]
        with stage("preprocess"):
            return Inputs(self._tokens(self._prompt(question, len(items))), items)

    @torch.inference_mode()
    def _generate(self, inputs: Inputs, **options: Any) -> str:
        new_tokens = self.model.generate(inputs.input_ids, **inputs.arguments(), **options)
        return self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)[0].strip()

    def _prompt(self, question: str, visuals: int, answer: str | None = None) -> str:
        """The conversation as text, ending where the answer begins, or where `answer` and its turn end."""
        if visuals and DEFAULT_IMAGE_TOKEN not in question:
            question = " ".join([DEFAULT_IMAGE_TOKEN] * visuals) + "\n" + question
        conversation = conv_templates[self.conv_template].copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
        prompt = conversation.get_prompt()
        return prompt if answer is None else prompt.removesuffix("\n")

    def _tokens(self, prompt: str) -> torch.Tensor:
        """(1, length) int64 on the model's device."""
        return torch.tensor([tokenizer_image_token(prompt, self.tokenizer)], device=self.model.device)

    def read_video(self, path: str | Path, config: VideoConfig | None = None) -> tuple[Video, torch.Tensor]:
        """The frames of a video, and as the vision tower takes them: (frames, 3, side, side) float32.

        Raises:
            VideoError: it cannot be read. CheckpointError: the model has no vision tower.
        """
        self._check_sees()
        video = self.load_video(path, self.reading(config))
        with stage("preprocess"):
            return video, self.image_processor.preprocess(video.frames, return_tensors="pt")["pixel_values"]

    def _check_sees(self) -> None:
        if self.image_processor is None:
            raise CheckpointError("This checkpoint has no vision tower: ask without a video, or load another one.")

    def _video(self, path: str | Path, config: VideoConfig) -> VisualItem:
        video, pixels = self.read_video(path, config)
        return VisualItem(pixels, "video", (video.frames.shape[2], video.frames.shape[1]))

    def _image(self, visual: Visual, alone: bool) -> VisualItem:
        config = self.model.config
        mode = getattr(config, "image_aspect_ratio", None) if alone else None
        with stage("preprocess"):
            image = visual if isinstance(visual, Image.Image) else load_image(visual)
            pixels = process_image(
                image, self.image_processor, mode or "pad", getattr(config, "image_grid_pinpoints", None)
            )
        return VisualItem(pixels, "image", image.size)

    def reading(self, config: VideoConfig | None = None) -> VideoConfig:
        """How a video is read: `config`, else `self.video`, with the checkpoint's number of frames if it names none."""
        config = config or self.video
        if config.num_frames is not None:
            return config
        return dataclasses.replace(config, num_frames=default_frames(self.model.config))


class Watched:
    """Videos and images that the language model has read. It takes any number of questions, each by itself.

    Answers are those of `VideoQA.ask` up to the rounding of sums, which two parts of a prompt do in another order than
    the whole prompt. The keys and values of the video's kept tokens stay on the device until this object is gone; see
    `llava.model.language_model.prefix.VisualPrefix` for their size. The model's weights and setting must stay as they
    were.

    Attributes:
        source_tokens, kept_tokens, frames: as in `Answer`.
        milliseconds: per stage, of watching; those of an `Answer` are of the question alone.
    """

    def __init__(
        self, qa: VideoQA, prefix: VisualPrefix, stats: Sequence[Any], inputs: Inputs, milliseconds: dict[str, float]
    ) -> None:
        self._qa, self._prefix, self._visuals = qa, prefix, len(inputs.items)
        self.source_tokens = sum(item.source_tokens for item in stats)
        self.kept_tokens = sum(item.kept_tokens for item in stats)
        self.frames = sum(len(item.pixels) for item in inputs.items)
        self.milliseconds = milliseconds

    def ask(self, question: str, *, max_new_tokens: int = 128, **options: Any) -> Answer:
        """Answer a question; `options` are transformers' generation arguments.

        Raises:
            UserError: the question has a place for a video in it.
        """
        if DEFAULT_IMAGE_TOKEN in question:
            raise UserError(f"What is watched stands before the question, so that {DEFAULT_IMAGE_TOKEN} has no place.")
        qa = self._qa
        with record() as recorder:
            with stage("preprocess"):
                input_ids = qa._tokens(qa._prompt(question, self._visuals))
            inputs = Inputs(input_ids, [])
            text = qa._generate(inputs, prefix=self._prefix, max_new_tokens=max_new_tokens, **options)
        return Answer(
            text, self.source_tokens, self.kept_tokens, self.kept_tokens, self.frames, dict(recorder.milliseconds)
        )


def resolve_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is the first CUDA device if there is one, else the CPU.

    Raises:
        DeviceError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"Unknown device {name!r}: use auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"There is no device {name!r}: this machine offers {torch.cuda.device_count()} CUDA devices to PyTorch "
            f"{torch.__version__}. Use --device cpu (model.device=cpu)."
        )
    return device
