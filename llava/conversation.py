"""Prompt templates: how the turns of a conversation become one string."""

import dataclasses
from enum import Enum, auto
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN

Message = str | tuple[Any, ...] | None
"""A turn's text; None for the turn that the model is to write; (text, image, mode) for a first turn with an image."""


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    CHATML = auto()
    LLAMA_2 = auto()
    LLAMA_3 = auto()
    GEMMA = auto()


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

LAYOUTS = {  # beginning, a turn, the open turn at the end
    SeparatorStyle.SINGLE: ("{system}{sep}", "{role}: {text}{end}", "{role}:"),
    SeparatorStyle.TWO: ("{system}{sep}", "{role}: {text}{end}", "{role}:"),
    SeparatorStyle.MPT: ("{system}{sep}", "{role}{text}{end}", "{role}"),
    SeparatorStyle.PLAIN: ("{system}", "{text}{end}", ""),
    SeparatorStyle.CHATML: ("{system}{sep}\n", "{role}\n{text}{end}\n", "{role}\n"),
    SeparatorStyle.LLAMA_3: (
        HEADER.format("system") + "{system}{sep}",
        HEADER.format("{role}") + "{text}{end}",
        HEADER.format("{role}"),
    ),
    SeparatorStyle.GEMMA: ("", "{role}{text}{end}", "{role}"),
}
"""Llama 3's beginning-of-text token is left to the tokenizer, and Llama 2's layout is a function of its own."""


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
        turns = self._turns()
        if self.sep_style is SeparatorStyle.LLAMA_2:
            return self._llama_2(turns)
        beginning, turn, open_turn = LAYOUTS[self.sep_style]
        ends = (self.sep, self.sep if self.sep2 is None else self.sep2)
        if self.sep_style is SeparatorStyle.CHATML and not self.system:
            beginning = ""
        return beginning.format(system=self.system, sep=self.sep) + "".join(
            (turn if text else open_turn).format(role=role, text=text, end=ends[index % 2])
            for index, (role, text) in enumerate(turns)
        )

    def _turns(self) -> list[tuple[str, str]]:
        """Roles and texts. A first turn with an image gets its tag, if the text does not begin with one already."""
        turns = [(role, message[0] if isinstance(message, tuple) else message or "") for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        without_tag = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            image = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
            return [image, (self.roles[1], "Received."), (role, without_tag), *turns[1:]]
        if not text.startswith(DEFAULT_IMAGE_TOKEN):
            turns[0] = (role, f"{DEFAULT_IMAGE_TOKEN}\n{without_tag}")
        return turns

    def _llama_2(self, turns: list[tuple[str, str]]) -> str:
        """The system text stands in the first turn of the user."""
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        prompt = ""
        for index, (_, text) in enumerate(turns):
            if text and index % 2 == 0:
                prompt += f"{self.sep}[INST] {text} [/INST]" if index else f"[INST] {system}{text} [/INST]"
            elif text:
                prompt += f" {text} {self.sep2}"
        return prompt


def _chatml(system: str) -> Conversation:
    return Conversation(
        system=f"<|im_start|>system\n{system}", roles=("<|im_start|>user", "<|im_start|>assistant"), version="qwen"
    )


def _mpt(system: str, mark: str = "<|im_start|>{}\n", sep: str = "<|im_end|>") -> Conversation:
    return Conversation(
        system=f"{mark.format('system')}{system}",
        roles=(mark.format("user"), mark.format("assistant")),
        sep_style=SeparatorStyle.MPT,
        sep=sep,
        version="mpt",
    )


def _vicuna(system: str, version: str = "v1") -> Conversation:
    return Conversation(system=system, roles=USER, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version)


def _vicuna_v0(system: str, version: str = "Unknown") -> Conversation:
    return Conversation(
        system=system, roles=("Human", "Assistant"), sep_style=SeparatorStyle.SINGLE, sep="###", version=version
    )


def _llama_2(system: str, sep: str = "<s>", version: str = "llama_v2") -> Conversation:
    return Conversation(
        system=system, roles=USER, sep_style=SeparatorStyle.LLAMA_2, sep=sep, sep2="</s>", version=version
    )


# What checkpoints were trained with, to the letter.
USER = ("USER", "ASSISTANT")
POLITE = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
POLITE_TO_HUMAN, POLITE_TO_USER = POLITE.format("human", "human"), POLITE.format("user", "user")
MARKED = "The visual content will be provided with the following format: <Image>visual content</Image>."
SIGHTED = (
    "able to understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language."
)
MARKED_CHAT = (
    f"A chat between a curious user and an artificial intelligence assistant. The assistant is {SIGHTED}{MARKED}"
)
SIGHTED_ASSISTANT = f"You are a helpful language and vision assistant. You are {SIGHTED}"
SIMPLE = "Answer the questions about the visual content that the user provides."
HARMLESS = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)

conv_qwen = _chatml("You are a helpful assistant.")
conv_qwen_2_5 = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
conv_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_vicuna_v1 = _vicuna(POLITE_TO_USER)
conv_mistral_instruct = _llama_2("", sep="")
conv_chatml_direct = _mpt("Answer the questions.")
conv_llava_llama_3 = Conversation(
    system=SIGHTED_ASSISTANT,
    roles=("user", "assistant"),
    sep_style=SeparatorStyle.LLAMA_3,
    sep="<|eot_id|>",
    version="llama_v3",
    stop_token_ids=[128009],
)
conv_gemma_instruct = Conversation(
    system="",
    roles=("<start_of_turn>user\n", "<start_of_turn>model\n"),
    sep_style=SeparatorStyle.GEMMA,
    sep="<end_of_turn>\n",
    version="gemma",
)

conv_templates = {
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": _llama_2(HARMLESS),
    "mistral_instruct": conv_mistral_instruct,
    "mistral_orca": _mpt(
        "You are MistralOrca, a large language model trained by Alignment Lab AI. "
        "Write out your reasoning step-by-step to be sure you get the right answers!"
    ),
    "mistral_zephyr": _mpt("You are a helpful AI assistant.", mark="<|{}|>\n", sep="</s>"),
    "mistral_direct": conv_chatml_direct,
    "plain": conv_plain,
    "v0_plain": conv_plain,
    "chatml_direct": conv_chatml_direct,
    "llava_v0": _vicuna_v0(POLITE_TO_HUMAN),
    "llava_v0_mmtag": _vicuna_v0(MARKED_CHAT, version="v0_mmtag"),
    "llava_v1": _vicuna(POLITE_TO_HUMAN),
    "llava_v1_mmtag": _vicuna(MARKED_CHAT, version="v1_mmtag"),
    "llava_llama_2": _llama_2(SIGHTED_ASSISTANT),
    "llava_llama_3": conv_llava_llama_3,
    "llava_llama_2_simple": _llama_2(SIMPLE),
    "llava_llama_2_mmtag": _llama_2(SIMPLE + MARKED, version="llama_v2_mmtag"),
    "llava_mistral_instruct": conv_mistral_instruct,
    "mpt": _mpt(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
    "qwen_2_5": conv_qwen_2_5,
    "gemma_instruct": conv_gemma_instruct,
}
"""Every published prompt template by its name; copy one before adding messages."""
default_conversation = conv_qwen
