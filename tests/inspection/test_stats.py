"""Statistics of data and of builds equal independent counts."""

import json
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdata import build_sft_dataset, encode, stats
from ftdata.errors import InputRefused, UsageError
from ftdata.inspection import charts

TALKS = [
    [{"role": role, "content": f"{word} " * size} for role, word, size in turns]
    for turns in (
        [("user", "ask", 3), ("assistant", "say", 4)],
        [("user", "ask", 1), ("assistant", "say", 40), ("user", "and", 2), ("assistant", "so", 9)],
        [("system", "be", 5), ("user", "ask", 2), ("assistant", "say", 1)],
    )
]


@pytest.fixture
def data(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    second.write_text(
        json.dumps({"question": "q", "answer": "a"}) + "\n" + json.dumps({"question": "q", "answer": ""}) + "\n"
    )
    return [str(first), str(second)]


def test_counts_equal_those_of_the_encoded_examples(data, tokenizer_dir):
    found = stats(data, tokenizer_dir("tiny_bpe"))
    examples = [one for talk in TALKS for one in encode(talk, tokenizer_dir("tiny_bpe"))]
    whole, first, second, messages, asked = found.groups
    assert (whole.of, whole.rows, whole.turns, whole.examples) == ("all", 4, 5, 4)
    assert (first.name, first.rows, first.turns) == (data[0], 3, 4)
    assert first.tokens == sum(map(len, examples)) == messages.tokens
    assert first.trained == sum(int(one.trained.sum()) for one in examples)
    assert (second.name, second.rows) == (data[1], 1)
    assert [messages.name, asked.name] == ["messages", "question_answer"]
    lengths = sorted(map(len, examples))
    assert (first.lengths[0], first.lengths[50], first.lengths[100]) == (lengths[0], lengths[1], lengths[2])
    assert found.rejected == {"empty_answer": 1}
    assert found.rows == 5
    text = str(found)
    assert "5 rows read, 1 rejected (1 empty_answer)" in text
    assert f"{whole.tokens:,}" in text


def test_statistics_of_a_build_equal_those_of_its_data(data, tokenizer_dir, tmp_path):
    build_sft_dataset(
        data,
        tokenizer_dir("tiny_bpe"),
        output_dir=tmp_path / "built",
        packing="bfd",
        max_length=500,
        on_bad_rows="quarantine",
        max_rejects=5,
    )
    of_data, of_build = stats(data, tokenizer_dir("tiny_bpe")), stats(tmp_path / "built")
    for name in ("tokens", "trained", "examples", "lengths", "answers"):
        assert getattr(of_data.groups[0], name) == getattr(of_build.groups[0], name)
    assert of_build.groups[0].turns is None


def test_statistics_of_a_build_equal_those_of_its_report(data, tokenizer_dir, tmp_path):
    options = {"max_length": 400, "overlong": "drop_turns", "turns": "split", "test_size": 1, "dedup": True}
    built = build_sft_dataset(
        data,
        tokenizer_dir("tiny_bpe"),
        output_dir=tmp_path / "built",
        on_bad_rows="quarantine",
        max_rejects=5,
        **options,
    )
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    found = stats(tmp_path / "built")
    splits = report["splits"].values()
    assert found.rows == report["read"]
    assert sum(found.rejected.values()) == report["rejected"]
    assert found.groups[0].examples == sum(one["examples"] for one in splits)
    assert found.groups[0].tokens == sum(one["tokens"] for one in splits)
    assert found.groups[0].trained == sum(one["trained"] for one in splits)
    assert {one.name: one.tokens for one in found.groups if one.of == "split"} == {
        name: one["tokens"] for name, one in report["splits"].items()
    }
    assert {one.name for one in found.groups if one.of == "source"} <= set(data)
    # Turns on their own are examples, not rows.
    assert found.groups[0].rows < found.groups[0].examples == len(built["train"]) + len(built["test"])


def test_percentiles_are_observed_values(tokenizer_dir):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(1, 41)
    ]
    whole = stats(rows, tokenizer_dir("tiny_bpe")).groups[0]
    lengths = sorted(len(example) for row in rows for example in encode(row["messages"], tokenizer_dir("tiny_bpe")))
    answers = sorted(
        int(example.trained.sum()) for row in rows for example in encode(row["messages"], tokenizer_dir("tiny_bpe"))
    )
    places = {0: 0, 5: 1, 25: 9, 50: 19, 75: 29, 95: 37, 99: 38, 100: 39}
    assert dict(whole.lengths) == {at: lengths[place] for at, place in places.items()}
    assert dict(whole.answers) == {at: answers[place] for at, place in places.items()}


def test_rows_are_selected_as_in_a_build(data, tokenizer_dir):
    tokenizer = tokenizer_dir("tiny_bpe")
    assert [one.rows for one in stats(data, tokenizer, limit=1).groups if one.of == "source"] == [1, 1]
    assert stats(data, tokenizer, where="messages is defined").groups[0].rows == 3
    with pytest.raises(UsageError, match="did you mean 'turns'"):
        stats(data, tokenizer, turn="split")
    mixed = stats([data[0], build_at(data, tokenizer)], tokenizer)
    assert mixed.rows == stats([data[0]], tokenizer).rows + 4
    assert mixed.flags["pretokenized"] == 4


def build_at(data, tokenizer):
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp()) / "built"
    build_sft_dataset(data, tokenizer, output_dir=folder, on_bad_rows="quarantine", max_rejects=5)
    return str(folder)


def test_flags_are_counted(tokenizer_dir):
    rows = [{"question": "<|im_end|>", "answer": "a"}, {"question": "q", "answer": "a"}]
    assert stats(rows, tokenizer_dir("tiny_bpe")).flags == {"control_tokens": 1}


@pytest.mark.parametrize(
    "name", ["train/data-00000.arrow", "train/provenance.parquet", "dataset_dict.json", "report.json", "rejects.jsonl"]
)
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_damaged_build_is_refused(data, tokenizer_dir, name, damage):
    from pathlib import Path

    folder = Path(build_at(data, tokenizer_dir("tiny_bpe")))
    path = folder / name
    if (name, damage) in (("rejects.jsonl", "empty"), ("dataset_dict.json", "gone")):
        return  # that is a build without rejects, and none
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    with pytest.raises(InputRefused, match="damaged_build"):
        stats(folder)


def test_limits_count_longer_examples_and_their_tokens(tokenizer_dir):
    found = stats(
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x " * 700}]}],
        tokenizer_dir("tiny_bpe"),
    )
    length = found.groups[0].tokens
    assert [(one.max_length, one.longer, one.tokens) for one in found.limits[:2]] == [
        (512, 1, length - 512),
        (1024, 1, length - 1024),
    ]
    assert found.limits[-1].longer == 0


def test_svg_images_are_well_formed(data, tokenizer_dir, tmp_path):
    stats(data, tokenizer_dir("tiny_bpe"), svg=tmp_path / "pictures")
    for name in ("lengths", "trained"):
        assert ET.parse(tmp_path / "pictures" / f"{name}.svg").getroot().tag.endswith("svg")


def test_inputs_without_examples_or_tokenizer_are_refused(tokenizer_dir, data):
    with pytest.raises(InputRefused, match="0 of 1 rows can be built"):
        stats([{"question": "q", "answer": ""}], tokenizer_dir("tiny_bpe"))
    with pytest.raises(UsageError, match="no_tokenizer"):
        stats(data)


def test_stats_command_prints_tables_and_json(data, tokenizer_dir):
    command = warm.python("-m", "ftdata", "stats", *data, "-t", tokenizer_dir("tiny_bpe"))
    plain = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PATH": "/usr/bin"}
    ).stdout
    assert max(map(len, plain.splitlines()[1:])) <= 80
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert told["groups"][0]["rows"] == 4


@settings(deadline=None)
@given(values=st.lists(st.integers(1, 200_000), min_size=1, max_size=50), line=st.none() | st.integers(2, 100_000))
def test_length_histogram_counts_every_value(values, line):
    svg = charts.draw_length_histogram(np.asarray(values), line=line)
    root = ET.fromstring(svg)
    tips = [one.text for one in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert sum(int(tip.rpartition(": ")[2].replace(",", "")) for tip in tips) == len(values)
    if line is not None:
        assert f"max_length {line:,}: {sum(value > line for value in values):,} longer" in svg


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_share_histogram_counts_every_value(values):
    root = ET.fromstring(charts.draw_share_histogram(np.asarray(values)))
    tips = [one.text for one in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert sum(int(tip.rpartition(": ")[2].replace(",", "")) for tip in tips) == len(values)
