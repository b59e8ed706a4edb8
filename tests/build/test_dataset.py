"""Complete builds: the ledger, the splits and the files."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from tokenizer_makers import tiny_bpe

from ftdata import build_sft_dataset
from ftdata.build.store import read_manifest, verify_files
from ftdata.errors import BadRows, InputRefused, TooManyRejects, UsageError
from ftdata.pipeline import render_rows
from ftdata.testing import conversation_strategy
from ftdata.tokenizing.load import load_tokenizer

few = often(25)
ROWS = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
BAD = {"question": "no answer", "answer": ""}


@pytest.fixture
def tiny(tokenizer_dir):
    return tokenizer_dir("tiny_bpe")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(split, tokenizer):
    """Decode the trained tokens of each document."""
    found = []
    for row in split:
        at = 0
        for length in row["seq_lengths"]:
            labels = np.asarray(row["labels"][at : at + length])
            found.append(tokenizer.decode(labels[labels != -100]))
            at += length
        assert at == len(row["input_ids"]) == len(row["labels"])
    return found


def test_labels_decode_to_the_answers(tiny):
    built = build_sft_dataset(ROWS, tiny)
    assert answers(built["train"], load_tokenizer(tiny)) == [row["answer"] + "<|im_end|>" for row in ROWS]
    assert built["train"].column_names == ["input_ids", "labels", "seq_lengths"]


@few
@given(
    rows=st.lists(conversation_strategy(max_turns=2), min_size=1, max_size=12),
    packing=st.sampled_from([None, "bfd"]),
    seed=st.integers(0, 3),
    test_size=st.none() | st.floats(0.1, 0.5),
)
def test_packing_and_splitting_move_whole_examples(tiny, rows, packing, seed, test_size):
    """P1, P2, P5, P8, D1."""
    if test_size is not None and len(rows) < 3:
        test_size = None
    plain = build_sft_dataset(rows, tiny)
    built = build_sft_dataset(rows, tiny, packing=packing, max_length=2000, test_size=test_size, seed=seed)

    def documents(split):
        for row in split:
            bounds = np.cumsum([0, *row["seq_lengths"]])
            for a, b in itertools.pairwise(bounds):
                yield tuple(row["input_ids"][a:b]), tuple(row["labels"][a:b])
                assert row["labels"][a] == -100

    everything = [document for split in built.values() for document in documents(split)]
    assert sorted(everything) == sorted(documents(plain["train"]))
    assert built.report.total("read") == built.report.total("built") == len(rows)


def test_ledger_accounts_for_every_kind_of_reject(tiny, tmp_path):
    long = {"question": "x", "answer": "word " * 200}
    path = write_rows(tmp_path / "d.jsonl", [*ROWS, BAD, {"foo": 1}, long])
    with Path(path).open("a") as file:
        file.write("{broken\n")
    built = build_sft_dataset(
        path, tiny, max_length=100, on_bad_rows="quarantine", max_rejects=3, output_dir=tmp_path / "out"
    )
    report = built.report
    assert (report.total("read"), report.total("built"), report.total("rejected")) == (44, 40, 4)
    assert report.sources[0].rejected == {"empty_answer": 1, "unknown_schema": 1, "overlong": 1, "json": 1}
    assert report.total("tokens_in") == report.total("tokens_kept") + report.total("tokens_rejected")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [41, 42, 43, 44]
    assert all(reject["code"] and reject["reason"] and reject["raw"] for reject in rejects)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["read"] == 44
    assert saved["sources"][0]["rejected"]["overlong"] == 1


def test_all_invalid_rows_are_reported_together(tiny, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [ROWS[0], BAD, ROWS[1], {"foo": 1}, {"question": 1, "answer": "x"}])
    with pytest.raises(BadRows) as caught:
        build_sft_dataset(path, tiny, output_dir=tmp_path / "out")
    assert caught.value.count == 3
    assert all(f"d.jsonl:{line}" in str(caught.value) for line in (2, 4, 5))
    assert "quarantine" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize(("limit", "passes"), [(1, True), (0, False), ("3%", True), ("1%", False), (0.03, True)])
def test_max_rejects(tiny, limit, passes):
    build = lambda: build_sft_dataset([*ROWS, BAD], tiny, on_bad_rows="quarantine", max_rejects=limit)
    if passes:
        assert build().report.total("rejected") == 1
    else:
        with pytest.raises(TooManyRejects):
            build()


@pytest.mark.parametrize(
    "options",
    [
        {"turns": "both"},
        {"control_tokens": "x"},
        {"overlong": "cut"},
        {"packing": "ffd", "max_length": 9},
        {"packing": "bfd"},
        {"schema": "x"},
        {"max_length": 0},
        {"test_size": 0},
        {"test_size": 1.5},
        {"test_size": 40},
        {"on_bad_rows": "skip"},
        {"on_bad_rows": "quarantine"},
        {"max_rejects": 3},
        {"on_bad_rows": "quarantine", "max_rejects": "x"},
        {"on_bad_rows": "quarantine", "max_rejects": "nan"},
        {"max_length": "512"},
        {"template_kwargs": {"x": object()}},
        {"train_on": "users"},
        {"engine": "spark"},
        {"workers": 0},
        {"template": "nope"},
        {"columns": {"x": "y"}},
        {"date": "tomorrow"},
    ],
)
def test_invalid_options_are_refused(tiny, options):
    with pytest.raises(UsageError):
        build_sft_dataset(ROWS, tiny, **options)


def test_build_without_examples_is_refused(tiny):
    with pytest.raises(InputRefused, match="no_rows_built"):
        build_sft_dataset([], tiny)
    with pytest.raises(InputRefused, match="overlong"):
        build_sft_dataset(ROWS, tiny, max_length=5)


def test_datasets_loads_the_build_folder(tiny, tmp_path):
    out = tmp_path / "out"
    built = build_sft_dataset(ROWS, tiny, test_size=0.25, packing="bfd", max_length=128, output_dir=out)
    again = datasets.load_from_disk(str(out))
    assert {name: split[:] for name, split in again.items()} == {name: split[:] for name, split in built.items()}
    files = {name: str(out / name / "*.arrow") for name in again}
    by_name = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {name: split[:] for name, split in by_name.items()} == {name: split[:] for name, split in again.items()}
    loaded = datasets.load_dataset("arrow", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: split[:] for name, split in loaded.items()} == {name: split[:] for name, split in again.items()}


def test_split_has_the_requested_size_and_depends_on_the_seed(tiny):
    sizes = {size: build_sft_dataset(ROWS, tiny, test_size=size)["test"].num_rows for size in (0.1, 0.11, 7)}
    assert sizes == {0.1: 4, 0.11: 5, 7: 7}
    of = lambda seed: build_sft_dataset(ROWS, tiny, test_size=10, seed=seed)["test"][:]
    assert of(1) == of(1) != of(2)


def test_split_is_the_same_on_every_machine():
    """The rows that seed 42 selects are part of the interface."""
    from ftdata.build.splits import seeded_hash

    order = np.argsort(seeded_hash(np.arange(10, dtype=np.uint64), 42), kind="stable")
    assert order.tolist() == [4, 1, 6, 2, 8, 3, 9, 0, 7, 5]
    assert (
        int(seeded_hash(np.zeros(1, np.uint64), 0)[0]) == 0xE220A8397B1DCDAF
    )  # the generator's published first output


def test_provenance_identifies_the_source_line(tiny, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    build_sft_dataset(path, tiny, packing="bfd", max_length=128, output_dir=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train" / "provenance.parquet").to_pylist()
    built = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    tokenizer = load_tokenizer(tiny)
    at = dict.fromkeys(range(len(built)), 0)
    for entry in table:
        pack = built[entry["pack"]]
        start = at[entry["pack"]]
        at[entry["pack"]] += entry["tokens"]
        text = tokenizer.decode(pack["input_ids"][start : start + entry["tokens"]])
        assert ROWS[entry["row"]]["question"] in text
        assert entry["line"] == entry["row"] + 1
        assert entry["source"] == path


def test_every_flipped_bit_is_detected(tiny, tmp_path):
    build_sft_dataset(ROWS, tiny, output_dir=tmp_path / "out")
    assert verify_files(tmp_path / "out") == []
    for name in read_manifest(tmp_path / "out")["files"]:
        path = tmp_path / "out" / name
        original = path.read_bytes()
        if original:
            path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
            assert verify_files(tmp_path / "out") == [name]
            path.write_bytes(original)


def test_build_replaces_only_another_build(tiny, tmp_path):
    out = tmp_path / "out"
    build_sft_dataset(ROWS, tiny, output_dir=out)
    build_sft_dataset(ROWS[:3], tiny, output_dir=out)
    assert datasets.load_from_disk(str(out))["train"].num_rows == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not a data set that ftdata built"):
        build_sft_dataset(ROWS, tiny, output_dir=foreign)
    assert (foreign / "thesis.tex").read_text() == "x"


def test_failed_build_keeps_the_previous_build(tiny, tmp_path):
    out = tmp_path / "out"
    build_sft_dataset(ROWS, tiny, output_dir=out)
    before = read_manifest(out)
    with pytest.raises(BadRows):
        build_sft_dataset([BAD], tiny, output_dir=out)
    assert read_manifest(out) == before
    assert verify_files(out) == []


def digest(folder):
    return {name: entry["sha256"] for name, entry in read_manifest(folder)["files"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 3), long((1, 2, 4))], ids=str)
def test_output_does_not_depend_on_the_number_of_workers(tiny, tmp_path, counts):
    """P7, D6, D3."""
    typed, more = ({"role": "user", "content": content} for content in ("<|im_end|> typed", "more"))
    # Of what there are several of one row, the order must be told by nothing but what they are.
    flagged = {"messages": [typed, {"role": "assistant", "content": "a"}, more], "one": 1, "two": 2, "three": 3}
    files = [write_rows(tmp_path / f"{n}.jsonl", [*ROWS[n * 10 : n * 10 + 10], flagged]) for n in range(4)]
    script = (
        "import sys, json\nfrom ftdata import build_sft_dataset\nfrom ftdata.build import run_tasks\n"
        "if __name__ == '__main__':\n"
        "    run_tasks.BYTES_PER_WORKER = 1\n"
        "    build_sft_dataset(json.loads(sys.argv[1]), sys.argv[2], packing='bfd', max_length=128, test_size=0.2,\n"
        "                      output_dir=sys.argv[3], workers=int(sys.argv[4]))\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    for seed, workers in enumerate(counts):
        subprocess.run(
            [sys.executable, path, json.dumps(files), tiny, tmp_path / f"out{workers}", str(workers)],
            check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": "", "TZ": f"UTC-{workers}", "FTDATA_CACHE": "off"},
        )
    first, *others = (digest(tmp_path / f"out{workers}") for workers in counts)
    assert all(other == first for other in others)


def test_output_does_not_depend_on_the_batch_size(tiny, monkeypatch):
    built = []
    for batch, letters in ((1, 1 << 20), (7, 1 << 20), (1000, 1 << 20), (1000, 100)):
        monkeypatch.setattr("ftdata.pipeline.render_rows.BATCH", batch)
        monkeypatch.setattr("ftdata.pipeline.render_rows.MAX_BATCH_CHARACTERS", letters)
        built.append(build_sft_dataset(ROWS, tiny, packing="bfd", max_length=128))
    assert all(each["train"][:] == built[0]["train"][:] for each in built)
    assert len({each.report.fingerprint for each in built}) == 1


def test_fingerprint_changes_with_data_tokenizer_and_options(tiny, tokenizer_dir):
    """D7."""
    prints = [
        build_sft_dataset(rows, tokenizer, **options).report.fingerprint
        for rows, tokenizer, options in [
            (ROWS, tiny, {}),
            (ROWS[1:], tiny, {}),
            (ROWS, tokenizer_dir("tiny_metaspace"), {}),
            (ROWS, tiny, {"template": "chatml"}),
            (ROWS, tiny, {"max_length": 500}),
            (ROWS, tiny, {"train_on": "all"}),
            (ROWS, tiny, {"test_size": 3}),
        ]
    ]
    assert len(set(prints)) == len(prints)
    assert build_sft_dataset(ROWS, tiny).report.fingerprint == prints[0]


def test_row_order_follows_the_data(tiny):
    """D4, D5."""
    forward, backward = build_sft_dataset(ROWS, tiny)["train"][:], build_sft_dataset(ROWS[::-1], tiny)["train"][:]
    assert forward["input_ids"] == backward["input_ids"][::-1]


def test_example_does_not_depend_on_other_rows_or_extra_columns(tiny):
    """M16."""
    alone = build_sft_dataset([ROWS[3]], tiny)["train"][0]
    among = build_sft_dataset([{"id": n, "score": 0.5, **row} for n, row in enumerate(ROWS)], tiny)["train"][3]
    assert alone == among


@pytest.mark.parametrize("ids", ["M14", "M15"])
def test_every_example_has_labels_and_ids_within_the_vocabulary(tiny, ids):
    tokenizer = load_tokenizer(tiny)
    for row in build_sft_dataset(ROWS, tiny)["train"]:
        assert any(label != -100 for label in row["labels"])
        assert max(row["input_ids"]) < tokenizer.size


def test_user_defined_mask_policy(tiny):
    def digits(rendered, conversation):
        return [span.generated and rendered.text[span.start : span.end].startswith("It") for span in rendered.spans]

    built = build_sft_dataset(ROWS[:4], tiny, train_on=digits)
    assert answers(built["train"], load_tokenizer(tiny)) == [row["answer"] for row in ROWS[:4]]
    assert built.report.sources[0].flags["no_trained_stop"] == 4
    assert any("does not learn to stop" in note for note in built.report.notes)


def test_progress_is_reported(tiny):
    seen = []
    build_sft_dataset(ROWS, tiny, progress=seen.append)
    assert list(dict.fromkeys(update.phase for update in seen)) == ["plan", "start", "tokenize", "pack", "write"]
    assert seen[-1].rows == len(ROWS)
    assert seen[-1].tokens > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_all_files(tiny, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(render_rows, "BATCH", 3)
    monkeypatch.setattr("ftdata.build.run_tasks.BYTES_PER_WORKER", 1)
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    seen = []
    build_sft_dataset([str(path) for path in paths], tiny, workers=workers, progress=seen.append)
    seen = [update for update in seen if update.phase == "tokenize"]
    assert seen == sorted(seen)
    assert seen[-1] == ("tokenize", 2 * len(ROWS), seen[-1].tokens, 1.0)
    # Worker processes report batches as well.
    assert len(seen) > 2
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(paths[0].read_bytes()))
    seen.clear()
    build_sft_dataset(str(packed), tiny, progress=seen.append)
    assert {update.share for update in seen} == {None, 1.0}


def test_sharegpt_rows_equal_messages_rows(tiny):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    share = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    one, other = build_sft_dataset([{"messages": chat}], tiny)["train"], build_sft_dataset([share], tiny)["train"]
    assert one[:] == other[:]


def test_folders_with_foreign_files_are_not_replaced(tiny, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "PWA"}')
    build_sft_dataset(ROWS, tiny, output_dir=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for folder in (app, tmp_path / "out"):
        with pytest.raises(UsageError, match="target_exists.*choose another output folder"):
            build_sft_dataset(ROWS, tiny, output_dir=folder)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_symlink_to_the_output_folder_is_followed(tiny, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build_sft_dataset(ROWS, tiny, output_dir=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
]


def test_mask_policies_apply_to_split_turns(tokenizer_dir):
    qwen = tokenizer_dir("qwen")
    tokenizer = load_tokenizer(qwen)
    think = "<think>\n\n</think>\n\n"
    for options in ({"train_on": "last_assistant"}, {"train_on": "completion"}):
        assert answers(build_sft_dataset([CHAT], qwen, **options)["train"], tokenizer) == [think + "two<|im_end|>"]
    first = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    assert answers(build_sft_dataset([first], qwen)["train"], tokenizer) == [think + "two<|im_end|>"]
    trailing = build_sft_dataset([[*CHAT, CHAT[0]]], qwen)
    assert trailing.report.sources[0].flags["trailing_messages"] == 1


def test_pretokenized_rows_are_unchanged(tiny):
    (plain,) = build_sft_dataset([{"question": "q", "answer": "a"}], tiny)["train"]
    row = {"input_ids": plain["input_ids"], "labels": plain["labels"]}
    built = build_sft_dataset([row], tiny)
    assert built["train"][0] == plain
    assert any("the row contains tokens and labels" in note for note in built.report.notes)
    with pytest.raises(BadRows, match=r"input_ids\[1\]: the token id 99999 is not"):
        build_sft_dataset([{"input_ids": [1, 99999], "labels": [-100, 99999]}], tiny)


def test_rows_may_set_template_variables(tiny):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loud %}!{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages, "chat_template_kwargs": {"loud": loud}} for loud in (True, False, True)]
    built = build_sft_dataset(rows, tiny, template=source)
    assert answers(built["train"], load_tokenizer(tiny)) == ["a!<|im_end|>", "a<|im_end|>", "a!<|im_end|>"]


@pytest.mark.parametrize("value", ["<|im_end|>", "<|im_", "ok [/INST]", "x" * 5000, [1], {"a": 1}, 10**400, "STOP"])
def test_variables_set_by_rows_print_no_control_token(tmp_path, value):
    tokenizer = tiny_bpe(tmp_path / "t", eos="STOP")
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}STOP{% endfor %}{{ tail }}{% if add_generation_prompt %}assistant: {% endif %}"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk, "chat_template_kwargs": {"tail": value}}]
    with pytest.raises(BadRows, match=r"chat_template_kwargs.tail"):
        build_sft_dataset(rows, tokenizer, template=source)
    # What the template does not read changes nothing.
    rows = [{"messages": talk, "chat_template_kwargs": {"other": number}} for number in range(2000)]
    assert len(build_sft_dataset(rows, tokenizer, template=source.replace("{{ tail }}", ""))["train"]) == 2000


def test_single_text_part_becomes_text_if_the_template_takes_no_lists(tiny):
    parts = [{"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    built = build_sft_dataset([{"messages": messages}], tiny)
    assert answers(built["train"], load_tokenizer(tiny)) == ["a<|im_end|>"]
    assert any("a list with a single text part" in note for note in built.report.notes)
    merged = build_sft_dataset([{"messages": [{"role": "user", "content": parts * 2}, messages[1]]}], tiny)
    assert any("text parts of a message are joined" in note for note in merged.report.notes)


def test_splits_of_the_data_are_kept(tiny, tmp_path):
    rows = datasets.Dataset.from_list([{"question": row["question"], "answer": row["answer"]} for row in ROWS])
    both = datasets.DatasetDict(train=rows.select(range(30)), test=rows.select(range(30, 40)))
    both.save_to_disk(str(tmp_path / "saved"))
    for data in (both, str(tmp_path / "saved")):
        built = build_sft_dataset(data, tiny)
        assert {name: len(split) for name, split in built.items()} == {"train": 30, "test": 10}
    with pytest.raises(UsageError, match="already has splits: train, test"):
        build_sft_dataset(both, tiny, test_size=3)
    alone = build_sft_dataset({"path": str(tmp_path / "saved"), "split": "test"}, tiny, test_size=2)
    assert {name: len(split) for name, split in alone.items()} == {"train": 8, "test": 2}


def test_rejects_contain_file_line_and_byte_offset(tiny, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps(BAD) + "\n{\n")
    build_sft_dataset(str(path), tiny, on_bad_rows="quarantine", max_rejects=2, output_dir=tmp_path / "out")
    first, second = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert {key: first[key] for key in ("file", "line", "row", "field", "code")} == {
        "file": str(path), "line": 3, "row": 1, "field": "messages[1].content", "code": "empty_answer"
    }  # fmt: skip
    assert path.read_bytes()[first["byte_offset"] :].startswith(first["raw"].encode())
    assert (second["line"], second["code"], second["raw"]) == (4, "json", "{")
    assert path.read_bytes()[second["byte_offset"] :] == b"{\n"


def test_file_names_are_escaped_in_the_dataset_card(tmp_path, tokenizer_dir):
    name = "a`b\n# Title [x](http:evil) <img src=x> ```.jsonl"
    (tmp_path / name).write_text('{"q": "what", "a": "that"}\n')
    build_sft_dataset(
        str(tmp_path / name),
        tokenizer_dir("tiny_bpe"),
        columns={"question": "q", "answer": "a"},
        output_dir=tmp_path / "out",
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        r"# a\`b \# Title \[x\]\(http:evil\) \<img src=x\> \`\`\`.jsonl"
    ]
    assert "| source 1 | ```` " in card
