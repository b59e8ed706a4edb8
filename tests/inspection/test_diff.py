"""Diff: reports exactly the differences between two builds of the same rows."""

import json
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import CHATML

from ftdata import build_preference_dataset, build_sft_dataset, diff
from ftdata.errors import InputRefused, UsageError
from ftdata.inspection.diff import find_edits, side_options
from ftdata.inspection.row_views import ExampleView, SegmentOwner


def talk(*texts):
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


ROWS = [{"messages": talk(f"question {n}", f"answer {n}")} for n in range(6)] + [
    {"messages": talk("q", "a1", "and", "a2")}
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_identical_sides_have_no_differences(data, tokenizer_dir, tmp_path):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, side)
    assert not found
    assert found.rows["same"] == 7
    for name, options in (("a", {}), ("b", {"packing": "bfd", "max_length": 100, "seed": 3})):
        build_sft_dataset(data, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / name, **options)
    # How rows are packed is no difference between them.
    assert not diff(tmp_path / "a", tmp_path / "b")
    assert not diff(side, tmp_path / "b")


def test_different_labels_and_different_tokens_are_distinguished(data, tokenizer_dir):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, {**side, "train_on": "last_assistant"})
    assert +Counter(found.rows) == {"same": 6, "labels differ": 1}
    assert found.options == {"train_on": ("assistant", "last_assistant")}
    (changed,) = found.changed
    a, b = changed.a.examples[0], changed.b.examples[0]
    marked = [at for edit in changed.edits[0] for at in range(*edit.in_a)]
    assert marked == np.flatnonzero(a.trained != b.trained).tolist()
    text = str(found)
    assert "train_on: assistant → last_assistant" in text
    assert text.count("⟦a1") == 1
    assert text.index("⟦a1") < text.index("\n+ ")


def test_different_templates_and_split_turns_change_the_tokens(data, tokenizer_dir):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}
    assert diff(side, {**side, "template": "zephyr"}).rows["tokens differ"] == 7
    found = diff(side, {**side, "turns": "split"})
    assert (found.rows["same"], found.rows["tokens differ"]) == (6, 1)
    assert len(found.changed[0].b.examples) == 2


def test_rows_rejected_by_one_side_are_reported(data, tokenizer_dir):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, {**side, "max_length": 40})
    assert found.rows["only in A"] == 1
    assert found.rows["same"] == 6
    assert "[overlong]" in found.changed[0].b.rejected
    assert "[overlong]" in str(found)


def test_different_tokenizers_are_compared_by_text(data, tokenizer_dir):
    a = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe"), "template": CHATML}
    assert not diff(a, {**a, "tokenizer": tokenizer_dir("qwen")})
    assert diff(a, {**a, "tokenizer": tokenizer_dir("qwen"), "train_on": "all"}).rows["labels differ"] == 7


def test_moved_data_is_matched_by_file_name(data, tokenizer_dir, tmp_path):
    build_sft_dataset(data, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(data, tmp_path / "elsewhere" / "d.jsonl")
    assert not diff(tmp_path / "a", {"data": str(moved), "tokenizer": tokenizer_dir("tiny_bpe")})


def test_rows_are_matched_across_packing_order_and_rejects(tokenizer_dir, tmp_path):
    """The order of packs and sources and the position of rejected rows do not matter."""
    rows = [{"messages": talk(f"question {n}", "an answer " * (1 + n * 7 % 5))} for n in range(40)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, options in (
        ("a", {"seed": 1}),
        ("b", {"shuffle": True, "train_on": "all", "packing": "bfd", "max_length": 200}),
    ):
        build_sft_dataset(path, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / name, **options)
    found = diff(tmp_path / "a", tmp_path / "b", n=6)
    assert +Counter(found.rows) == {"labels differ": 40}
    assert all(one.a.examples and one.b.examples for one in found.changed)
    assert [one.a.source for one in found.changed] == [one.b.source for one in found.changed]
    assert {name: found.options[name] for name in ("train_on", "packing", "shuffle")} == {
        "train_on": ("assistant", "all"), "packing": (None, "bfd"), "shuffle": (False, True),
    }  # fmt: skip
    side = {"data": str(path), "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, {**side, "max_length": 40, "train_on": "all"}, n=2)
    assert found.rows["only in A"] > 2
    assert all("[overlong]" in one.b.rejected for one in found.changed if one.kind == "only in A")


def test_rows_rejected_by_both_sides_are_counted(tokenizer_dir):
    rows = [{"messages": talk("q", "")}, {"messages": talk("q", "a")}]
    side = {"data": rows, "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, side)
    assert +Counter(found.rows) == {"same": 1, "rejected by both": 1}
    assert not found
    with pytest.raises(InputRefused, match="no row can be built on either side"):
        diff({**side, "data": rows[:1]}, {**side, "data": rows[:1]})


def test_repeated_rows_and_rows_in_another_split_are_reported(data, tokenizer_dir, tmp_path):
    tokenizer = tokenizer_dir("tiny_bpe")
    build_sft_dataset(data, tokenizer, output_dir=tmp_path / "a")
    build_sft_dataset([{"path": data, "weight": 2}], tokenizer, output_dir=tmp_path / "twice")
    build_sft_dataset(data, tokenizer, output_dir=tmp_path / "split", test_size=2)
    assert +Counter(diff(tmp_path / "a", tmp_path / "twice").rows) == {"another number of times": 7}
    assert +Counter(diff(tmp_path / "a", tmp_path / "split").rows) == {"same": 5, "in another split": 2}


def test_files_with_the_same_name_are_distinguished(data, tokenizer_dir, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.jsonl").write_text(json.dumps({"messages": talk(name, name)}) + "\n")
    tokenizer = tokenizer_dir("tiny_bpe")
    both = [str(tmp_path / name / "d.jsonl") for name in ("x", "y")]
    side = {"data": both, "tokenizer": tokenizer}
    assert +Counter(diff(side, {**side, "data": both[::-1]}).rows) == {"same": 2}
    assert +Counter(diff(side, {**side, "data": [both[0], data]}).rows) != {"same": 2}
    # One on each side: it is the same data, whatever its name.
    other = shutil.copy(data, tmp_path / "renamed.jsonl")
    assert not diff({"data": data, "tokenizer": tokenizer}, {"data": str(other), "tokenizer": tokenizer})


def test_examples_of_a_row_are_paired_across_packs(tokenizer_dir, tmp_path):
    rows = [
        {"messages": talk(*(f"{word}{n} " * (1 + 7 * turn) for turn in range(4) for word in "qa"))} for n in range(9)
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    side = {
        "data": str(path),
        "tokenizer": tokenizer_dir("tiny_bpe"),
        "turns": "split",
        "train_on": "all",
        "max_length": 600,
    }
    build_sft_dataset(
        path, side["tokenizer"], turns="split", max_length=600, packing="bfd", shuffle=True, output_dir=tmp_path / "b"
    )
    found = diff(side, tmp_path / "b", n=9)
    assert +Counter(found.rows) == {"labels differ": 9}
    for one in found.changed:
        assert [view.ids.tolist() for view in one.a.examples] == [view.ids.tolist() for view in one.b.examples]
        assert all(len(edits) <= 2 for edits in one.edits)


def test_moved_files_with_equal_names_are_paired_in_order(tokenizer_dir, tmp_path, monkeypatch):
    for place in "abcd":
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.jsonl").write_text(
            json.dumps({"messages": talk("q", "ac" if place in "ac" else "bd")}) + "\n"
        )
    monkeypatch.chdir(tmp_path)
    side = lambda *names: {"data": [f"{name}/x.jsonl" for name in names], "tokenizer": tokenizer_dir("tiny_bpe")}
    assert not diff(side("a", "b"), side("c", "d"))
    assert not diff(side("a", "b"), {**side(), "data": [str(tmp_path / name / "x.jsonl") for name in "ba"]})


def test_repeated_file_is_compared_as_often_as_it_is_listed(data, tokenizer_dir):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe"), "limit": 2}
    found = diff({**side, "data": [data, data]}, side)
    assert +Counter(found.rows) == {"another number of times": 2}
    assert [(len(one.a.examples), len(one.b.examples)) for one in found.changed] == [(2, 1)] * 2


def test_edits_across_tokenizers_cover_only_the_trained_text(data, tokenizer_dir):
    a = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe"), "template": CHATML}
    (changed, *_) = diff(a, {**a, "tokenizer": tokenizer_dir("qwen"), "train_on": "last_assistant"}).changed
    for view, places in (
        (changed.a.examples[0], [edit.in_a for edit in changed.edits[0]]),
        (changed.b.examples[0], [edit.in_b for edit in changed.edits[0]]),
    ):
        assert "".join(view.part(*place).text for place in places) == "a1<|im_end|>"


@pytest.mark.parametrize(
    "change",
    [
        "schema=[]",
        "schema=null",
        "columns=x",
        "train_parts=5",
        "limit=99999999999999999999",
        "max_length=99999999999999999999",
        "turns=[",
        "reject_flags=x",
    ],
)
def test_invalid_option_values_give_a_one_line_error(data, tokenizer_dir, change):
    done = run(data, "-t", tokenizer_dir("tiny_bpe"), "--set", change)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_iterators_are_read_once_and_compared(tokenizer_dir):
    rows = iter(ROWS)
    side = {"data": rows, "tokenizer": tokenizer_dir("tiny_bpe")}
    assert +Counter(diff(side, {**side, "train_on": "last_assistant"}).rows) == {"same": 6, "labels differ": 1}


@pytest.mark.parametrize(
    ("b", "says"),
    [
        ({"tokenizer": "x"}, "one side of the comparison has no data"),
        ({"data": [], "tokenizr": 1}, "did you mean 'tokenizer'"),
        ({"data": []}, "no_tokenizer"),
    ],
)
def test_invalid_sides_are_refused(data, tokenizer_dir, b, says):
    with pytest.raises(UsageError, match=says):
        diff({"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}, b)


def run(*arguments):
    done = subprocess.run(warm.python("-m", "ftdata", "diff", *arguments), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_diff_command_compares_configurations_data_and_builds(data, tokenizer_dir, tmp_path):
    tokenizer = tokenizer_dir("tiny_bpe")
    build_sft_dataset(data, tokenizer, output_dir=tmp_path / "a")
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {data}\nmodel: {tokenizer}\noutput_dir: out\nmax_length: 40\n")
    assert run(tmp_path / "a", tmp_path / "a").returncode == 0
    done = run(tmp_path / "a", config, "--html", tmp_path / "page.html")
    assert done.returncode == 1
    assert "only in A: 1" in done.stdout
    assert (tmp_path / "page.html").is_file()
    done = run(data, "-t", tokenizer, "--set", "turns=split", "--json")
    assert json.loads(done.stdout)["rows"]["tokens differ"] == 1
    assert run(data, "-t", tokenizer).returncode == 2
    build_sft_dataset(data, tokenizer, "zephyr", output_dir=tmp_path / "z")
    # The template applies only to data.
    assert run(tmp_path / "z", data, "-t", tokenizer, "--template", "zephyr").returncode == 0
    assert "does not apply" in run(tmp_path / "z", tmp_path / "a", "--template", "zephyr").stderr
    assert run(data, "-t", tokenizer, "--set", "train_parts=answer,tool_call").returncode == 0
    assert "did you mean 'turns'" in run(data, "-t", tokenizer, "--set", "turn=split").stderr
    assert run(data, "-t", tokenizer, "--set", "turns").returncode == 2
    assert run(data, "-t", tokenizer, "--set", "where='question 1' in messages[0].content").returncode == 1
    assert run(data, "-t", tokenizer, "--set", "template={{ messages[0].content }}").returncode == 1
    assert run("-", "-t", tokenizer, "--set", "turns=split").returncode == 2
    done = run(data, "-t", tokenizer, "--set", "turns=split", "--html", data)
    assert (done.returncode, "is not an HTML page of ftdata" in done.stderr) == (2, True)


@pytest.mark.browser
def test_html_page_shows_both_sides(data, tokenizer_dir, tmp_path, chromium):
    side = {"data": data, "tokenizer": tokenizer_dir("tiny_bpe")}
    found = diff(side, {**side, "train_on": "last_assistant"}, html=tmp_path / "page.html")
    page = chromium.new_page()
    page.goto(f"file://{tmp_path / 'page.html'}")
    page.wait_for_selector("#list[data-ready]")
    assert page.locator(".pair .ex").count() == 2
    outlined = page.evaluate(
        "[...document.querySelectorAll('.ex')].map((box) => [...box.querySelectorAll('.t.new')].map((one) => one.token))"
    )
    edits = found.changed[0].edits[0]
    assert outlined == [
        [at for edit in edits for at in range(*edit.in_a)],
        [at for edit in edits for at in range(*edit.in_b)],
    ]
    assert [text[:2] for text in page.locator(".pair h4").all_text_contents()] == ["A:", "B:"]
    page.close()


def view(pieces, trained):
    size = len(pieces)
    nobody = np.zeros(size, np.int64)
    return ExampleView(
        "".join(pieces),
        np.cumsum([len(one) for one in pieces]),
        np.asarray(trained, bool),
        nobody > 0,
        nobody,
        (SegmentOwner(-1, "", ""),),
    )


sides = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12)


@settings(deadline=None)
@given(left=sides, right=sides)
def test_unchanged_tokens_are_equal_on_both_sides(left, right):
    edits = find_edits(*(view([text for text, _ in one], [yes for _, yes in one]) for one in (left, right)))
    kept = []
    for side, places in ((left, [edit.in_a for edit in edits]), (right, [edit.in_b for edit in edits])):
        changed = {at for place in places for at in range(*place)}
        kept.append([one for at, one in enumerate(side) if at not in changed])
    assert kept[0] == kept[1]
    assert bool(edits) == (left != right)


def test_ratings_of_answers_are_compared(tokenizer_dir, tmp_path):
    """The tokens are equal, but the labels of the answers or the margins of the pairs differ."""
    row, pair = {"prompt": "q", "completion": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}
    for task, rows in (
        ("kto", [{**row, "label": True}, {**row, "label": False}]),
        ("dpo", [{**pair, "margin": 0.1}, {**pair, "margin": 0.2}]),
    ):
        sides = [{"data": [one], "tokenizer": tokenizer_dir("tiny_bpe"), "task": task} for one in rows]
        assert diff(*sides).rows["labels differ"] == 1
        build_preference_dataset(rows[:1], tokenizer_dir("tiny_bpe"), task=task, output_dir=tmp_path / task)
        assert not diff(sides[0], tmp_path / task)
        assert diff(sides[1], tmp_path / task)


def test_sides_of_pairs_are_named_and_compared_with_each_other(tokenizer_dir):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    swapped = {**pair, "chosen": "bad", "rejected": "good"}
    sides = [{"data": [one], "tokenizer": tokenizer_dir("tiny_bpe"), "template": "chatml"} for one in (pair, swapped)]
    shown = str(diff(*sides))
    places = [shown.index(text) for text in ("── chosen ──", "⟦good", "⟦bad", "── rejected ──")]
    assert places == sorted(places)
    changed = {**pair, "rejected": "worse"}
    shown = str(diff(sides[0], {**sides[0], "data": [changed]}))
    assert "── rejected ──" in shown
    assert "── chosen ──" not in shown
    ranked = {"prompt": "q", "completions": ["good", "fair", "bad"]}
    others = {**ranked, "completions": ["good", "fair", "worse"]}
    shown = str(diff(*({**sides[0], "data": [one]} for one in (ranked, others))))
    assert "── pair 1 of 3" not in shown
    assert "── pair 2 of 3, rejected ──" in shown
    assert "── pair 3 of 3, rejected ──" in shown


def test_single_template_variable_can_be_set():
    options = side_options("data.jsonl", template_kwargs={"a": 1}, changes=["template_kwargs.enable_thinking=false"])
    assert options["template_kwargs"] == {"a": 1, "enable_thinking": False}
    with pytest.raises(UsageError, match="unknown_set"):
        side_options("data.jsonl", changes=["turns.x=split"])
