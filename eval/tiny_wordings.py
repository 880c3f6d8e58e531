"""How the benchmarks word a question: what stands before it, how options are lettered, what is asked for at the end.

Texts are those that lmms-eval 0.7.3 makes of the stand-ins (a test compares them). The tiny models are taught all of
them. Lines that never change are single tokens of theirs (`FIXED`), which keeps prompts short.
"""

from dataclasses import dataclass

from eval.questions import LETTERS, Question

MC_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
MC_REQUEST = "Answer with the option's letter from the given choices directly."
FREE_REQUEST = "Answer the question using a single word or phrase."
BEST_ONLY = "Only give the best option."
BEST = "Best option: ("
IGNORE_QUIZ = "Please ignore the Quiz question in last frame of the video."
LEARN_FIRST = (
    "You should watch and learn the video content. Then apply what you learned to answer the following multi-choice "
    "question. The image for this question is at the end of the video."
)
FIFTH_LETTER, FIFTH_OPTION = "E", "something else"
"""What stand-ins of benchmarks with five options have for the fifth; it is never right."""


@dataclass(frozen=True)
class Wording:
    """A question with options: `before` + question + `between` + options, a line each, + `after`.

    Attributes:
        letter: how an option begins, a format of its letter.
        five: whether there is a fifth option.
    """

    before: str
    between: str
    letter: str
    after: str
    five: bool = False

    def options(self, question: Question) -> list[tuple[str, str]]:
        """Letter and text, as it stands in the prompt, of each option."""
        options = [*zip(LETTERS, question.options, strict=True)]
        if self.five:
            options.append((FIFTH_LETTER, FIFTH_OPTION))
        return [(letter, f"{self.letter.format(letter)} {text}") for letter, text in options]

    def prompt(self, question: Question) -> str:
        """The whole text."""
        options = "\n".join(text for _, text in self.options(question))
        return f"{self.before}{question.text}{self.between}{options}{self.after}"


WORDINGS = {
    "videomme": Wording(f"{MC_INSTRUCTION}\n", "\n", "{}.", f"\n\n{MC_REQUEST}"),
    "nextqa": Wording("", "\n", "{}.", "", five=True),
    "egoschema": Wording("", "\n", "{}.", f"\n{MC_REQUEST}", five=True),
    "mlvu": Wording("", "\n", "({})", f"\n{BEST_ONLY}\n{BEST}"),
    "mlvu_test": Wording("", "\n", "({})", ""),
    "mvbench": Wording("Question:", "\nOption:\n", "({})", f"\n{BEST_ONLY}\n"),
    "videommmu": Wording("", "\n", "{}.", f"\n{IGNORE_QUIZ}"),
    "videommmu_adaptation": Wording(f"{LEARN_FIRST}\n", "\n", "{}.", ""),
}
"""By the benchmark, with options."""
FREE_WORDINGS = ("", f"\n{FREE_REQUEST}", f" {FREE_REQUEST}")
"""What may follow a question that has none."""
FIXED = (
    *(MC_INSTRUCTION, MC_REQUEST, FREE_REQUEST, BEST_ONLY, BEST, IGNORE_QUIZ, LEARN_FIRST, "Question:", "Option:"),
    *(f"({letter})" for letter in (*LETTERS, FIFTH_LETTER)),
)
"""Single tokens of the tiny models."""
