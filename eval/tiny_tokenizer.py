"""The tiny model's own tokenizer: byte-level BPE over the words of the procedural world, in Qwen2's chat format.

Any text can be encoded (bytes are the base alphabet); the words of the world and the fixed lines of the benchmark
prompts are single tokens, which keeps prompts short.
"""

import itertools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.questions import LETTERS, NUMBERS, PLACES
from eval.tiny_wordings import FIFTH_LETTER, FIFTH_OPTION, FIXED
from eval.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES

SYSTEM = "You are a helpful assistant."
_WORDS = r" ?\p{L}+(?:[-']\p{L}+)*"
_SPLIT = rf"[A-Z]\.|{_WORDS}| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\n|\s+"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the result is the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # an upper bound: training stops when every word is one token
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in (SYSTEM, *FIXED)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer and write its files into `folder`."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def _corpus() -> list[str]:
    moments = ("At the start, ", "At the end, ")
    questions = [
        *(f"What color is the {name}?" for name in [*SHAPES, "small object"]),
        *(f"Which shape is {key}?" for key in [*COLORS, "small"]),
        *(f"What is the motion of the {shape}?" for shape in SHAPES),
        *(f"{moment}where is the {shape}?" for moment in moments for shape in SHAPES),
        *(f"{moment}what color is the {shape}?" for moment in moments for shape in SHAPES),
        "How many objects are there in total?",
        *(f"Which {noun} {verb}?" for noun in ("color", "shape") for verb in ("is not shown", "disappears")),
        *(f"Which {noun} appears {which}?" for noun in ("color", "shape") for which in ("first", "last")),
        "What is the background?",
        *(f"{moment}what is the background?" for moment in moments),
        *(f"Is there a {shape}?" for shape in SHAPES),
        *(f"Is anything {color}?" for color in COLORS),
        *("system", "user", "assistant"),
    ]
    words = [*COLORS, *SHAPES, *MOTIONS, *NUMBERS, *PLACES, *BACKGROUNDS, "yes", "no"]
    options = [f"{letter}. {word}" for letter, word in itertools.product(LETTERS, words)]
    fifth = [f"{FIFTH_LETTER}. {FIFTH_OPTION}", FIFTH_LETTER]
    return [line for line in [*questions, *words, *options, *LETTERS, *fifth] for _ in range(2)]
