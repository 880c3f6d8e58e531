"""Write docs/methods.md, the one page on all compression methods, from the table of methods and their docstrings.

    python -m docs.methods [--check]        (--check: only say whether the file is what would be written)

Of a method that has a file to itself the docstring is that of the file, otherwise that of its function. Its first
paragraph is the idea; further down, lines that begin with these words, and go on until an empty line or the next:

    Source: where it is published
    Cost: O(...) operations, O(...) memory      see `eval.method_cost` for what may stand in the brackets
    Prunes: where, for a method that does more than choose among the tokens that enter the language model
"""

import dataclasses
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

from llava.token_compression import list_methods
from llava.token_compression.registry import Method, docstring, get_method

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
BEFORE = "before the language model, among the tokens that the 2x2 pooling leaves"
HEAD = """\
# Methods

<!-- Written by `python -m docs.methods` from the docstrings: change those. -->

All are called as `CompressionConfig(method=..., retention_ratio=...)` and keep exactly the number of tokens asked for.
Costs are those of the choice alone; the final merge (Eq. 7 and 8 of LLaVA-Scissor) adds O(K T D) operations and blocks
of at most 2^21 numbers. F is the number of frames, N of tokens per frame, T = F N, K of kept tokens, D the dimension
of a token; of methods that prune inside the language model it is the choice there. `python -m eval.method_cost` counts
what is really computed, and tests hold it to what is stated here. Those methods work with `model.generate` and
`VideoQA.ask`, where the question is known when the video is read.

No method depends on the attention kernel (eager, sdpa, flash attention) of the vision tower or of the language model:
the attention that a method needs is computed beside the layer, for the rows that it needs, and no layer returns its
attention matrix. What it needs of the vision tower takes one more product of queries and keys, of the last layer, or
of two others (`aot`).
"""


def main(arguments: list[str]) -> int:
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print("docs/methods.md is not what the docstrings say: run `python -m docs.methods`.")
        return 1
    return 0


@dataclasses.dataclass(frozen=True)
class Documentation:
    """What the docstring of a method says, and where it is; empty text for what it does not say."""

    idea: str
    source: str
    cost: str
    prunes: str
    file: Path
    neighbours: int


def documentation(name: str) -> Documentation:
    """The documentation of the method called `name`."""
    files = Counter(_file(get_method(other)) for other in list_methods())
    file, text = _file(get_method(name)), docstring(name)
    idea = " ".join(text.partition("\n\n")[0].split())
    return Documentation(
        idea, line("Source", text), line("Cost", text), line("Prunes", text) or BEFORE, file, files[file] - 1
    )


def page() -> str:
    """The page as Markdown.

    Raises:
        ValueError: a docstring lacks something; the message names them all.
    """
    known = {name: documentation(name) for name in list_methods()}
    lacking = [
        f"{said.file.relative_to(ROOT)}: the docstring of {name!r} has no {what}."
        for name, said in known.items()
        for what, text in (("first paragraph", said.idea), ('line "Source:"', said.source), ('line "Cost:"', said.cost))
        if not text
    ]
    if lacking:
        raise ValueError("\n".join(lacking))
    sections = [_section(name, said) for name, said in known.items()]
    return "\n\n".join([HEAD.rstrip(), _overview(known), *sections]) + "\n"


def _overview(known: dict[str, Documentation]) -> str:
    """All methods in one table."""
    rows = ["| method | needs | prunes | final merge | lines of its file |", "| --- | --- | --- | --- | --: |"]
    for name, said in known.items():
        method = get_method(name)
        where = "before the language model" if said.prunes == BEFORE else said.prunes
        if method.before is not None:
            where = "inside the language model" if method.before == "none" else "before and inside it"
        merge, lines = "yes" if method.merge else "no", _lines(said)
        rows.append(f"| [{name}](#{name}) | {_needs(method)} | {where} | {merge} | {lines} |")
    return "\n".join(rows)


def _section(name: str, said: Documentation) -> str:
    method = get_method(name)
    together = f", with {said.neighbours} others" if said.neighbours else ""
    facts = {
        "source": said.source,
        "needs": _needs(method),
        "size": "a threshold or an exact count" if method.takes_threshold else "an exact count",
        "final merge": _merge(method),
        "options": _options(method),
        "prunes": said.prunes,
        "cost": said.cost,
        "file": f"`{said.file.relative_to(ROOT)}`, {_lines(said)} lines{together}",
    }
    table = [f"| {key} | {value} |" for key, value in facts.items() if value]
    return "\n".join([f"## {name}", "", said.idea, "", "| | |", "| --- | --- |", *table])


def _lines(said: Documentation) -> int:
    return len(said.file.read_text().splitlines())


def line(word: str, text: str) -> str:
    """What follows `word:` at the beginning of a line, up to an empty line or the next such word."""
    match = re.search(rf"^{word}: (.*?)(?=\n\s*\n|\n[A-Z]\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def _file(method: Method) -> Path:
    return Path(inspect.getsourcefile(method.keep) or "").resolve()


def _merge(method: Method) -> str:
    """Whether all source tokens are merged into those that are kept."""
    if method.before == "none":
        return "no"
    return "yes, unless `merge=False`" if method.merge else "no, unless `merge=True`"


def _needs(method: Method) -> str:
    """What it takes besides the tokens."""
    before = method if method.before is None else get_method(method.before)
    inputs = [f"`{name}`" for name in before.inputs]
    if method.before is not None:
        inputs.append("attention of the language model")
    return ", ".join(inputs) or "the tokens alone"


def _options(method: Method) -> str:
    """Names and defaults of the settings that only this method has."""
    if method.options is None:
        return ""
    return ", ".join(f"`{field.name}={field.default!r}`" for field in dataclasses.fields(method.options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
