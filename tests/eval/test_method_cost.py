"""docs/methods.md is what the docstrings say, and what these say of costs is what is computed."""

import pytest
import torch

from docs import methods as page
from eval import method_cost
from eval.method_cost import Meter, evaluate, growth
from llava.errors import ConfigError
from llava.token_compression import list_methods
from llava.token_compression.inputs import SHAPES
from llava.token_compression.registry import get_method


def test_the_page_is_up_to_date():
    assert page.main(["--check"]) == 0, "run `python -m docs.methods`"


def test_a_docstring_that_lacks_something_is_named(monkeypatch):
    monkeypatch.setattr(page, "line", lambda word, text: "" if word == "Cost" else "said")
    with pytest.raises(ValueError, match=r"selection\.py: the docstring of 'uniform' has no line \"Cost:\""):
        page.page()


def test_lines_of_a_docstring():
    text = "Idea.\n\nSource: a paper,\nand another one.\nCost: O(T) operations.\n\nMore: not part of it."
    assert page.line("Source", text) == "a paper, and another one."
    assert page.line("Cost", text) == "O(T) operations."
    assert page.line("Prunes", text) == ""


def test_matrix_products_and_other_operators_are_counted():
    with Meter() as meter:
        (torch.ones(3, 5) @ torch.ones(5, 7)).view(21).exp()
    # The ones and the exponentials, one each; views are free.
    assert meter.operations == 15 + 35 + 2 * 3 * 5 * 7 + 21
    assert meter.memory == 35


def test_formulas():
    letters = {"F": 2.0, "N": 8.0, "T": 16.0}
    assert evaluate("F N^2 + T log T + 3", letters) == 128 + 64 + 3
    for wrong in ("X", "F*N", "", "N^x"):
        with pytest.raises(ConfigError, match="is not one of F, N, T"):
            evaluate(wrong or "?", letters)


@pytest.mark.parametrize("name", list_methods())
def test_costs_grow_no_faster_than_stated(name):
    """By a factor of 1.3 at most, as the smallest size has costs of its own."""
    unknown = [given for given in get_method(name).inputs if given not in SHAPES]
    if unknown:
        pytest.skip(f"needs {', '.join(unknown)}, which synthetic features do not come with")
    for label, (_, ratios) in growth(name).items():
        for what, (counted, stated) in ratios.items():
            assert counted <= 1.3 * stated, (label, what)


def test_a_cost_that_is_stated_too_low_is_noticed(monkeypatch):
    monkeypatch.setattr(method_cost, "stated", lambda name: ("T D", "T D"))
    counted, stated = growth("scissor")["four times the tokens"][1]["operations"]
    assert counted > 1.3 * stated
