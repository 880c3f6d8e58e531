"""What docstrings say of arguments is what the functions take."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARGUMENTS = re.compile(r"^Args:\n((?: .*\n|\n)+)", re.MULTILINE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def definitions():
    """Every function and class whose docstring has a section on arguments, with that section."""
    for path in sorted([*ROOT.glob("llava/**/*.py"), *ROOT.glob("eval/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, DEFINITIONS) and (section := ARGUMENTS.search((ast.get_docstring(node) or "") + "\n")):
                yield pytest.param(node, section[1], id=f"{path.relative_to(ROOT)}:{node.name}")


def described(section):
    """The names in front of the colons; those of one line are separated by commas."""
    lines = re.findall(r"^    ([\w*][\w*, ]*): ", section, re.MULTILINE)
    return {name.strip(" *") for line in lines for name in line.split(",")}


def taken(node):
    if isinstance(node, ast.ClassDef):
        (node,) = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {argument.arg for argument in [*plain, arguments.vararg, arguments.kwarg] if argument}


@pytest.mark.parametrize(("node", "section"), definitions())
def test_arguments_described_are_taken(node, section):
    assert described(section)
    assert described(section) <= taken(node)
