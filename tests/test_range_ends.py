"""scripts/test_range.py takes the ends of the range from pyproject.toml, and goes on after one that fails."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("range_script", ROOT / "scripts" / "test_range.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "range_script", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_oldest_environment_pins_every_lower_bound(script):
    known, groups = script.environments()
    dependencies = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0]
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)', dependencies)
    assert len(bounds) == len(dependencies.strip().splitlines()) > 5
    assert known["oldest"].pins == [f"{name}=={version}" for name, version in bounds]
    assert groups["python"] == ["python3.10", "python3.11", "python3.12", "python3.13"]
    assert set(groups["all"]) == set(known) >= set(groups["transformers"])


def test_one_that_fails_leaves_the_others(script, monkeypatch, capsys, tmp_path):
    def test(environment, folder):
        if environment.python == "3.10":
            raise script.BuildError("no room")
        failed = ["tests.test_a::test_b"] if environment.python == "3.11" else []
        return ["3.1", "2.7", "5.1", "9", str(len(failed)), "0", "1", "2", "0.5"], failed

    monkeypatch.setattr(script, "test", test)
    monkeypatch.setattr(sys, "argv", ["test_range.sh", "python", "--folder", str(tmp_path)])
    assert script.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["python3.10", "python3.11", "python3.12", "python3.13"]
    assert lines[6:] == ["python3.10: not built: no room", "python3.11: tests.test_a::test_b"]
    monkeypatch.setattr(sys, "argv", ["test_range.sh", "python3.12", "python3.13"])
    assert script.main() == 0


def test_a_report_is_counted(script, tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.fixture\ndef broken(): 1 / 0\ndef test_c(broken): pass\ndef test_d(): pytest.skip('no')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", "test_x.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert script.count(tmp_path / "report.xml") == (1, ["test_x::test_b", "test_x::test_c"], 1)


def test_a_finished_environment_is_used_again(script, monkeypatch, tmp_path):
    calls = []

    def run(command, **_):
        calls.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script, "find_python", lambda version: f"python{version}")
    monkeypatch.setattr(script.subprocess, "run", run)
    environment = script.Environment("3.12", pins=["torch==2.11.*"], without=["decord"])
    script.build(environment, tmp_path / "core", tmp_path / "core" / "bin" / "python")
    assert [command[1:5] for command in calls[:3]] == [
        ["-m", "venv", str(tmp_path / "core")], ["-m", "pip", "install", "-e"], ["-m", "pip", "uninstall", "-y"],
    ]  # fmt: skip
    calls.clear()
    script.build(environment, tmp_path / "core", tmp_path / "core" / "bin" / "python")
    assert calls == []
    script.build(script.Environment("3.12"), tmp_path / "core", tmp_path / "core" / "bin" / "python")
    assert calls
