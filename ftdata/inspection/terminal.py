"""Terminal: views as coloured text that means the same without colour.

⟦what is trained⟧   ⟨control token⟩   ⟨stop⟩■   ↵ line break   ⇥ tab   ✂ what truncation cuts
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from ftdata.inspection.row_views import RowView, Segment, View, counted, headed, line, visible

_TRAINED, _CONTROL, _SCAFFOLD = "bold green underline", "magenta", "dim"
_ROLES = {"system": "yellow", "developer": "yellow", "user": "blue", "tool": "cyan", "assistant": "default"}
_SHORT = 300


def print_rows(console: Console, rows: Iterable[RowView]) -> None:
    """Print rows, token by token, in the colours of their roles where there are colours."""
    for row in rows:
        console.print(Text(f"── {headed(row)} ──", "bold blue"), soft_wrap=True)
        if row.why:
            console.print(Text(f"odd: {', '.join(row.why)}", "bold yellow"), soft_wrap=True)
        if row.rejected:
            console.print(Text(line(row.rejected), "red"), soft_wrap=True)
        for view in row.examples:
            text = as_text(view.segments(), plain=is_plain(console))
            console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
            if view.rest or view.cut:
                console.print(Text(_cut(view), "red"), soft_wrap=True)
            console.print(Text(counted(view), "cyan"), soft_wrap=True)
        if row.dropped:
            said = f"✂ {len(row.dropped):,} examples of {sum(row.dropped):,} tokens do not fit, and are left out"
            console.print(Text(said, "red"), soft_wrap=True)
        for lost in row.lost:
            said = f"not printed by the template: {lost.field}: {visible(_shortened(lost.text))}"
            console.print(Text(said, "yellow"), soft_wrap=True)
        if row.flags:
            console.print(Text(f"flags: {', '.join(row.flags)}", "yellow"), soft_wrap=True)


def is_plain(console: Console) -> bool:
    """Whether colours tell nothing here."""
    return console.color_system is None or console.no_color


def as_text(segments: Iterable[Segment], *, plain: bool) -> Text:
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
            shown.append(f"⟨{visible(segment.text)}⟩{'■' if segment.stop else ''}", f"{style} {_CONTROL}")
        else:
            shown.append(visible(segment.text), style)
    if inside:
        shown.append("⟧")
    return shown


def _cut(view: View) -> str:
    what = f"✂ {view.cut:,} tokens cut" if view.cut else "✂ no token stands for"
    return f"{what}: {visible(_shortened(view.rest))}" if view.rest else what


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT // 2]} … {text[-_SHORT // 2 :]}"
