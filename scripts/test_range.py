"""Build environments at the ends of the supported range, run the fast tests in each, and print one table.

The range comes from pyproject.toml. An environment that is finished is used again; one that fails leaves the others be.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
COLUMNS = ("environment", "python", "torch", "transformers", "passed", "failed", "skipped", "build s", "tests s", "GB")
VERSIONS = """
import json, platform
from importlib.metadata import version
print(json.dumps([platform.python_version(), version("torch"), version("transformers")]))
"""


@dataclass
class Environment:
    """What is installed beside the package: `pins` are pip's requirements, `without` is removed again."""

    python: str
    extras: str = "dev"
    pins: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)


class BuildError(Exception):
    """An environment that cannot be made here, and why."""


def main() -> int:
    """Test the environments that are asked for; 1 if any could not be built or has a test that fails."""
    known, groups = environments()
    parser = argparse.ArgumentParser(prog="test_range.sh", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*groups, *known])} (default: all)")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / ".range", help="for the environments")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in groups and name not in known]
    if unknown:
        parser.error(f"unknown environment {unknown[0]}: choose from {', '.join([*groups, *known])}")
    names = [member for name in arguments.names or ["all"] for member in groups.get(name, [name])]
    rows, notes = [], []
    for name in dict.fromkeys(names):
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            row, note = test(known[name], arguments.folder.resolve() / name)
        except BuildError as error:
            row, note = ["-"] * (len(COLUMNS) - 1), [f"not built: {error}"]
        rows.append([name, *row])
        notes += [f"{name}: {line}" for line in note]
    print_table([list(COLUMNS), *rows])
    print("\n".join(["", *notes]) if notes else "")
    return int(bool(notes))


def environments() -> tuple[dict[str, Environment], dict[str, list[str]]]:
    """All environments by name, and the names in each group."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    ((first, end),) = re.findall(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', text, re.MULTILINE)
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    lowest = re.findall(r'^ *"([\w-]+)>=([\w.]+)', dependencies, re.MULTILINE)
    pythons = {f"python3.{minor}": Environment(f"3.{minor}", "eval,dev") for minor in range(int(first), int(end))}
    known = {
        **pythons,
        "oldest": Environment(f"3.{first}", pins=[f"{name}=={version}" for name, version in lowest]),
        "core": Environment("3.12", pins=["torch==2.11.*", "transformers==5.17.*"], without=["decord"]),
    }
    groups = {"python": list(pythons), "transformers": ["oldest", list(pythons)[-1]], "all": list(known)}
    return known, groups


def test(environment: Environment, folder: Path) -> tuple[list[str], list[str]]:
    """The row of an environment without its name, and a line for each test that fails."""
    python = folder / "bin" / "python"
    start = time.monotonic()
    build(environment, folder, python)
    built = time.monotonic()
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    selection = ["-m", "not slow and not gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    with open(folder / "tests.log", "w", encoding="utf-8") as log:
        command = [str(python), "-m", "pytest", "-q", *selection]
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        status = subprocess.run(
            command, cwd=CHECKOUT, env={**os.environ, "PATH": path}, stdout=log, stderr=log
        ).returncode
    if not report.exists():
        raise BuildError(f"pytest stopped with status {status} (its output: {folder / 'tests.log'})")
    passed, failed, skipped = count(report)
    seconds = [f"{built - start:.0f}", f"{time.monotonic() - built:.0f}"]
    versions = json.loads(subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True).stdout)
    numbers = [str(passed), str(len(failed)), str(skipped), *seconds, f"{size(folder) / 1e9:.1f}"]
    return [*versions, *numbers], failed or [f"pytest ended with status {status}"] * (status != 0)


def build(environment: Environment, folder: Path, python: Path) -> None:
    """Make the environment, unless it has been finished with the same requirements and the present pyproject.toml."""
    requirements = ["-e", f"{CHECKOUT}[{environment.extras}]", *environment.pins]
    declared = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = json.dumps([requirements, environment.without, declared])
    stamp = folder / "finished"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "install.log", "w", encoding="utf-8") as log:
        steps = [
            [find_python(environment.python), "-m", "venv", folder],
            [python, "-m", "pip", "install", *requirements],
        ]
        if environment.without:
            steps.append([python, "-m", "pip", "uninstall", "-y", *environment.without])
        for step in steps:
            if subprocess.run(step, stdout=log, stderr=log).returncode != 0:
                raise BuildError(f"pip could not install it (its output: {folder / 'install.log'})")
        # As in lib.sh: the torchvision that lmms-eval brings may be for another build of torch; nothing here needs it.
        if subprocess.run([python, "-c", "import torch, torchvision"], capture_output=True).returncode != 0:
            subprocess.run([python, "-m", "pip", "uninstall", "-y", "torchvision"], stdout=log, stderr=log, check=True)
    stamp.write_text(wanted)


def find_python(version: str) -> str:
    """The command of a Python of this version that can make environments: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]:
        if candidate and subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return str(candidate)
    raise BuildError(f"there is no Python {version} here; install it (as `python{version}` on PATH, or with pyenv)")


def count(report: Path) -> tuple[int, list[str], int]:
    """Tests passed, the names of those that failed, and tests skipped, in a report in JUnit's format."""
    passed, failed, skipped = 0, [], 0
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def size(folder: Path) -> int:
    """Bytes in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def print_table(rows: list[list[str]]) -> None:
    """Rows of equal length, the first one the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
