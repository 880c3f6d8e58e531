"""Prompt templates: how the turns of a conversation become one string."""

import dataclasses
from enum import Enum, auto
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN

Message = str | tuple[Any, ...] | None
"""A turn's text; None for the turn that the model is to write; (text, image, mode) for a first turn with an image."""


class SeparatorStyle(Enum):
    """How turns are joined."""

    TWO = auto()
    PLAIN = auto()
    CHATML = auto()


@dataclasses.dataclass
class Conversation:
    """A prompt template and the turns taken so far.

    Attributes:
        system: text before the first turn.
        roles: names of the user and of the model as the prompt spells them.
        messages: [role, message] pairs; see `Message`.
        sep: ends a turn; with `sep2`, `sep` ends the user's turns and `sep2` the model's.
        stop_str, stop_token_ids: where generation should end, besides the end-of-text token.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = dataclasses.field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.CHATML
    sep: str = "<|im_end|>"
    sep2: str | None = None
    version: str = "Unknown"
    tokenizer: Any = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None

    def append_message(self, role: str, message: Message) -> None:
        """Add a turn; `message=None` leaves the turn open for the model."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """A conversation with its own list of turns, so that templates are never changed."""
        return dataclasses.replace(self, messages=[list(turn) for turn in self.messages])

    def get_prompt(self) -> str:
        """The conversation as one string."""
        turns = [(role, _text(message, first=index == 0)) for index, (role, message) in enumerate(self.messages)]
        if self.sep_style is SeparatorStyle.CHATML:
            system = f"{self.system}{self.sep}\n" if self.system else ""
            return system + "".join(f"{role}\n{text}{self.sep}\n" if text else f"{role}\n" for role, text in turns)
        ends = (self.sep, self.sep if self.sep2 is None else self.sep2)
        if self.sep_style is SeparatorStyle.PLAIN:
            return self.system + "".join(text + ends[index % 2] for index, (_, text) in enumerate(turns) if text)
        return f"{self.system}{self.sep}" + "".join(
            f"{role}: {text}{ends[index % 2]}" if text else f"{role}:" for index, (role, text) in enumerate(turns)
        )


def _text(message: Message, first: bool) -> str:
    """A turn's text. The image tag of a first (text, image, mode) turn moves to its beginning."""
    if not isinstance(message, tuple):
        return message or ""
    text = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{text}" if first else text


def _chatml(system: str) -> Conversation:
    return Conversation(
        system=f"<|im_start|>system\n{system}", roles=("<|im_start|>user", "<|im_start|>assistant"), version="qwen"
    )


conv_qwen = _chatml("You are a helpful assistant.")
conv_qwen_2_5 = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
conv_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_vicuna_v1 = Conversation(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.TWO,
    sep=" ",
    sep2="</s>",
    version="v1",
)

conv_templates = {
    "plain": conv_plain,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
    "qwen_2_5": conv_qwen_2_5,
}
default_conversation = conv_qwen
