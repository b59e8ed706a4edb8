"""Write rows to a self-contained HTML page that needs no network, server or library.

The page contains the rows as JSON, which its script renders. All other text is escaped when it is written. The content
security policy of the page allows only its own script and style, by their hashes.
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
from ftdata.errors import UsageError, count_noun, escape_unprintable
from ftdata.inspection.image_captions import make_thumbnail
from ftdata.inspection.pair_views import find_differing_token, split_pair
from ftdata.inspection.row_headings import describe_dropped, describe_trained_share, row_heading, row_name
from ftdata.inspection.row_views import (
    ExampleView,
    Heading,
    RowView,
    Segment,
    SegmentOwner,
    make_visible,
    to_single_line,
)
from ftdata.inspection.summary import Summary
from ftdata.inspection.survey import KINDS
from ftdata.pipeline.flags import FLAGS
from ftdata.spelling import spell_options
from ftdata.storage import disk
from ftdata.storage.atomic import replace_file
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.types import SIDES, Reject

_ASSETS = Path(__file__).parent / "assets"
MOST_PACKS = 200
"""The maximum number of packed sequences that are drawn."""


_MAX_THUMBNAILS = 8
"""Maximum number of thumbnails of an example."""


@dataclass(frozen=True)
class PackLayout:
    """The packed sequences that are drawn on an HTML page: their size, their number, and the documents in them.

    Attributes:
        size: The length of a packed sequence in tokens.
        count: The number of packed sequences.
        fill: The number of tokens, as a share of `count * size`.
        documents: The documents of the first packed sequences: length in tokens, source, and key of the row.
    """

    size: int
    count: int
    fill: float
    documents: Sequence[Sequence[tuple[int, str, str]]] = ()


@dataclass(frozen=True)
class HtmlPage:
    """The content of an HTML page: rows, totals, notes, charts and options.

    Attributes:
        heading: The heading.
        rows: The rows, which are shown token by token.
        tokenizer: The tokenizer, for the vocabulary entries of tokens; `None` without tokens.
        status: A note on the selection of the rows.
        summary: The problems of the data; `None` if the page contains only selected rows.
        totals: Name -> formatted number.
        notes: Notes that apply to all rows.
        picture: An SVG histogram of lengths, and its description.
        packs: The packed sequences.
        rejects: The number of rejected rows by code, and the first rejects.
        options: The options that the data was made with.
        kind_counts: The number of rows of the data with each flag, and of each kind of outlier.
        captions: For rows side by side: the caption of each example of each row.
        changed: For rows side by side: for each example of each row, whether each token differs (bool `[n]`).
    """

    heading: Heading
    rows: Sequence[RowView]
    tokenizer: Tokenizer | None = None
    status: str = ""
    summary: Summary | None = None
    totals: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    picture: tuple[str, str] | None = None
    packs: PackLayout | None = None
    rejects: tuple[Mapping[str, int], Sequence[Reject]] = field(default_factory=lambda: ({}, ()))
    options: Mapping[str, Any] = field(default_factory=dict)
    kind_counts: Mapping[str, int] = field(default_factory=dict)
    captions: Sequence[Sequence[str]] = ()
    changed: Sequence[Sequence[NDArray[np.bool_]]] = ()


_DOCTYPE = b"<!doctype html>"


def write_page(path: str | Path, page: HtmlPage) -> None:
    """Render an HTML page and write it to a file."""
    write_html(path, render_html(page))


def write_html(path: str | Path, text: str) -> None:
    """Write an HTML page to a file atomically.

    Raises:
        UsageError: The file exists and is not an HTML page.
        StorageError: The file cannot be written.
    """
    if not _can_overwrite(Path(path)):
        problem = f"{path} exists and is not an HTML page of ftdata"
        raise UsageError("target_exists", problem, hint="choose a different file name")
    with replace_file(Path(path).resolve()) as file:
        disk.write(file, text.encode())


def _can_overwrite(path: Path) -> bool:
    """Return whether a page can be written to a path: no file exists there, or the existing file is an HTML page."""
    if not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(len(_DOCTYPE)).lower() == _DOCTYPE


def render_html(page: HtmlPage) -> str:
    """Render a page as HTML text."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    if any(view.images for row in page.rows for view in row.examples):
        policy += "; img-src data:"
    sections = dict[str, str]()
    if page.picture:
        svg, description = page.picture
        sections["lengths"] = f'<section id="lengths"><h2>Lengths</h2>{svg}<p>{escape(description)}</p></section>'
    if page.packs:
        sections["packs"] = _collapsible("packs", *_describe_packs(page.packs))
    if page.rejects[0]:
        sections["rejected"] = _collapsible("rejected", *_describe_rejects(*page.rejects))
    if page.options:
        sections["options"] = _collapsible(
            "options", "with different values" if page.captions else "of this report", _options_table(page.options)
        )
    parts = {
        "policy": escape(policy, quote=True).replace("&#x27;", "'"),
        "title": _escape(page.heading.name),
        "facts": _render_facts(page.heading.facts),
        "sections": "".join(f'<a href="#{key}">{key.capitalize()}</a>' for key in [*sections, "rows"]),
        "body": _render_summary(page) + "".join(sections.values()),
        "made": f"ftdata {escape(__version__)}",
        "style": style,
        "script": script,
        "data": _json(_data(page)),
    }
    pieces = _asset("page.html").split("@")
    # Every second piece is the name of a part. Inserted parts are not searched for names again.
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """Serialize a value as JSON that is safe inside an HTML `<script>` element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    # UTF-8 cannot encode lone surrogates, so they are escaped.
    return text.encode("utf-8", "backslashreplace").decode()


# --- the rows, as JSON for the script


def _data(page: HtmlPage) -> dict[str, Any]:
    owners: dict[SegmentOwner, int] = {}
    rows = []
    for number, row in enumerate(page.rows):
        changed = page.changed[number] if page.changed else _mark_first_difference(row)
        examples = [_example(view, owners, marks) for view, marks in zip(row.examples, changed, strict=True)]
        rows.append(
            {
                **row.describe(),
                "href": _href(row),
                "key": f"{row.source.path}\0{row.source.row}\0{'' if row.number is None else row.number}",
                "name": row_name(row),
                "kinds": [
                    *dict.fromkeys(
                        [*row.why, *row.flags, *(["rejected"] if row.rejected and not page.captions else [])]
                    )
                ],
                "captions": page.captions[number] if page.captions else SIDES if _is_pair(row) else None,
                "examples": examples,
            }
        )
    packs = page.packs and {"size": page.packs.size, "shown": page.packs.documents}
    return {
        "status": page.status,
        "owners": list(owners),
        "pieces": _pieces(page),
        "kinds": {kind: [page.kind_counts.get(kind), _describe_kind(kind)] for row in rows for kind in row["kinds"]},
        "rows": rows,
        "packs": packs,
    }


def _is_pair(row: RowView) -> bool:
    return find_differing_token(row) is not None


def _mark_first_difference(row: RowView) -> list[NDArray[np.bool_] | None]:
    """Return a mask of the first token in which the sides of a preference pair differ, for each side."""
    first = find_differing_token(row)
    return [None if first is None else np.arange(len(view)) == first for view in row.examples]


def _describe_kind(kind: str) -> str:
    """Return an explanation of a flag or a kind of outlier; an empty string if there is none."""
    if kind in FLAGS:
        return FLAGS[kind].sentence
    return KINDS.get(kind.partition(":")[0], "")


def _example(view: ExampleView, owners: dict[SegmentOwner, int], changed: NDArray[np.bool_] | None) -> dict[str, Any]:
    numbers = np.asarray([owners.setdefault(owner, len(owners)) for owner in view.owners], np.int64)
    return {
        "text": view.text,
        "sizes": _sizes(view),
        "ids": None if view.ids is None else view.ids.tolist(),
        "trained": _runs(view.trained),
        "control": _runs(view.control),
        "stop": _runs(view.stop),
        "owner": _runs(numbers[view.owner]) if len(view) else [],
        "cut": view.cut,
        "rest": view.remainder[:2000],
        **({} if changed is None else {"changed": _runs(changed)}),
        **({"images": _thumbnails(view)} if view.images else {}),
    }


def _thumbnails(view: ExampleView) -> dict[int, str]:
    """Return the thumbnails of the first images as data URIs, by the number of their first token."""
    thumbnails = {token: make_thumbnail(image) for token, image in sorted(view.images.items())[:_MAX_THUMBNAILS]}
    return {token: uri for token, uri in thumbnails.items() if uri}


def _sizes(view: ExampleView) -> list[int]:
    """Return the text length of each token in UTF-16 code units, which JavaScript strings use."""
    is_wide = np.frombuffer(view.text.encode("utf-32-le", "surrogatepass"), np.uint32) > 0xFFFF
    offsets = np.append(0, np.cumsum(1 + is_wide.astype(np.int64)))
    return list(np.diff(offsets[view.ends], prepend=0).tolist())


def _runs(values: NDArray[Any]) -> list[int]:
    """Run-length encode an array as `[value, length, value, length, ...]`."""
    starts = np.flatnonzero(np.diff(values.astype(np.int64), prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return list(np.stack((values[starts].astype(np.int64), lengths), axis=1).ravel().tolist())


def _pieces(page: HtmlPage) -> dict[int, str]:
    """Return a dictionary from the id of each token on the page to the string of the token in the vocabulary."""
    if page.tokenizer is None:
        return {}
    ids = [view.ids for row in page.rows for view in row.examples if view.ids is not None]
    unique_ids = np.unique(np.concatenate([*ids, []])).astype(np.int64).tolist()
    return {token_id: page.tokenizer.id_to_token(token_id) for token_id in unique_ids}


def _href(row: RowView) -> str | None:
    path = row.source.path
    if path.startswith(("https://", "http://")):
        return path
    try:
        return f"{Path(path).resolve().as_uri()}#L{row.source.line or 1}" if Path(path).is_file() else None
    except (OSError, ValueError):
        return None


# --- the static sections


def _escape(text: str) -> str:
    return escape(escape_unprintable(text))


def _collapsible(key: str, summary: str, body: str) -> str:
    heading = f"<summary><h2>{key.capitalize()}</h2> {summary}</summary>"
    box = f'<div class="box" tabindex="0" role="region" aria-label="{key}">{body}</div>'
    return f'<details id="{key}">{heading}{box}</details>'


def _render_facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _render_summary(page: HtmlPage) -> str:
    parts = []
    if page.summary:
        parts.append(f'<h2>Summary</h2><p class="verdict">{_escape(page.summary.verdict)}</p>')
        problems = "".join(
            f'<li><b class="{problem.severity}">{problem.severity}</b> {_escape(problem.description)}. '
            f"<span><b>Fix:</b> {_escape(spell_options(problem.fix))}</span></li>"
            for problem in page.summary.problems
        )
        parts.append(f'<ul class="problems">{problems}</ul>' if problems else "")
        correct = "; ".join(page.summary.confirmed)
        parts.append(f'<p><b class="correct">correct</b> {_escape(correct)}</p>' if correct else "")
        parts.append("<p>To check for duplicates, leakage and more, run <code>ftdata audit</code>.</p>")
    cards = "".join(
        f"<li><b>{_escape(value)}</b><span>{_escape(name)}</span></li>" for name, value in page.totals.items()
    )
    notes = "".join(f"<li>{_escape(spell_options(note))}</li>" for note in page.notes)
    parts += [f'<ul class="cards">{cards}</ul>' if cards else "", f"<ul>{notes}</ul>" if notes else ""]
    return f'<section id="summary" aria-label="Summary">{"".join(parts)}</section>'


def _describe_packs(packs: PackLayout) -> tuple[str, str]:
    drawn = len(packs.documents)
    limit = f"; the first {drawn:,} are drawn" if drawn < packs.count else ""
    summary = f"{packs.count:,} packs of {packs.size:,} tokens, {packs.fill:.2%} full{limit}"
    hint = "Green documents are on this page. Click a document to go to its row."
    return summary, f'<p>{hint}</p><div id="packs-shown"></div>'


def _describe_rejects(codes: Mapping[str, int], rejects: Sequence[Reject]) -> tuple[str, str]:
    total = sum(codes.values())
    counts = ", ".join(f"{count:,} {_escape(code)}" for code, count in codes.items())
    rows = "".join(
        f"<tr><td>{_source_link(reject)}</td><td><code>{_escape(reject.code)}</code></td>"
        f"<td>{_escape(reject.field)}</td><td>{_escape(reject.reason)}</td><td>{_escape(reject.fix)}</td></tr>"
        for reject in rejects
    )
    limit = f"<p>The first {len(rejects):,} rejected rows:</p>" if len(rejects) < total else ""
    head = "".join(f"<th>{name}</th>" for name in ("source", "code", "field", "reason", "fix"))
    return (
        f"{count_noun(total, 'row')}: {counts}",
        f"{limit}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
    )


def _source_link(reject: Reject) -> str:
    href = _href(RowView(reject.source))
    text = _escape(str(reject.source))
    return f'<a href="{escape(href, quote=True)}">{text}</a>' if href else text


def flatten_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested options to one level with dotted names, such as `template.name`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = value if isinstance(value, Mapping) else None
        flat.update({f"{name}.{key}": item for key, item in nested.items()} if nested else {name: value})
    return flat


def _options_table(options: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_escape(name)}</th>"
        f"<td><code>{_escape(value if isinstance(value, str) else json.dumps(value))}</code></td></tr>"
        for name, value in options.items()
    )
    return f"<table>{rows}</table>"


# --- notebooks

_FRAGMENT = (
    "font-family:ui-monospace,monospace;font-size:13px;line-height:1.6;white-space:pre-wrap;"
    "overflow-wrap:anywhere;border-left:3px solid #8885;padding-left:.7em;margin:.3em 0"
)
_TRAINED = "background:#2da44e33;text-decoration:underline #2da44e"
_CONTROL = "border:1px solid #bf398988;border-radius:4px;padding:0 2px"


def render_fragment(title: str, rows: Sequence[RowView], notes: Sequence[str] = ()) -> str:
    """Render rows as HTML without a script, for notebooks.

    Trained tokens are green and underlined.
    """
    parts = [
        f"<p><b>{_escape(to_single_line(title))}</b></p>",
        *(f"<p>note: {_escape(to_single_line(note))}</p>" for note in notes),
    ]
    for row in rows:
        kinds = f" · outlier: {', '.join(row.why)}" if row.why else ""
        parts.append(f"<p>{_escape(row_heading(row) + kinds)}</p>")
        if row.rejected:
            parts.append(f'<p style="color:#cf222e">{_escape(to_single_line(row.rejected))}</p>')
        for heading, shown, view in split_pair(row):
            parts.append(f"<p>{heading}</p>" if heading else "")
            parts.append(f'<pre style="{_FRAGMENT}">{"".join(_render_segments(shown))}</pre>')
            if view is not None:
                cut = f" · ✂ {count_noun(view.cut, 'token')} cut" if view.cut else ""
                parts.append(f"<p>{describe_trained_share(view)}{cut}</p>")
        if row.dropped:
            parts.append(f"<p>{describe_dropped(row)}</p>")
        lost = (f"not printed by the template: {text.field}: {make_visible(text.text)}" for text in row.lost)
        drift = (f"drift: {make_visible(difference)}" for difference in row.drift)
        flags = [f"flags: {', '.join(row.flags)}"] if row.flags else []
        parts += [f'<p style="color:#9a6700">{_escape(note)}</p>' for note in (*lost, *drift, *flags)]
    return f"<div>{''.join(parts)}</div>"


def _render_segments(view: ExampleView) -> Iterable[str]:
    for trained, segments in groupby(view.segments(), key=lambda segment: segment.trained):
        text = "".join(_render_segment(segment) for segment in segments)
        yield f'<mark style="color:inherit;{_TRAINED}">{text}</mark>' if trained else text
    if view.remainder:
        yield f'<s style="color:#cf222e">✂{_escape(make_visible(view.remainder))}</s>'


def _render_segment(segment: Segment) -> str:
    owner = segment.owner
    title = f"{owner.role}, messages[{owner.message}]" if owner.role else owner.part
    style = f' style="{_CONTROL}"' if segment.control else ""
    return f'<bdi title="{escape(title, quote=True)}"{style}>{escape(make_visible(segment.text))}</bdi>'
