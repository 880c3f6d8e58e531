"""Any of lmms-eval's own models on transformers, with compression: the lmms-eval model `llava_scissor_hf`.

    python -m lmms_eval --model llava_scissor_hf --tasks videomme \
        --model_args wrapper=qwen2_5_vl,pretrained=Qwen/Qwen2.5-VL-7B-Instruct,retention_ratio=0.1

`wrapper` names the model of lmms-eval that does everything; the fields of `CompressionConfig` are taken out of the
arguments, and the others are the wrapper's own. Several of those wrappers record an empty answer where generation
fails, so that an error looks like a bad score: a run in which no video was compressed ends with an error instead. How
many tokens a video had and kept on average is under "throughput" in lmms-eval's own result and last table.
"""

import dataclasses
from collections.abc import Sequence
from statistics import mean
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from transformers import AutoModelForImageTextToText

from llava.errors import ConfigError, UserError
from llava.instrument import record
from llava.token_compression import CompressionConfig, apply


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_scissor_hf", simple_class_path=f"{__name__}.CompressedWrapper")


class CompressedWrapper(lmms):
    """Stands in lmms-eval's registry; what it makes is the wrapper itself."""

    is_simple = True

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """The wrapper, whose model compresses.

        Raises:
            ConfigError: no wrapper is named, or the compression is refused.
            UserError: the wrapper's model is none that `llava.hf` supports.
        """
        from lmms_eval.models import get_model

        names = {"preset", *(field.name for field in dataclasses.fields(CompressionConfig))}
        given = simple_parse_args_string(arg_string) or {}
        wrapper = given.get("wrapper")
        if not isinstance(wrapper, str) or wrapper == "llava_scissor_hf":
            raise ConfigError("model_args: name the model of lmms-eval to compress, such as wrapper=qwen2_5_vl.")
        rest = [part for part in arg_string.split(",") if part.partition("=")[0].strip() not in {"wrapper", *names}]
        settings = {name: value for name, value in given.items() if name in names}
        config = CompressionConfig.from_dict(settings, "model_args")
        lm: Any = get_model(wrapper).create_from_arg_string(",".join(rest), additional_config)
        if not hasattr(lm.model, "generate"):
            _load_whole_model(lm)
        apply(lm.model, config)
        for name in ("processor", "_image_processor"):
            if hasattr(lm, name):
                setattr(lm, name, _WithoutEmptyLists(getattr(lm, name)))
        lm.generate_until = _counting(lm.generate_until, wrapper)
        return lm

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError


def _load_whole_model(lm: Any) -> None:
    """Give a wrapper the model that generates, where it has loaded the one inside of it.

    lmms-eval 0.7.3's `huggingface` does so: it looks for the model's type among classes of configurations.
    """
    path, dtype = lm.model.name_or_path, lm.model.dtype
    lm._model = None  # its memory first
    lm._model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map=lm.device_map).eval()


class _WithoutEmptyLists:
    """A processor that is given no list of images where a prompt has none, which transformers 5 does not take."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        media = ("images", "videos", "audios")
        return self._processor(*args, **{key: value for key, value in kwargs.items() if key not in media or value})


def _counting(generate_until: Any, wrapper: str) -> Any:
    """The wrapper's method, which counts tokens of videos, and fails where none was compressed."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    def generate(requests: Sequence[Any]) -> list[str]:
        with record() as recorder:
            answers = generate_until(requests)
        if not requests:
            return answers
        if not recorder.compressions:
            raise UserError(
                f"lmms-eval's {wrapper} answered {len(requests)} requests without compressing a video: either they "
                "have none, or generation failed and its log says why."
            )
        sizes = {
            "video_tokens": mean(stats.source_tokens for stats in recorder.compressions),
            "video_tokens_kept": mean(stats.kept_tokens for stats in recorder.compressions),
        }
        log_metrics(total_elapsed_time=0, total_gen_tokens=0, avg_speed=0, additional_metrics=sizes)
        return answers

    return generate
