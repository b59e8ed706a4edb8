"""G7: one fault in a file of valid rows rejects exactly that row at its line."""

import csv
import gzip
import io
import json
import random

import pytest

from ftdata.pipeline.examples import BuiltRow, build_rows
from ftdata.pipeline.recipe import make_recipe
from ftdata.readers import resolve_sources
from ftdata.types import Reject

WORDS = [
    "hello",
    "naïve",
    "日本",
    "a\nb",
    'quo"te',
    "back\\slash",
    "007",
    "NA",
    "{[",
    "tab\t",
    "\u2028",
    "😀",
    "null",
    ",",
]


def words(dice):
    return " ".join([*dice.choices(WORDS, k=dice.randint(0, 5)), "word"])


def good_row(dice, flat):
    if flat or dice.random() < 0.3:
        return {"question": words(dice), "answer": words(dice)}
    turns = dice.randint(1, 3)
    return {"messages": [{"role": r, "content": words(dice)} for _ in range(turns) for r in ("user", "assistant")]}


def changed(row, **fields):
    if "messages" in row:
        return {"messages": [*row["messages"][:-1], {**row["messages"][-1], **fields}]}
    return {**row, "answer": fields.get("content", 3)}


# What a row can be instead of itself: a value, or the text of one.
VALUES = {
    "null content": lambda row: changed(row, content=None),
    "number content": lambda row: changed(row, content=7),
    "empty answer": lambda row: changed(row, content=" "),
    "image part": lambda row: changed(row, content=[{"type": "image"}]),
    "unknown role": lambda row: {"messages": [{"role": "moderator", "content": "x"}]},
    "no answer": lambda row: {"messages": [{"role": "user", "content": "x"}]},
    "no messages": lambda row: {"messages": []},
    "messages are text": lambda row: {"messages": ["x"]},
    "unknown shape": lambda row: {"foo": "x"},
    "two shapes": lambda row: {"question": "q", "answer": "a", "text": "t"},
    "a number": lambda row: 7,
    "a text": lambda row: "text",
    "a list of numbers": lambda row: [1, 2],
    "its own template": lambda row: {**row, "chat_template_kwargs": {"chat_template": "x"}},
}
TEXTS = {
    "key twice": lambda text: text[:-1] + ', "question": "x", "question": "y"}',
    "trailing comma": lambda text: text[:-1] + ",}",
    "single quotes": lambda text: "{'question': 'x', 'answer': 'y'}",
    "half a character": lambda text: '{"question": "\\ud800", "answer": "y"}',
    "bare word": lambda text: '{"question": x, "answer": "y"}',
    "comment": lambda text: "{/* x */" + text[1:],
    "too deep": lambda text: '{"x": ' + "[" * 300 + "]" * 300 + "}",
}
LINE_TEXTS = {
    "cut off": lambda text: text[: len(text) // 2],
    "bracket too many": lambda text: text + "}",
    "two rows": lambda text: f"{text} {text}",
    "python": lambda text: "None",
}
BYTES = {"not UTF-8": lambda text: text[:-2] + b"\xff" + text[-2:]}
CELLS = {
    "a cell too many": lambda line: line + ",more",
    "a cell too few": lambda line: '"only one"',
    "quote in quotes": lambda line: '"a "b" c","d"',
    "empty answer": lambda line: '"q"," "',
}


def json_file(dice, fault, rows, at, folder):
    """Write the rows with one fault; return the path and the line of each row."""
    array = fault not in LINE_TEXTS and dice.random() < 0.4
    ascii_only, indent = dice.random() < 0.3, 2 if array and dice.random() < 0.5 else None
    texts = [json.dumps(row, ensure_ascii=ascii_only, indent=indent) for row in rows]
    if fault in VALUES:
        texts[at] = json.dumps(VALUES[fault](rows[at]))
    elif fault in (TEXTS | LINE_TEXTS):
        texts[at] = (TEXTS | LINE_TEXTS)[fault](texts[at])
    raw = [text.encode() for text in texts]
    if fault in BYTES:
        raw[at] = BYTES[fault](raw[at])
    newline = dice.choice([b"\n", b"\r\n"])
    blank = b"" if array else newline * dice.randint(0, 2)
    lines, whole = [], b"[" + newline if array else b""
    for number, text in enumerate(raw):
        lines.append(1 + whole.count(b"\n"))
        whole += text + (b"," if array and number < len(raw) - 1 else b"") + newline + blank
    whole += b"]" if array else b""
    if fault not in BYTES and dice.random() < 0.2:
        whole = whole.decode().encode(dice.choice(["utf-16", "utf-8-sig", "utf-32"]))
    packed = dice.random() < 0.2
    path = folder / f"data.{'json' if array else 'jsonl'}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(whole, 1) if packed else whole)
    return path, lines


def csv_file(dice, fault, rows, at, folder):
    lines, whole = [], '"question","answer"\n'
    for number, row in enumerate(rows):
        out = io.StringIO()
        csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="").writerow(row.values())
        lines.append(1 + whole.count("\n"))
        whole += (CELLS[fault](out.getvalue()) if number == at else out.getvalue()) + "\n"
    path = folder / "data.csv"
    path.write_text(whole)
    return path, lines


@pytest.mark.slow
@pytest.mark.parametrize("files", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_one_invalid_row_rejects_one_row_at_its_line(tmp_path, tokenizer_dir, files):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"))
    faults = [(fault, json_file) for fault in (*VALUES, *TEXTS, *LINE_TEXTS, *BYTES)] + [(f, csv_file) for f in CELLS]
    for number in range(files):
        dice = random.Random(number)
        fault, write = faults[number % len(faults)]
        rows = [good_row(dice, write is csv_file) for _ in range(dice.randint(2, 6))]
        at = dice.randrange(len(rows))
        path, lines = write(dice, fault, rows, at, tmp_path)
        (source,) = resolve_sources(path)
        outcomes = list(build_rows(recipe, source.rows()))
        rejected = [one for one in outcomes if isinstance(one, Reject)]
        assert [one.source.line for one in rejected] == [lines[at]], (number, fault, path, rejected)
        assert len(outcomes) == len(rows), (number, fault)
        built = [one for one in outcomes if isinstance(one, BuiltRow)]
        clean = list(build_rows(recipe, next(iter(resolve_sources([r for n, r in enumerate(rows) if n != at]))).rows()))
        assert [[e.input_ids.tolist() for e in one.examples] for one in built] == [
            [e.input_ids.tolist() for e in one.examples] for one in clean
        ], (number, fault)
        path.unlink()
