"""Write the table of docs/hf.md from tests that ran: `python docs/hf_matrix.py [PYTHON ...]`.

Each PYTHON, by default this one, runs the tests of the models of transformers with the version that it has. A cell
says in how many of the versions every test of its kind passed.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hf.md"
TESTS = [f"tests/llava/test_{name}.py" for name in ("hf_families", "hf_generation", "serving")]
ON_DISK = [f"tests/llava/test_{name}.py" for name in ("hf_processors", "lmms_eval_wrappers")]
"""Tests that need torchvision, and lmms-eval with what its models need; a Python without them leaves them out."""

MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")
COLUMNS = {
    "all kept: same logits": ["everything_kept_changes_nothing"],
    "every method, exact count": ["language_model_reads_what_compress_gives"],
    "positions": ["positions"],
    "cache, no cache, static cache": ["answers_agree_with_and_without_cache", "loop_by_hand_equals_generate"],
    "batch of unequal videos": ["batch_equals_single"],
    "beams, sampling": ["beams_and_several_sequences"],
    "images beside videos, or compressed too": ["images_stay", "images_that_are_asked_for"],
    "eager and sdpa": ["eager_attention_agrees"],
    "prompt lookup": ["prompt_lookup_equals_greedy"],
    "next turn": ["cache_continued_with_new_tokens"],
    "undone, nested, threads": [
        *("nothing_is_left", "blocks_nest", "apply_and_remove", "another_instance_is_untouched"),
        "two_threads_on_two_models",
    ],
    "gradient checkpointing": ["gradient_checkpointing"],
    "accelerate's hooks": ["placed_by_accelerate"],
    "quantised decoder": ["quantised_weights"],
    "compiled steps": ["compiled_steps_are_one_graph"],
    "count from the size": ["count_is_that_of_the_prompt"],
    "its processor and chat template": ["chat_template_and_processor"],
    "pipeline": ["pipeline"],
    "lmms-eval's own model": ["wrapper_compresses"],
}
"""Tests, without `test_`, under the heading of what they show."""

METHOD_TEST = "language_model_reads_what_compress_gives"
Outcomes = dict[tuple[str, str], bool]
"""Whether all cases passed, by family and test, and for that of methods also by family and `test-method`."""


def main(pythons: list[str]) -> None:
    results = dict(outcomes(python) for python in pythons)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + table(results) + MARKS[1] + after, encoding="utf-8")


def outcomes(python: str) -> tuple[str, Outcomes]:
    """The version of transformers that a Python has, and for each family and test whether all its cases passed."""
    version = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('transformers'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *TESTS, *ON_DISK]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        found: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for case in cases:
            name, _, parameters = case.attrib["name"].removesuffix("]").partition("[")
            family, _, method = parameters.partition("-")
            if case.find("skipped") is None:
                passed = case.find("failure") is None and case.find("error") is None
                name = name.removeprefix("test_")
                found[family, name].append(passed)
                if name == METHOD_TEST:
                    found[family, f"{name}-{method}"].append(passed)
    return version, {key: all(passed) for key, passed in found.items()}


def table(results: dict[str, Outcomes]) -> str:
    """Markdown: families by headings, and methods by families."""
    tests = {key for outcomes in results.values() for key in outcomes}
    families = sorted({family for family, name in tests if name == "positions"})
    methods = sorted({name for _, name in tests if name.startswith(f"{METHOD_TEST}-")})
    features = [[f"`{family}`", *(_cell(results, family, names) for names in COLUMNS.values())] for family in families]
    by_method = [
        [f"`{name.partition('-')[2]}`", *(_cell(results, family, [name]) for family in families)] for name in methods
    ]
    return (
        f"\nVersions of transformers: {', '.join(results)}.\n\n"
        f"{_markdown(['model_type', *COLUMNS], features)}\n\n"
        "Every method that needs nothing but the features, at exactly the number of tokens asked for, with the kept "
        f"tokens those of `compress` by hand:\n\n"
        f"{_markdown(['method', *(f'`{family}`' for family in families)], by_method)}\n\n"
    )


def _cell(results: dict[str, Outcomes], family: str, names: list[str]) -> str:
    ran = [[tests[family, name] for name in names if (family, name) in tests] for tests in results.values()]
    ran = [passed for passed in ran if passed]
    return f"{sum(all(passed) for passed in ran)} of {len(ran)}" if ran else "not run"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
