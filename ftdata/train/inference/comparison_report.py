"""Report the answers of the base model and the tuned model side by side as a table, JSON or HTML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftdata.errors import count_noun, escape_unprintable
from ftdata.inspection.html_page import write_html

_TABLE_WIDTH = 120
"""Minimum number of columns of a terminal for answers side by side."""


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    """A prompt, the expected answer, the base model's answer and the tuned model's answer."""

    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores that measure how well a model answers a set of prompts.

    Attributes:
        perplexity: perplexity of all trained tokens, given the tokens before them.
        exact: share of answers that match exactly, from 0 to 1.
        bleu: SacreBLEU score, from 0 to 100.
        chrf: chrF score, from 0 to 100.
        rejected_perplexity: perplexity of the rejected answers; `None` if the data are not preference pairs.
        preferred: share of pairs in which the chosen answer is more likely than the rejected answer, from 0 to 1.
    """

    perplexity: float
    exact: float
    bleu: float
    chrf: float
    rejected_perplexity: float | None = None
    preferred: float | None = None


_PAGE = Path(__file__).with_name("comparison.html")

_SCORE_FORMATS = {
    "perplexity": ("perplexity", "{:.3f}"),
    "rejected_perplexity": ("perplexity of rejected answers", "{:.3f}"),
    "preferred": ("chosen answer more likely", "{:.1%}"),
    "exact": ("exact match", "{:.1%}"),
    "bleu": ("SacreBLEU", "{:.1f}"),
    "chrf": ("chrF", "{:.1f}"),
}


@dataclass(frozen=True)
class Comparison:
    """The answers and scores of the base model and the tuned model on the same prompts.

    Attributes:
        data_name: description of the data that the prompts come from; the key `asked` in JSON.
        base_model: name of the base model.
        tuned_model: folder of the tuned model.
        base: scores of the base model: perplexity, exact match (share), SacreBLEU and chrF (0 to 100).
        tuned: scores of the tuned model.
        rows: every prompt with its expected answer and the answers of both models.
    """

    data_name: str
    base_model: str
    tuned_model: str
    base: Scores
    tuned: Scores
    rows: tuple[ComparedAnswer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as a JSON-serializable dict."""
        values = asdict(self)
        for model in ("base", "tuned"):
            values[model] = {name: score for name, score in values[model].items() if score is not None}
        return {"asked": values.pop("data_name"), **values}

    def scores(self) -> Iterator[tuple[str, str, str]]:
        """Yield three strings per score: the title, the base model's value, and the tuned model's value."""
        for name, (title, template) in _SCORE_FORMATS.items():
            if getattr(self.base, name) is None:
                continue
            yield title, template.format(getattr(self.base, name)), template.format(getattr(self.tuned, name))

    def print(self, console: Console) -> None:
        """Print the answers of both models, then the scores of both models.

        The answers are side by side, or below each other on a terminal with fewer than 120 columns.
        """
        names, is_wide = ("prompt", "expected", "base", "tuned"), console.width >= _TABLE_WIDTH
        table = Table(*names, show_lines=True) if is_wide else Table.grid(padding=(0, 2))
        for row in self.rows:
            style = "green" if row.tuned.strip() == row.expected.strip() else "red"
            cells = ((row.prompt, ""), (row.expected, ""), (row.base, "dim"), (row.tuned, style))
            texts = [Text(escape_unprintable(text).strip("\n"), style=style) for text, style in cells]
            if is_wide:
                table.add_row(*texts)
                continue
            for name, text in zip(names, texts, strict=True):
                table.add_row(Text(name, style="bold"), text)
            table.add_row()
        console.print(table)
        scores = Table("", "base", "tuned", box=None, pad_edge=False)
        for title, *values in self.scores():
            scores.add_row(title, *values)
        console.print(
            f"{count_noun(len(self.rows), 'row')} of {escape_unprintable(self.data_name)}",
            highlight=False,
            markup=False,
        )
        console.print(scores)

    def as_html(self) -> str:
        """Return the comparison as a self-contained HTML page."""
        scores = "".join(f"<tr><th>{name}<td>{base}<td>{tuned}\n" for name, base, tuned in self.scores())
        rows = "".join(
            f"<tr><td>{_cell(row.prompt)}<td>{_cell(row.expected)}<td>{_cell(row.base)}"
            f"<td class={'right' if row.tuned.strip() == row.expected.strip() else 'other'}>{_cell(row.tuned)}\n"
            for row in self.rows
        )
        names = {"data_name": self.data_name, "base": self.base_model, "tuned": self.tuned_model}
        cells = {name: _cell(text) for name, text in names.items()}
        page = Template(_PAGE.read_text(encoding="utf-8"))
        return page.substitute(count=len(self.rows), scores=scores, rows=rows, **cells)

    def write_html(self, path: Path) -> None:
        """Write the comparison to a self-contained HTML file.

        Raises:
            UsageError: the file exists and is not an HTML page.
        """
        write_html(path, self.as_html())


def _cell(text: str) -> str:
    return escape(escape_unprintable(text))
