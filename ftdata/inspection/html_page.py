"""Page: views as one HTML file that needs nothing else: no network, no server, no library.

The rows stand in it as JSON and are drawn by a script, all other text is escaped where it is written; a policy in the
file allows its own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata._version import __version__
from ftdata.errors import UsageError, escape_unprintable
from ftdata.inspection.row_views import (
    ExampleView,
    RowView,
    Segment,
    SegmentOwner,
    describe_trained_share,
    make_visible,
    row_heading,
    to_single_line,
)
from ftdata.storage import disk
from ftdata.storage.atomic import replace_file
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.types import Reject

_ASSETS = Path(__file__).parent / "assets"
MOST_PACKS = 200
"""Packs that are drawn."""


@dataclass(frozen=True)
class PackLayout:
    """How documents share packs: of each pack the lengths of its documents, and where they came from.

    `fill` is the share of `count * size` tokens that are there; `documents` are those of the first packs.
    """

    size: int
    count: int
    fill: float
    documents: Sequence[Sequence[tuple[int, str, str]]] = ()


@dataclass(frozen=True)
class HtmlPage:
    """What a page shows.

    Attributes:
        title: of what.
        rows: the rows that are shown token by token.
        tokenizer: says how the tokens are spelled in its vocabulary; `None`: there are no tokens.
        said: which rows these are.
        totals: what was counted, as name and number.
        warnings: what a careful reader should know.
        picture: an SVG of the lengths, and what it says.
        packs: how documents share packs.
        rejects: rows that were rejected, and how many there are by code.
        options: how it was made.
        titles: where rows are shown side by side, what each example of each row is.
        changed: of each example of each row, the tokens that differ from the other side (bool `[n]`).
    """

    title: str
    rows: Sequence[RowView]
    tokenizer: Tokenizer | None = None
    said: str = ""
    totals: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    picture: tuple[str, str] | None = None
    packs: PackLayout | None = None
    rejects: tuple[Mapping[str, int], Sequence[Reject]] = field(default_factory=lambda: ({}, ()))
    options: Mapping[str, Any] = field(default_factory=dict)
    titles: Sequence[Sequence[str]] = ()
    changed: Sequence[Sequence[NDArray[np.bool_]]] = ()


_BEGIN = b"<!doctype html>"


def write_page(path: str | Path, page: HtmlPage) -> None:
    """Write the page, as `write_html` does."""
    write_html(path, render_html(page))


def write_html(path: str | Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        UsageError: there is something else.
        StorageError: the disk refuses.
    """
    if not _is_page(Path(path)):
        found = f"{path} exists and is no page of ftdata"
        raise UsageError("target_exists", found, hint="choose another name: data is not written over")
    with replace_file(Path(path).resolve()) as file:
        disk.write(file, text.encode())


def _is_page(path: Path) -> bool:
    """Whether there is nothing that must not be written over."""
    if not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(len(_BEGIN)).lower() == _BEGIN


def render_html(page: HtmlPage) -> str:
    """Return the page as HTML."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    sections = dict[str, str]()
    if page.picture:
        sections["lengths"] = f'<section id="lengths"><h2>Lengths</h2>{_lengths(*page.picture)}</section>'
    if page.packs:
        sections["packs"] = _folded("packs", *_packs(page.packs))
    if page.rejects[0]:
        sections["rejected"] = _folded("rejected", *_rejected(*page.rejects))
    if page.options:
        sections["options"] = _folded("options", "how this was made", _options(page.options))
    parts = {
        "policy": escape(policy, quote=True).replace("&#x27;", "'"),
        "title": _text(page.title),
        "sections": "".join(f'<a href="#{key}">{key.capitalize()}</a>' for key in [*sections, "rows"]),
        "body": _summary(page) + "".join(sections.values()),
        "made": f"ftdata {escape(__version__)}",
        "style": style,
        "script": script,
        "data": _json(_data(page)),
    }
    whole = _asset("page.html").split("@")
    # Between every two signs stands a name; what is put in is not looked at again.
    return "".join(parts[part] if number % 2 else part for number, part in enumerate(whole))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it closes or opens one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    # Half a character, which UTF-8 does not have, is spelled out.
    return text.encode("utf-8", "backslashreplace").decode()


# --- the rows, as the script reads them


def _data(page: HtmlPage) -> dict[str, Any]:
    owners: dict[SegmentOwner, int] = {}
    rows = []
    for number, row in enumerate(page.rows):
        changed = page.changed[number] if page.changed else [None] * len(row.examples)
        examples = [_example(one, owners, marks) for one, marks in zip(row.examples, changed, strict=True)]
        rows.append(
            {
                "row": row.source.row,
                "place": str(row.source),
                "href": _href(row),
                "key": f"{row.source.path}\0{row.source.row}\0{'' if row.number is None else row.number}",
                "name": f"row {row.source.row}" if row.number is None else f"example {row.number}",
                "dropped": list(row.dropped),
                "schema": row.schema,
                "why": row.why,
                "flags": row.flags,
                "kinds": [
                    *dict.fromkeys([*row.why, *row.flags, *(["rejected"] if row.rejected and not page.titles else [])])
                ],
                "lost": [lost._asdict() for lost in row.lost],
                "rejected": row.rejected,
                "pack": row.pack,
                "titles": page.titles[number] if page.titles else None,
                "examples": examples,
            }
        )
    packs = page.packs and {"size": page.packs.size, "shown": page.packs.documents}
    return {"said": page.said, "owners": list(owners), "pieces": _pieces(page), "rows": rows, "packs": packs}


def _example(view: ExampleView, owners: dict[SegmentOwner, int], changed: NDArray[np.bool_] | None) -> dict[str, Any]:
    numbers = np.asarray([owners.setdefault(one, len(owners)) for one in view.owners], np.int64)
    return {
        "text": view.text,
        "sizes": _sizes(view),
        "ids": None if view.ids is None else view.ids.tolist(),
        "trained": _runs(view.trained),
        "control": _runs(view.control),
        "stop": _runs(view.stop),
        "owner": _runs(numbers[view.owner]) if len(view) else [],
        "cut": view.cut,
        "rest": view.rest[:2000],
        **({} if changed is None else {"changed": _runs(changed)}),
    }


def _sizes(view: ExampleView) -> list[int]:
    """Return how long the text of each token is, in the units of UTF-16, in which scripts count."""
    wide = np.frombuffer(view.text.encode("utf-32-le", "surrogatepass"), np.uint32) > 0xFFFF
    before = np.append(0, np.cumsum(1 + wide.astype(np.int64)))
    return list(np.diff(before[view.ends], prepend=0).tolist())


def _runs(values: NDArray[Any]) -> list[int]:
    """Return values as value and length, value and length, ..."""
    starts = np.flatnonzero(np.diff(values.astype(np.int64), prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return list(np.stack((values[starts].astype(np.int64), lengths), axis=1).ravel().tolist())


def _pieces(page: HtmlPage) -> dict[int, str]:
    """Return how the vocabulary spells each token that is shown."""
    if page.tokenizer is None:
        return {}
    ids = [one.ids for row in page.rows for one in row.examples if one.ids is not None]
    return {one: page.tokenizer.piece(one) for one in np.unique(np.concatenate([*ids, []])).astype(np.int64).tolist()}


def _href(row: RowView) -> str | None:
    path = row.source.path
    if path.startswith(("https://", "http://")):
        return path
    try:
        return f"{Path(path).resolve().as_uri()}#L{row.source.line or 1}" if Path(path).is_file() else None
    except (OSError, ValueError):
        return None


# --- the rest, which needs no script


def _text(text: str) -> str:
    return escape(escape_unprintable(text))


def _folded(key: str, says: str, body: str) -> str:
    summary = f"<summary><h2>{key.capitalize()}</h2> {says}</summary>"
    box = f'<div class="box" tabindex="0" role="region" aria-label="{key}">{body}</div>'
    return f'<details id="{key}">{summary}{box}</details>'


def _summary(page: HtmlPage) -> str:
    cards = "".join(f"<li><b>{_text(value)}</b><span>{_text(name)}</span></li>" for name, value in page.totals.items())
    notes = "".join(f"<li>{_text(note)}</li>" for note in page.warnings)
    return (f'<ul class="cards">{cards}</ul>' if cards else "") + (f"<ul>{notes}</ul>" if notes else "")


def _lengths(svg: str, says: str) -> str:
    return f"{svg}<p>{escape(says)}</p>"


def _packs(packs: PackLayout) -> tuple[str, str]:
    shown = len(packs.documents)
    more = f"; the first {shown:,} are drawn" if shown < packs.count else ""
    says = f"{packs.count:,} packs of {packs.size:,} tokens, {packs.fill:.2%} full{more}"
    return says, '<p>Documents that are shown below are green.</p><div id="packs-shown"></div>'


def _rejected(codes: Mapping[str, int], rejects: Sequence[Reject]) -> tuple[str, str]:
    total = sum(codes.values())
    listed = ", ".join(f"{count:,} {_text(code)}" for code, count in codes.items())
    rows = "".join(
        f"<tr><td>{_place(one)}</td><td><code>{_text(one.code)}</code></td><td>{_text(one.field)}</td>"
        f"<td>{_text(one.reason)}</td><td>{_text(one.fix)}</td></tr>"
        for one in rejects
    )
    more = f"<p>The first {len(rejects):,} of them:</p>" if len(rejects) < total else ""
    head = "".join(f"<th>{name}</th>" for name in ("where", "code", "field", "why", "way out"))
    return f"{total:,} rows: {listed}", f"{more}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _place(reject: Reject) -> str:
    href = _href(RowView(reject.source))
    said = _text(str(reject.source))
    return f'<a href="{escape(href, quote=True)}">{said}</a>' if href else said


def flatten_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as names and values; those that are objects by the names of what is in them."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        inner = value if isinstance(value, Mapping) else None
        found.update({f"{name}.{key}": part for key, part in inner.items()} if inner else {name: value})
    return found


def _options(options: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td><code>{_text(value if isinstance(value, str) else json.dumps(value))}</code>"
        "</td></tr>"
        for name, value in options.items()
    )
    return f"<table>{rows}</table>"


# --- notebooks

_FRAGMENT = (
    "font-family:ui-monospace,monospace;font-size:13px;line-height:1.6;white-space:pre-wrap;"
    "overflow-wrap:anywhere;border-left:3px solid #8885;padding-left:.7em;margin:.3em 0"
)
_MARKED = "background:#2da44e33;text-decoration:underline #2da44e"
_CONTROL = "border:1px solid #bf398988;border-radius:4px;padding:0 2px"


def render_fragment(title: str, rows: Sequence[RowView], notes: Sequence[str] = ()) -> str:
    """Return rows as HTML without a script, for a notebook: what is trained is green and underlined."""
    parts = [
        f"<p><b>{_text(to_single_line(title))}</b></p>",
        *(f"<p>note: {_text(to_single_line(note))}</p>" for note in notes),
    ]
    for row in rows:
        odd = f" · odd: {', '.join(row.why)}" if row.why else ""
        parts.append(f"<p>{_text(row_heading(row) + odd)}</p>")
        if row.rejected:
            parts.append(f'<p style="color:#cf222e">{_text(to_single_line(row.rejected))}</p>')
        for one in row.examples:
            cut = f" · ✂ {one.cut:,} tokens cut" if one.cut else ""
            parts.append(
                f'<pre style="{_FRAGMENT}">{"".join(_stretches(one))}</pre><p>{describe_trained_share(one)}{cut}</p>'
            )
        if row.dropped:
            parts.append(f"<p>✂ {len(row.dropped):,} examples of {sum(row.dropped):,} tokens are left out</p>")
        lost = (f"not printed by the template: {one.field}: {make_visible(one.text)}" for one in row.lost)
        flags = [f"flags: {', '.join(row.flags)}"] if row.flags else []
        parts += [f'<p style="color:#9a6700">{_text(said)}</p>' for said in (*lost, *flags)]
    return f"<div>{''.join(parts)}</div>"


def _stretches(view: ExampleView) -> Iterable[str]:
    for trained, segments in groupby(view.segments(), key=lambda segment: segment.trained):
        text = "".join(_segment(one) for one in segments)
        yield f'<mark style="color:inherit;{_MARKED}">{text}</mark>' if trained else text
    if view.rest:
        yield f'<s style="color:#cf222e">✂{_text(make_visible(view.rest))}</s>'


def _segment(segment: Segment) -> str:
    owner = segment.owner
    says = f"{owner.role}, messages[{owner.message}]" if owner.role else owner.part
    style = f' style="{_CONTROL}"' if segment.control else ""
    return f'<bdi title="{escape(says, quote=True)}"{style}>{escape(make_visible(segment.text))}</bdi>'
