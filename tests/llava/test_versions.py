"""The supported range is pyproject.toml's, and anything outside of it is refused in one line."""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import llava
from llava import versions
from llava.cli import main
from llava.errors import UserError, VersionError

ROOT = Path(__file__).parents[2]
STATEMENT = (ROOT / "pyproject.toml").read_text()


def stated():
    """The ranges in pyproject.toml, as packaging reads them."""
    lines = re.findall(r'^    "(.*)",$', STATEMENT.split("dependencies = [")[1].split("\n]")[0], re.MULTILINE)
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    python = re.findall(r'^requires-python = "(.*)"$', STATEMENT, re.MULTILINE)
    return {"python": SpecifierSet(*python), "torch": ranges["torch"], "transformers": ranges["transformers"]}


def test_range_is_the_one_in_pyproject():
    assert {name: SpecifierSet(text) for name, text in versions.supported_versions().items()} == stated()


def test_range_of_an_installed_package_is_the_one_in_its_metadata(monkeypatch, tmp_path):
    text = "\n".join(
        ["Metadata-Version: 2.1", "Name: llava-scissor", "Version: 1", "Requires-Python: <3.14,>=3.10"]
        + [f"Requires-Dist: {name}" for name in ("torch<3,>=2.6", "torchvision>=9; extra == 'x'", "transformers>=5")]
    )
    (tmp_path / "llava_scissor-1.dist-info").mkdir()
    (tmp_path / "llava_scissor-1.dist-info" / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "llava" / "versions.py"))
    assert versions.supported_versions() == {"python": "<3.14,>=3.10", "torch": "<3,>=2.6", "transformers": ">=5"}


numbers = st.lists(st.integers(0, 20), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(numbers, st.sampled_from(["", "+cpu", ".dev1", "a0+nv25.1", "rc1", ".post1"]), numbers, numbers)
def test_comparison_is_packagings_on_the_release(release, suffix, low, high):
    specifier = f">={low},<{high}"
    expected = SpecifierSet(specifier).contains(Version(release + suffix).base_version)
    assert versions.is_in_range(release + suffix, specifier) == expected


def pretend(monkeypatch, **found):
    real = metadata.version

    def version(name):
        if name in found and found[name] is None:
            raise metadata.PackageNotFoundError(name)
        return found.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    if "python" in found:
        monkeypatch.setattr(versions.platform, "python_version", lambda: found["python"])


OUTSIDE = [
    ({"torch": "2.5.1+cu124"}, ["torch 2.5.1+cu124", "pip install 'torch>=2.6,<3'"]),
    ({"torch": None}, ["torch is not installed", "pip install 'torch>=2.6,<3'"]),
    ({"transformers": "4.57.6"}, ["transformers 4.57.6", "pip install 'transformers>=5.0,<6'"]),
    ({"transformers": "6.0.0.dev0"}, ["transformers 6.0.0.dev0"]),
    ({"torch": "2.0", "transformers": "4.0"}, ["torch 2.0 and transformers 4.0", "'torch>=2.6,<3' 'transformers>="]),
    ({"python": "3.9.18", "torch": "2.0"}, ["Python 3.9.18", ">=3.10,<3.14", "python3.13 -m venv"]),
    ({"python": "3.14.0"}, ["Python 3.14.0"]),
]


@pytest.mark.parametrize(("found", "words"), OUTSIDE)
def test_import_is_refused(monkeypatch, found, words):
    pretend(monkeypatch, **found)
    with pytest.raises(ImportError) as caught:
        importlib.reload(llava)
    assert isinstance(caught.value, VersionError)
    assert isinstance(caught.value, UserError)
    assert [word for word in words if word not in str(caught.value)] == []


def test_ends_of_the_range_are_inside(monkeypatch):
    for found in ({"torch": "2.6.0", "transformers": "5.0.0"}, {"torch": "2.99.0a0", "transformers": "5.99.0"}):
        pretend(monkeypatch, python="3.10.0", **found)
        versions.check_versions()


def test_command_prints_one_line(monkeypatch, capsys):
    pretend(monkeypatch, torch="2.5.1")
    assert main(["methods"]) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: Found torch 2.5.1")
    assert written.count("\n") == 1


@pytest.mark.parametrize(
    "start", ["runpy.run_module('llava.cli', run_name='__main__')", "import llava.cli as c; sys.exit(c.main())"]
)
def test_process_of_the_command_ends_with_one_line(start):
    """Started as `python -m llava.cli` and as the installed script are, with transformers gone."""
    name = "-m" if "runpy" in start else "/usr/bin/llava-scissor"
    program = (
        "import runpy, sys\nfrom importlib import metadata\nreal = metadata.version\n"
        "metadata.version = lambda name: '4.9' if name == 'transformers' else real(name)\n"
        f"sys.argv = [{name!r}, 'methods']\n{start}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Found transformers 4.9")
    assert done.stderr.count("\n") == 1
