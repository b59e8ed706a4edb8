"""Terminal: views as coloured text that means the same without colour.

⟦what is trained⟧   ⟨control token⟩   ⟨stop⟩■   ↵ line break   ⇥ tab   ✂ what truncation cuts
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from ftdata.inspection.row_views import (
    ExampleView,
    RowView,
    Segment,
    describe_trained_share,
    make_visible,
    row_heading,
    to_single_line,
)

_TRAINED, _CONTROL, _SCAFFOLD = "bold green underline", "magenta", "dim"
_ROLES = {"system": "yellow", "developer": "yellow", "user": "blue", "tool": "cyan", "assistant": "default"}
_SHORT = 300


def print_rows(console: Console, rows: Iterable[RowView]) -> None:
    """Print rows, token by token, in the colours of their roles where there are colours."""
    for row in rows:
        console.print(Text(f"── {row_heading(row)} ──", "bold blue"), soft_wrap=True)
        if row.why:
            console.print(Text(f"odd: {', '.join(row.why)}", "bold yellow"), soft_wrap=True)
        if row.rejected:
            console.print(Text(to_single_line(row.rejected), "red"), soft_wrap=True)
        for view in row.examples:
            text = style_segments(view.segments(), plain=has_no_colors(console))
            console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
            if view.rest or view.cut:
                console.print(Text(_cut(view), "red"), soft_wrap=True)
            console.print(Text(describe_trained_share(view), "cyan"), soft_wrap=True)
        if row.dropped:
            said = f"✂ {len(row.dropped):,} examples of {sum(row.dropped):,} tokens do not fit, and are left out"
            console.print(Text(said, "red"), soft_wrap=True)
        for lost in row.lost:
            said = f"not printed by the template: {lost.field}: {make_visible(_shortened(lost.text))}"
            console.print(Text(said, "yellow"), soft_wrap=True)
        if row.flags:
            console.print(Text(f"flags: {', '.join(row.flags)}", "yellow"), soft_wrap=True)


def has_no_colors(console: Console) -> bool:
    """Whether colours tell nothing here."""
    return console.color_system is None or console.no_color


def style_segments(segments: Iterable[Segment], *, plain: bool) -> Text:
    """Return segments as styled text; `plain` puts marks around what is trained."""
    shown, inside = Text(), False
    for segment in segments:
        if plain and segment.trained != inside:
            shown.append("⟦" if segment.trained else "⟧")
            inside = segment.trained
        style = _TRAINED if segment.trained else _ROLES.get(segment.owner.role, "default")
        if not segment.trained and not segment.data and segment.owner.part:
            style = _SCAFFOLD
        if segment.control:
            shown.append(f"⟨{make_visible(segment.text)}⟩{'■' if segment.stop else ''}", f"{style} {_CONTROL}")
        else:
            shown.append(make_visible(segment.text), style)
    if inside:
        shown.append("⟧")
    return shown


def _cut(view: ExampleView) -> str:
    what = f"✂ {view.cut:,} tokens cut" if view.cut else "✂ no token stands for"
    return f"{what}: {make_visible(_shortened(view.rest))}" if view.rest else what


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT // 2]} … {text[-_SHORT // 2 :]}"
