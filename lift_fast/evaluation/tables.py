"""Tables of figures, as Markdown and LaTeX print them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .results import Estimate


@dataclass(frozen=True)
class Column:
    """One column of a :class:`Table`."""

    title: str
    best: str = "high"
    """``"high"`` or ``"low"``: which value is printed in bold; ``""`` for none."""
    digits: int = 1


@dataclass(frozen=True)
class Table:
    """Figures by method; a cell is an :class:`Estimate`, a number, or None if it was not measured."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Estimate | float | None]]]
    sets: Sequence[int | None] | None = None
    """For each row the set of rows among which the best is printed in bold; None for a row that does not compete.
    Without it all rows are one set."""

    def markdown(self) -> str:
        """As GitHub shows it: best values bold, intervals in brackets."""
        lines = [
            f"**{self.title}**",
            "",
            "| method | " + " | ".join(_bars(column.title) for column in self.columns) + " |",
            "| --- |" + " ---: |" * len(self.columns),
        ]
        lines += ["| " + " | ".join([_bars(cells[0]), *cells[1:]]) + " |" for cells in self._cells("**{}**")]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A ``tabular`` for ``booktabs``."""
        head = " & ".join(["method", *(escape_latex(column.title) for column in self.columns)])
        cells = ([escape_latex(name), *figures] for name, *figures in self._cells(r"\textbf{{{}}}"))
        rows = [" & ".join(row) + r" \\" for row in cells]
        lines = [
            "% " + self.title.replace("\n", " "),
            r"\begin{tabular}{l" + "r" * len(self.columns) + "}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            # At the start of a row LaTeX takes these characters for an argument of the row before.
            *("{}" * row.startswith(("[", "(", "*")) + row for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def _cells(self, bold: str) -> list[list[str]]:
        sets = [0] * len(self.rows) if self.sets is None else self.sets
        numbers: dict[tuple[int | None, int], list[float]] = {}
        for (_, row), group in zip(self.rows, sets, strict=True):
            for index, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                number = _number(cell)
                if number is not None:
                    numbers.setdefault((group, index), []).append(round(number, column.digits))
        best: dict[tuple[int | None, int], float] = {}
        for (group, index), known in numbers.items():
            pick = {"high": max, "low": min}.get(self.columns[index].best)
            if group is not None and pick is not None and len(known) > 1:
                best[group, index] = pick(known)
        result = []
        for (name, row), group in zip(self.rows, sets, strict=True):
            cells = [name]
            for index, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                number = _number(cell)
                if number is None:
                    cells.append("")
                    continue
                text = f"{number:.{column.digits}f}"
                if best.get((group, index)) == round(number, column.digits):
                    text = bold.format(text)
                if isinstance(cell, Estimate) and math.isfinite(cell.low):
                    text += f" [{cell.low:.{column.digits}f}, {cell.high:.{column.digits}f}]"
                cells.append(text)
            result.append(cells)
        return result


def _number(cell: Estimate | float | None) -> float | None:
    value = cell.value if isinstance(cell, Estimate) else cell
    return None if value is None or not math.isfinite(value) else float(value)


def _bars(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(text.splitlines()).replace("|", r"\|")


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX.update({character: "\\" + character for character in "&%$#_{}"})


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return "".join(_LATEX.get(character, character) for character in text)
