"""Print views of rows to a terminal as styled text. Without colors, marks show the same information.

⟦trained tokens⟧   ⟨control token⟩   ⟨stop token⟩■   ↵ line break   ⇥ tab   ✂ truncated text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.text import Text

from ftdata.errors import count_noun
from ftdata.inspection.pair_views import describe_difference, split_pair
from ftdata.inspection.row_headings import describe_dropped, describe_trained_share, row_heading
from ftdata.inspection.row_views import ExampleView, RowView, Segment, make_visible, to_single_line
from ftdata.spelling import spell_options
from ftdata.types import Part

_TRAINED, _CONTROL, _SCAFFOLD, _IMAGE = "bold green underline", "magenta", "dim", "cyan"
_ROLES = {"system": "yellow", "developer": "yellow", "user": "blue", "tool": "cyan", "assistant": "default"}
_MAX_EXCERPT = 300


def print_rows(console: Console, rows: Iterable[RowView]) -> None:
    """Print the tokens of rows. If the console supports colors, every role has a different color."""
    for row in rows:
        console.print(Text(f"── {row_heading(row)} ──", "bold blue"), soft_wrap=True)
        if row.why:
            console.print(Text(f"outlier: {', '.join(row.why)}", "bold yellow"), soft_wrap=True)
        if row.rejected:
            console.print(Text(spell_options(to_single_line(row.rejected)), "red"), soft_wrap=True)
        _print_examples(console, row)
        if row.dropped:
            console.print(Text(spell_options(describe_dropped(row)), "red"), soft_wrap=True)
        for lost in row.lost:
            excerpt = make_visible(_shorten(lost.text))
            console.print(Text(f"not printed by the template: {lost.field}: {excerpt}", "yellow"), soft_wrap=True)
        for difference in row.drift:
            console.print(Text(f"drift: {make_visible(difference)}", "yellow"), soft_wrap=True)
        if row.flags:
            console.print(Text(f"flags: {', '.join(row.flags)}", "yellow"), soft_wrap=True)


def _print_examples(console: Console, row: RowView) -> None:
    for title, shown, view in split_pair(row):
        if title:
            console.print(Text(f"── {title} ──", "blue"), soft_wrap=True)
        text = style_segments(shown.segments(), plain=has_no_colors(console))
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
        if view is None:
            continue
        if view.remainder or view.cut:
            console.print(Text(_describe_remainder(view), "red"), soft_wrap=True)
        console.print(Text(describe_trained_share(view), "cyan"), soft_wrap=True)
    if difference := describe_difference(row):
        console.print(Text(f"first difference: {difference}", "cyan"), soft_wrap=True)


def render_plain_text(render: Callable[[Console], None]) -> str:
    """Return the text that a function prints to a console, without colors and with unlimited lines."""
    console = Console(color_system=None, width=200, soft_wrap=True, force_jupyter=False)
    with console.capture() as capture:
        render(console)
    return capture.get()


def has_no_colors(console: Console) -> bool:
    """Return whether a console prints without colors."""
    return console.color_system is None or console.no_color


def style_segments(segments: Iterable[Segment], *, plain: bool) -> Text:
    """Convert segments to styled text. If `plain` is true, marks enclose the trained tokens."""
    styled, is_inside = Text(), False
    for segment in segments:
        if plain and segment.trained != is_inside:
            styled.append("⟦" if segment.trained else "⟧")
            is_inside = segment.trained
        style = _TRAINED if segment.trained else _ROLES.get(segment.owner.role, "default")
        if not segment.trained and not segment.data and segment.owner.part:
            style = _IMAGE if segment.owner.part == Part.MEDIA else _SCAFFOLD
        if segment.control:
            # Dim text is hard to read in many themes. A control token determines the structure, so it is never dim.
            control_style = f"{style} {_CONTROL}" if segment.trained else _CONTROL
            styled.append(f"⟨{make_visible(segment.text)}⟩{'■' if segment.stop else ''}", control_style)
        else:
            styled.append(make_visible(segment.text), style)
    if is_inside:
        styled.append("⟧")
    return styled


def _describe_remainder(view: ExampleView) -> str:
    label = f"✂ {count_noun(view.cut, 'token')} cut" if view.cut else "✂ text without tokens"
    return f"{label}: {make_visible(_shorten(view.remainder)).rstrip()}" if view.remainder else label


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_EXCERPT else f"{text[: _MAX_EXCERPT // 2]} … {text[-_MAX_EXCERPT // 2 :]}"
