"""The tables of a run: methods by ratio, and by what is asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.suite.config import Suite, label
from eval.suite.features import Asked
from eval.suite.statistics import Questions, holm, p_value
from eval.tables.bootstrap import Estimate
from llava.token_compression import CompressionConfig

Key = tuple[str, float]
"""A method's label and its ratio; ("uncompressed", 1) for the model as it is."""


def key_of(config: CompressionConfig) -> Key:
    return label(config), config.retention_ratio or 1.0


class Outcome:
    """What one model did under all settings that are finished.

    Args:
        suite: what was run.
        asked: the questions.
        cells: by setting, what `__main__` has written of it.
    """

    def __init__(self, suite: Suite, asked: Sequence[Asked], cells: Mapping[Key, Mapping[str, Any]]) -> None:
        self.suite, self.cells = suite, cells
        self.questions = Questions(asked)
        self.right = {
            key: [chosen == one.letter for chosen, one in zip(cell["chosen"], asked, strict=True)]
            for key, cell in cells.items()
        }
        self.accuracy = {key: self.questions.accuracy(right) for key, right in self.right.items()}
        self.methods = [label(config) for config in suite.compressions(0.5) if config.method != "none"]

    def differences(self) -> dict[Key, Estimate]:
        """From the reference at the same ratio, in points."""
        found = {}
        for (method, ratio), own in self.accuracy.items():
            other = self.accuracy.get((self.suite.reference, ratio))
            if own and other and method not in (self.suite.reference, "uncompressed"):
                found[method, ratio] = own.minus(other)
        return found

    def markdown(self, model: str) -> str:
        """All tables."""
        whole = self.accuracy.get(("uncompressed", 1.0))
        lines = [f"## {model}", ""]
        if whole:
            lines += [
                f"{len(self.questions.asked)} questions about {self.suite.videos} videos; uncompressed "
                f"{_figure(whole)} (a random choice: 25). Percent right, the mean over the kinds of questions.",
                "",
            ]
        lines += [*self._methods(), "", *self._differences()]
        for name, parts in self.questions.groups().items():
            lines += ["", f"### By {name}", "", *self._parts(parts)]
        return "\n".join(lines) + "\n"

    def _methods(self) -> list[str]:
        ratios = self.suite.retention_ratios
        differ = holm({key: p_value(value) for key, value in self.differences().items()})
        rows = [_row("method", *(f"{100 * ratio:g} %" for ratio in ratios), "ms")]
        rows.append("| --- |" + " --: |" * (len(ratios) + 1))
        order = sorted(self.methods, key=lambda method: -self._mean(method))
        for method in order:
            cells = []
            for ratio in ratios:
                own = self.accuracy.get((method, ratio))
                mark = ""
                if (method, ratio) in differ:
                    mark = " +" if self.differences()[method, ratio].value > 0 else " -"
                cells.append(f"{own.value:.1f}{mark}" if own else "")
            times = [cell["milliseconds"] for (name, _), cell in self.cells.items() if name == method]
            rows.append(_row(method, *cells, f"{sum(times) / len(times):.1f}" if times else ""))
        note = (
            f"Methods by their mean. `+`, `-`: better, worse than {self.suite.reference} at the same ratio, paired "
            "by video (95 % for the table as a whole, Holm). ms: mean time of `compress` for one video."
        )
        halves = [(e.interval[1] - e.interval[0]) / 2 for key, e in self.accuracy.items() if e and key[1] < 1]
        if halves:
            note += f" A single figure is known to within {min(halves):.1f} to {max(halves):.1f} points (95 %)."
        return [*rows, "", note]

    def _mean(self, method: str) -> float:
        values = [own.value for ratio in self.suite.retention_ratios if (own := self.accuracy.get((method, ratio)))]
        return sum(values) / len(values) if values else 0.0

    def _differences(self) -> list[str]:
        found = self.differences()
        if not found:
            return []
        ratios = self.suite.retention_ratios
        rows = [f"### Against {self.suite.reference}, points with 95 % intervals", ""]
        rows += [_row("method", *(f"{100 * ratio:g} %" for ratio in ratios)), "| --- |" + " --: |" * len(ratios)]
        for method in sorted({name for name, _ in found}, key=lambda method: -self._mean(method)):
            cells = [found.get((method, ratio)) for ratio in ratios]
            rows.append(_row(method, *(_signed(value) if value else "" for value in cells)))
        return rows

    def _parts(self, parts: Mapping[str, Any]) -> list[str]:
        """A table for the ratio in the middle, and how the reference falls with the ratio."""
        asked = {name: sum(map(chosen, self.questions.asked)) for name, chosen in parts.items()}
        names = [name for name in parts if asked[name]]
        rows = [_row("setting", *names), "| --- |" + " --: |" * len(names)]
        rows.append(_row("questions", *(str(asked[name]) for name in names)))
        middle = self.suite.retention_ratios[len(self.suite.retention_ratios) // 2]
        keys = [("uncompressed", 1.0), *((self.suite.reference, ratio) for ratio in self.suite.retention_ratios)]
        others = sorted(self.methods, key=lambda method: -self._mean(method))
        keys += [(method, middle) for method in others if method != self.suite.reference]
        for key in keys:
            if key in self.right:
                figures = [self.questions.accuracy(self.right[key], parts[name]) for name in names]
                setting = key[0] if key[1] == 1 else f"{key[0]} {100 * key[1]:g} %"
                rows.append(_row(setting, *(f"{own.value:.1f}" if own else "" for own in figures)))
        return rows


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(own: Estimate) -> str:
    return f"{own.value:.1f} % ({own.interval[0]:.1f} to {own.interval[1]:.1f})"


def _signed(difference: Estimate) -> str:
    low, high = difference.interval
    return f"{difference.value:+.1f} ({low:+.1f} to {high:+.1f})"
