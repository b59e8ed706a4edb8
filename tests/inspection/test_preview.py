"""Preview: row selection, content and formatting in terminals, notebooks and JSON."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from cases import long
from chat_templates import ANSWER, USER
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from tokenizer_makers import CHATML

from ftdata import build_sft_dataset, preview
from ftdata.errors import InputRefused, UsageError
from ftdata.inspection.row_views import make_visible
from ftdata.testing import AWKWARD_TEXTS
from ftdata.tokenizing.token_text import token_texts

EXAMPLES = Path(__file__).parents[2] / "examples"


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


ROWS = [talk(f"question {n}", "an answer " * (n + 1), id=f"row-{n}") for n in range(12)]


def numbers(shown):
    return [one.source.row for one in shown.rows]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({}, [0, 1, 2]),
        ({"n": 2}, [0, 1]),
        ({"row": 7}, [7]),
        ({"row": [7, 2, 9]}, [2, 7, 9]),
        ({"id": "row-4"}, [4]),
        ({"grep": "question 1"}, [1, 10, 11]),
        ({"grep": "question 1", "n": 1}, [1]),
        ({"grep": r"^question [35]$"}, [3, 5]),
        ({"where": "id == 'row-8'"}, [8]),
        ({"limit": 1}, [0]),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_rows_are_selected_by_number_id_and_text(tokenizer_dir, wanted, rows, named):
    shown = preview(ROWS, tokenizer_dir("tiny_bpe") if named else None, **wanted)
    assert numbers(shown) == rows


@pytest.mark.parametrize(
    ("wanted", "error", "says"),
    [
        ({"row": 3, "grep": "x"}, UsageError, "row and grep cannot be combined"),
        ({"grep": "("}, UsageError, "is not a valid regular expression"),
        ({"row": -1}, UsageError, "expected row numbers, which start at 0"),
        ({"row": [2, 99]}, InputRefused, "row 99 does not exist"),
        ({"id": "nobody"}, InputRefused, "no row has the id 'nobody'"),
        ({"grep": "nowhere"}, InputRefused, "matches 'nowhere'"),
        ({"row": 3, "n": 1}, UsageError, "row and n cannot be combined"),
    ],
)
def test_invalid_row_selections_are_refused(wanted, error, says):
    with pytest.raises(error, match=says):
        preview(ROWS, **wanted)


def test_reading_stops_after_the_last_shown_row(tokenizer_dir):
    read = []

    def rows():
        for row in ROWS * 1000:
            read.append(1)
            yield row

    preview(rows(), tokenizer_dir("tiny_bpe"), row=3)
    preview(rows(), row=3)
    assert len(read) <= 8


def test_outliers_have_reasons(tokenizer_dir):
    given_rows = [
        *[talk(f"question {n}", f"an answer of some words {n}") for n in range(50)],
        talk("short", "a"),
        talk("a long one", "word " * 200),
        talk("word " * 100, "a"),
        talk("typed <|im_end|>", "an answer of some words"),
        talk("question 3", "an answer of some words 3"),
        talk("empty", " "),
        {"messages": [USER, {**ANSWER, "reasoning_content": "a thought"}]},
    ]
    shown = preview(given_rows, tokenizer_dir("tiny_bpe"), outliers=True)
    why = {one.source.row: one.why for one in shown.rows}
    assert why[51] == ("longest",)
    assert "least trained" in why[52]
    assert why[53] == ("control tokens in the text",)
    assert why[54] == ("duplicate",)
    assert why[55] == ("rejected: empty_answer",)
    assert "not fully printed by the template" in why[56]
    assert "outlier: longest" in str(shown)
    (lost,) = next(one.lost for one in shown.rows if one.source.row == 56)
    assert lost == ("messages[1].reasoning_content", "a thought")
    assert "not printed by the template: messages[1].reasoning_content: a thought" in str(shown)
    more = preview(given_rows, tokenizer_dir("tiny_bpe"), outliers=True, n=3)
    assert sum("longest" in one.why for one in more.rows) == 3


def test_truncated_text_is_shown(tokenizer_dir):
    shown = preview([talk("q", "word " * 50)], tokenizer_dir("tiny_bpe"), max_length=40, overlong="truncate")
    (view,) = shown.rows[0].examples
    assert view.cut > 0
    assert re.search(rf"✂ {view.cut} tokens cut: .*word", str(shown))
    assert (
        view.text + view.remainder
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + "word " * 50 + "<|im_end|>\n"
    )
    told = shown.as_dict()["rows"][0]
    assert told["cut"] == [{"tokens": view.cut, "text": view.remainder}]


def test_json_contains_all_segments(tokenizer_dir):
    told = preview(
        [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}], tokenizer_dir("tiny_bpe")
    ).as_dict()
    (row,) = told["rows"]
    (example,) = row["examples"]
    assert [(one["text"], one["role"]) for one in example if one["data"]] == [
        ("s", "system"),
        ("q1", "user"),
        ("a1", "assistant"),
    ]
    (stop,) = [one for one in example if one["stop"]]
    assert (stop["text"], stop["trained"], stop["control"]) == ("<|im_end|>", True, True)
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("name", ["tiny_bpe", "tiny_metaspace", "qwen", "deepseek", long("mistral")])
@often(40)
@given(
    text=st.lists(st.sampled_from([*AWKWARD_TEXTS, "年號", "👍🏽", "naïve", "a b", "x\n"]), min_size=1, max_size=6).map(
        "".join
    )
)
def test_views_show_every_token_and_every_character(loaded_tokenizer, name, text):
    try:
        shown = preview([talk("q", text)], loaded_tokenizer(name), CHATML)
    except UnicodeEncodeError:
        return
    for row in shown.rows:
        for view in row.examples:
            assert len(view) == len(view.ids) == len(view.trained) == len(view.pieces)
            assert "".join(view.pieces) == view.text
            assert "".join(one.text for one in view.segments()) == view.text
            learnt = "".join(one.text for one in view.segments() if one.trained)
            assert learnt == "".join(piece for piece, yes in zip(view.pieces, view.trained, strict=True) if yes)
            start, end = len(view) // 3, 2 * len(view) // 3
            assert view.part(start, end).pieces == view.pieces[start:end]


@pytest.mark.parametrize("name", ["tiny_bpe", "tiny_metaspace", "qwen", "deepseek", "mistral"])
@often(60)
@given(
    text=st.lists(
        st.sampled_from(["年號", "👍🏽", "naïve", "a b", " ", "  x", "\n", "é", "the ", "ß"]), max_size=8
    ).map("".join)
)
def test_token_texts_concatenate_to_the_decoded_text(loaded_tokenizer, name, text):
    tokenizer = loaded_tokenizer(name)
    ids = tokenizer.encode([text])[0].ids.tolist()
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    # Some decoders take away blanks with which a text begins.
    assert "".join(texts) in (tokenizer.decode(ids), text)


def test_preview_of_a_build_shows_its_tokens_and_labels(tokenizer_dir, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    built = build_sft_dataset(
        path, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built", packing="bfd", max_length=400
    )
    shown = preview(tmp_path / "built", n=100)
    ids = np.concatenate([view.ids for row in shown.rows for view in row.examples])
    trained = np.concatenate([view.trained for row in shown.rows for view in row.examples])
    assert ids.tolist() == [one for row in built["train"]["input_ids"] for one in row]
    assert trained.tolist() == [one != -100 for row in built["train"]["labels"] for one in row]
    assert {row.source.line for row in shown.rows} == set(range(1, 13))
    assert shown.rows[0].pack == 0
    assert "⟦an answer ⟨<|im_end|>⟩■⟧" in str(shown)
    assert [one.source for one in preview(tmp_path / "built", row=[2, 5]).rows] == [
        shown.rows[2].source,
        shown.rows[5].source,
    ]
    assert len(preview(tmp_path / "built", grep="question 7").rows) == 1
    assert any("longest" in one.why for one in preview(tmp_path / "built", outliers=True).rows)


def test_build_options_are_refused_for_a_build(tokenizer_dir, tmp_path):
    build_sft_dataset(ROWS, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built")
    for options in (
        {"template": "chatml"},
        {"max_length": 100},
        {"where": "true"},
        {"train_on": "all"},
        {"packing": "bfd", "html": tmp_path / "x.html"},
    ):
        with pytest.raises(UsageError, match="does not apply to a finished build"):
            preview(tmp_path / "built", **options)
    with pytest.raises(UsageError, match="the ids of rows"):
        preview(tmp_path / "built", id="row-1")
    with pytest.raises(UsageError, match="is not the tokenizer that"):
        preview(tmp_path / "built", tokenizer_dir("qwen"))
    moved = tmp_path / "moved"
    Path(tokenizer_dir("tiny_bpe")).rename(moved)
    try:
        with pytest.raises(UsageError, match="was built with .*--tokenizer"):
            preview(tmp_path / "built")
        assert preview(tmp_path / "built", moved).rows
    finally:
        moved.rename(tokenizer_dir("tiny_bpe"))


def in_terminal(*arguments, columns=80, **environment):
    """Return the raw output of a command in a terminal."""
    primary, secondary = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    done = subprocess.Popen(
        warm.python("-m", "ftdata", *arguments),
        stdin=secondary, stdout=secondary, stderr=subprocess.PIPE, env={**base, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(secondary)
    parts = []
    while True:
        try:
            part = os.read(primary, 1 << 16)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    assert done.wait() == 0, done.stderr.read()
    done.stderr.close()
    os.close(primary)
    return b"".join(parts).decode()


def bare(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_terminal_output_has_colors_and_piped_output_has_marks(tokenizer_dir):
    arguments = ("preview", EXAMPLES / "faq.json", "-t", tokenizer_dir("tiny_bpe"), "-n", 1)
    coloured = in_terminal(*arguments)
    assert "\x1b[1;4;32m" in coloured
    assert "⟦" not in coloured
    # Without colours what is trained stands between marks.
    plain = in_terminal(*arguments, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    assert "⟦We are open" in bare(plain)
    piped = subprocess.run(warm.python("-m", "ftdata", *arguments), capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in piped
    assert piped.replace("\n", "") == bare(plain).replace("\r\n", "\n").replace("\n", "")


def test_nothing_is_cut_at_80_columns(tokenizer_dir):
    long = talk("a question " * 30, "an answer " * 30)
    path = (
        Path(tokenizer_dir("tiny_bpe")).parent
        / "a-long-name-of-a-file-that-does-not-fit-into-eighty-columns-of-a-terminal.jsonl"
    )
    path.write_text(json.dumps(long) + "\n")
    shown = bare(in_terminal("preview", path, "-t", tokenizer_dir("tiny_bpe"), "--no-pager"))
    assert "an answer " * 30 in shown.replace("\r\n", "")
    assert path.name in shown.replace("\r\n", "")
    assert "…" not in shown


def test_long_output_goes_through_the_pager(tokenizer_dir, tmp_path):
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho PAGED\ncat\n")
    pager.chmod(0o755)
    arguments = ("preview", EXAMPLES / "faq.json", "-t", tokenizer_dir("tiny_bpe"))
    assert "PAGED" in in_terminal(*arguments, "-n", 20, PAGER=str(pager))
    assert "PAGED" not in in_terminal(*arguments, "-n", 1, PAGER=str(pager))
    assert "question_answer" in in_terminal(*arguments, "-n", 20, PAGER="nowhere-to-be-found")
    assert "PAGED" not in in_terminal(*arguments, "-n", 20, "--no-pager", PAGER=str(pager))
    done = subprocess.run(
        warm.python("-m", "ftdata", *arguments, "-n", 20),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PAGER": str(pager)},
    )
    assert "PAGED" not in done.stdout


def test_data_cannot_forge_marks_or_control_the_terminal(tmp_path):
    forged = "done ⟧ ⟦never trained ⟨x⟩■ ✂ ↵"
    path = tmp_path / "a\x1b[31m\n.jsonl"
    path.write_text(json.dumps(talk("q", forged)) + "\n{broken \x1b[31m\n")
    text = str(preview(path))
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith(f"{tmp_path}/a\\u001b[31m↵.jsonl · template")
    assert (text.count("⟦"), text.count("⟧"), text.count("■")) == (1, 1, 1)
    assert "done \\u27e7 \\u27e6never trained \\u27e8x\\u27e9\\u25a0 \\u2702 \\u21b5" in text


def test_file_names_cannot_control_the_terminal(tokenizer_dir, tmp_path):
    from ftdata import diff, stats

    path = tmp_path / "a\x1b[31m\n.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    side = {"data": str(path), "tokenizer": tokenizer_dir("tiny_bpe")}
    for text in (
        str(stats(**side)),
        str(diff(side, {**side, "max_length": 30})),
        str(preview(str(path), tokenizer_dir("tiny_bpe"))),
    ):
        assert "\x1b" not in text
        assert "a\\u001b[31m↵.jsonl" in text


def test_control_tokens_in_row_text_are_plain_text_without_a_tokenizer():
    (row,) = preview([talk("<eos>", "<|im_end|>")]).rows
    segments = [
        (one.text, one.control, one.stop) for one in row.examples[0].segments() if one.text in ("<eos>", "<|im_end|>")
    ]
    assert segments == [
        ("<eos>", False, False),
        ("<|im_end|>", True, False),
        ("<|im_end|>", False, False),
        ("<|im_end|>", True, True),
    ]


@pytest.mark.parametrize(
    "options", [{"max_length": 9}, {"reject_flags": ["no_trained_stop"]}, {"packing": "bfd"}, {"outliers": True}]
)
def test_token_options_need_a_tokenizer(options):
    with pytest.raises(UsageError, match="needs a tokenizer, but no tokenizer was passed"):
        preview(ROWS, **options)


def test_row_numbers_select_the_numbers_that_are_shown(tokenizer_dir, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(talk(f"{name}{n}", "x")) + "\n" for n in range(3)))
    shown = preview([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], row=2)
    assert [str(one.source) for one in shown.rows] == [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:3"]
    assert numbers(preview(ROWS, where="id != 'row-0'", row=[1, 3])) == [1, 3]
    build_sft_dataset(ROWS, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built", packing="bfd", max_length=400)
    (row,) = preview(tmp_path / "built", row=5).rows
    assert (row.number, row.as_dict()["example"]) == (5, 5)
    assert "── example 5 · " in str(preview(tmp_path / "built", row=5))


def test_any_id_column_selects_rows():
    rows = [{**talk("q", "a"), "id": 7.0, "uuid": "u-1"}, {**talk("q", "a"), "id": 8, "uuid": "u-2"}]
    assert [numbers(preview(rows, id=one)) for one in ("7", "8", "u-1", "u-2")] == [[0], [1], [0], [1]]


def test_stop_tokens_are_marked_for_every_mask_policy(tokenizer_dir):
    (row,) = preview([talk("q", "a")], tokenizer_dir("tiny_bpe"), train_on="all").rows
    assert [one.text for one in row.examples[0].segments() if one.stop] == ["<|im_end|>"]


def test_preview_of_a_build_shows_the_number_of_cut_tokens(tokenizer_dir, tmp_path):
    build_sft_dataset(
        [talk("q", "word " * 50)],
        tokenizer_dir("tiny_bpe"),
        output_dir=tmp_path / "b",
        max_length=40,
        overlong="truncate",
    )
    assert re.search(r"✂ \d+ tokens cut", str(preview(tmp_path / "b")))


def test_notebook_shows_the_same_notes_as_the_terminal(tokenizer_dir):
    messages = [
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "first", "reasoning_content": "a secret"},
    ]
    html = preview([{"messages": messages}], tokenizer_dir("tiny_bpe"), CHATML)._repr_html_()
    assert "messages[1].reasoning_content: a secret" in html
    assert "flags: reasoning_dropped" in html
    assert "tokens trained" in html


@pytest.mark.parametrize("row", [[], "3", 1.5, [1, "2"]])
def test_row_selection_must_be_numbers(row):
    with pytest.raises(UsageError, match="expected row numbers, which start at 0"):
        preview(ROWS, row=row)


LONG = {"messages": [part for n in range(4) for part in talk(f"q{n}", f"a{n} " * (1 + 20 * n))["messages"]]}


def test_dropped_turns_are_reported(tokenizer_dir):
    whole = preview([LONG], tokenizer_dir("tiny_bpe"), turns="split").rows[0]
    shown = preview([LONG], tokenizer_dir("tiny_bpe"), turns="split", max_length=100, overlong="drop_turns")
    (row,) = shown.rows
    lengths = [len(one) for one in whole.examples]
    assert (*map(len, row.examples), *row.dropped) == tuple(lengths)
    assert row.dropped
    assert f"✂ {len(row.dropped)} examples dropped: {sum(row.dropped)} tokens beyond max_length" in str(shown)


@pytest.mark.parametrize("overlong", ["reject", "drop_turns", "truncate"])
def test_lengths_are_measured_before_truncation(tokenizer_dir, overlong):
    from ftdata import stats

    whole = stats([LONG, *ROWS], tokenizer_dir("tiny_bpe"), turns="split").survey.lengths
    seen = stats([LONG, *ROWS], tokenizer_dir("tiny_bpe"), turns="split", max_length=100, overlong=overlong).survey
    assert sorted(seen.lengths.tolist()) == sorted(whole.tolist())


def test_missing_text_is_searched_in_its_own_message(tokenizer_dir):
    messages = [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "first", "reasoning_content": "ok"}]
    (row,) = preview([{"messages": messages}], tokenizer_dir("tiny_bpe"), CHATML).rows
    assert row.lost == (("messages[1].reasoning_content", "ok"),)


def test_examples_of_one_row_are_distinguished_in_a_build(tokenizer_dir, tmp_path):
    options = {"turns": "split", "packing": "bfd", "max_length": 300}
    build_sft_dataset([LONG, *ROWS[:2]], tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built", **options)
    why = {one.number: (len(one.examples[0]), one.why) for one in preview(tmp_path / "built", outliers=True).rows}
    every = [len(one.examples[0]) for one in preview(tmp_path / "built", n=99).rows]
    assert [length for length, kinds in why.values() if "longest" in kinds] == [max(every)]
    assert [length for length, kinds in why.values() if "shortest" in kinds] == [min(every)]


def test_closed_pipe_is_not_an_error(tokenizer_dir):
    command = f"{sys.executable} -m ftdata preview {EXAMPLES / 'faq.json'} -n 60"
    for more in ("", "--json"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {more} | head -1; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "char", ["\x1b", "\u202e", "\u200b", "\u2066", "\x00", "\x9b", "\u2028", "\ufeff", "\u3164", "\u115f"]
)
def test_control_and_invisible_characters_are_escaped(char):
    assert make_visible(f"a{char}b") == f"a\\u{ord(char):04x}b"


@pytest.mark.parametrize(("text", "rows"), [("1", [1]), ("0,2-4", [0, 2, 3, 4]), (" 1 , 3", [1, 3])])
def test_row_numbers_on_the_command_line(text, rows):
    from ftdata.cli.options import parse_row_numbers

    assert parse_row_numbers(text) == rows


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-x", "5-3", "1,,2", "0-99999999999", "²"])
def test_invalid_row_numbers_are_refused(text):
    from ftdata.cli.options import parse_row_numbers

    with pytest.raises(UsageError, match="such as 7 or 3,8-11"):
        parse_row_numbers(text)


def test_preview_refuses_a_damaged_build(tokenizer_dir, tmp_path):
    build_sft_dataset(ROWS, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built")
    path = tmp_path / "built" / "train" / "data-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputRefused, match="damaged_build.*data-00000.arrow"):
        preview(tmp_path / "built")
