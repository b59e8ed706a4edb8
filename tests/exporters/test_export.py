"""Exports: the same tokens, labels and boundaries in every format, atomic replacement, and clear refusals."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import warm
from datasets import load_dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_makers import CHATML

from ftdata import export, verify
from ftdata.build import cache
from ftdata.build.dataset import write_build
from ftdata.build.read_packs import Packs, list_pack_files, read_pack_file
from ftdata.errors import InputRefused, MissingDependency, UsageError
from ftdata.exporters import ExportFormat, exporters
from ftdata.exporters.columns import pad_packs
from ftdata.exporters.files import ArrowFiles
from ftdata.yaml12 import parse_yaml

ROWS = [
    {"messages": [{"role": role, "content": f"{role} {n} " + "word " * (n % 7)} for role in roles]}
    for n in range(40)
    for roles in [["system", "user", "assistant", "user", "assistant"] if n % 3 else ["user", "assistant"]]
]
NEED_PACKAGES = {"datatrove": "datatrove", "megatron_lm": "megatron-core", "mosaicml_streaming": "mosaicml-streaming"}


@pytest.fixture(scope="module")
def builds(tokenizer_dir, tmp_path_factory):
    """Return the folders of an unpacked and a packed build, which trains on all tokens."""
    home = tmp_path_factory.mktemp("builds")
    template = home / "chatml.jinja"
    template.write_text(CHATML)
    options = {"template": str(template), "test_size": 6}
    write_build(ROWS, tokenizer_dir("tiny_bpe"), home / "unpacked", **options)
    packed = {"max_length": 512, "packing": "bfd", "train_on": "all"}
    write_build(ROWS, tokenizer_dir("tiny_bpe"), home / "packed", **options, **packed)
    return {kind: home / kind for kind in ("unpacked", "packed")}


def read_documents(build, split):
    """Return the pairs (ids, labels) of a build. The label of the first token of a document is never a target."""
    documents = []
    for path in list_pack_files(build, split):
        for packs in read_pack_file(path):
            for start, end in pairwise(packs.token_bounds.tolist()):
                documents.append((packs.ids[start:end].tolist(), [-100, *packs.labels[start + 1 : end].tolist()]))
    return documents


def split_row(row):
    """Return the documents of an exported row as pairs (ids, labels), from the columns of any format."""
    ids = row.get("input_ids") or row["tokens"]
    labels = row["labels"]
    if lengths := row.get("seq_lengths"):
        bounds = [0, *np.cumsum(lengths).tolist()]
    else:
        positions = row.get("position_ids") or row.get("input_pos") or range(len(ids))
        bounds = [*(index for index, position in enumerate(positions) if position == 0), len(ids)]
    return [(ids[start:end], labels[start:end]) for start, end in pairwise(bounds)]


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
@pytest.mark.parametrize("name", ["trl", "pytorch", "transformers", "axolotl", "litgpt"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_arrow_formats_contain_the_documents_of_the_build(builds, tmp_path, name, kind, split):
    export(builds[kind], name, tmp_path / "out")
    data = load_from_disk(tmp_path / "out")[split]
    assert [document for row in data for document in split_row(row)] == read_documents(builds[kind], split)


def test_padded_rows_of_llamafactory_and_torchtune(builds, tmp_path):
    for name in ("llamafactory", "torchtune"):
        export(builds["packed"], name, tmp_path / name)
    expected = read_documents(builds["packed"], "train")
    data = load_from_disk(tmp_path / "llamafactory")
    assert set(data) == {"train", "validation_test"}
    documents = []
    for row in data["train"]:
        numbers = np.array(row["attention_mask"])
        assert len(numbers) % 8 == 0
        assert set(np.array(row["labels"])[numbers == 0].tolist()) <= {-100}
        for number in range(1, numbers.max() + 1):
            at = np.flatnonzero(numbers == number)
            assert np.array(row["position_ids"])[at].tolist() == list(range(len(at)))
            documents.append(tuple(np.array(row[key])[at].tolist() for key in ("input_ids", "labels")))
    assert documents == expected
    rows = load_from_disk(tmp_path / "torchtune")["train"].to_list()
    assert len({len(row["tokens"]) for row in rows}) == 1
    assert all(sum(row["seq_lens"]) == len(row["tokens"]) for row in rows)
    trained = [(ids, labels) for row in rows for ids, labels in split_row(row) if set(ids) != {0}]
    assert [
        (ids[: len(want)], labels[: len(want)]) for (ids, labels), (want, _) in zip(trained, expected, strict=True)
    ] == expected


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_shifted_formats_contain_the_targets_of_the_build(builds, tmp_path, kind):
    expected = [(ids, [*labels[1:], -100]) for ids, labels in read_documents(builds[kind], "train")]
    export(builds[kind], "nemo_automodel", tmp_path / "nemo")
    rows = load_from_disk(tmp_path / "nemo")["train"].to_list()
    assert [document for row in rows for document in split_row(row)] == expected
    export(builds[kind], "tinker", tmp_path / "tinker")
    rows = [json.loads(line) for line in (tmp_path / "tinker" / "train.jsonl").read_text().splitlines()]
    masks = [[float(label != -100) for label in labels[:-1]] for _, labels in expected]
    assert [row["weights"] for row in rows] == masks
    assert [row["input_tokens"] + row["target_tokens"][-1:] for row in rows] == [ids for ids, _ in expected]
    assert all(row["input_tokens"][1:] == row["target_tokens"][:-1] for row in rows)
    export(builds[kind], "skyrl", tmp_path / "skyrl")
    rows = load_from_disk(tmp_path / "skyrl")["train"].to_list()
    assert [row["loss_mask"] for row in rows] == masks
    assert all(row["num_actions"] == len(row["input_ids"]) - 1 for row in rows)


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_parquet_and_json_formats_contain_the_documents(builds, tmp_path, kind):
    expected = read_documents(builds[kind], "test")
    export(builds[kind], "parquet", tmp_path / "parquet")
    files = {"test": str(tmp_path / "parquet" / "test-*.parquet")}
    rows = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["test"].to_list()
    assert [document for row in rows for document in split_row(row)] == expected
    export(builds[kind], "mlx_lm", tmp_path / "mlx")
    rows = [json.loads(line) for line in (tmp_path / "mlx" / "test.jsonl").read_text().splitlines()]
    assert [(row["input_ids"], row["labels"]) for row in rows] == expected
    export(builds[kind], "ms_swift", tmp_path / "swift")
    rows = load_from_disk(tmp_path / "swift")["test"].to_list()
    contents = [row["messages"][-1]["content"] for row in rows]
    assert [content["token_ids"] for content in contents] == [ids for ids, _ in expected]
    masks = [[float(label != -100) for label in labels] for _, labels in expected]
    assert [content["loss_scale"] for content in contents] == masks


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_text_spans_produce_the_tokens_and_labels(builds, tmp_path, kind):
    """The labels are computed from the text with the tokenizers library, as the README of the export describes."""
    export(builds[kind], "text_spans", tmp_path / "out")
    files = {"train": str(tmp_path / "out" / "train-*.parquet")}
    rows = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    folder = json.loads((builds[kind] / "manifest.json").read_text())["options"]["tokenizer"]["name"]
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    documents = []
    for row in rows:
        encoding = tokenizer.encode(row["text"], add_special_tokens=False)
        spans = row["trained_spans"]
        inside = [any(first < end <= last for first, last in spans) for _, end in encoding.offsets]
        labels = [id_ if is_inside else -100 for id_, is_inside in zip(encoding.ids, inside, strict=True)]
        documents.append((encoding.ids, labels))
    assert documents == read_documents(builds[kind], "train")


def test_text_that_produces_other_tokens_is_refused(tmp_path, tokenizer_dir):
    """The text of a control token in a row is tokenized as plain text, which a tokenizer converts to the token."""
    rows = [{"question": "What is <|im_end|>?", "answer": "a"}, {"question": "q", "answer": "a"}]
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")
    with pytest.raises(
        InputRefused, match=r"export_limitation.*1 document.*Fix: to export anyway, pass allow='tokens-differ'"
    ):
        export(tmp_path / "built", "text_spans", tmp_path / "out")
    report = export(tmp_path / "built", "text_spans", tmp_path / "out", allow="tokens-differ")
    assert report.limitations == {"tokens-differ": 1}


def test_megatron_bridge_rows_and_refusal(builds, tmp_path, tokenizer_dir):
    export(builds["unpacked"], "megatron_bridge", tmp_path / "out")
    files = str(tmp_path / "out" / "train-*.idx.parquet")
    rows = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"].to_list()
    expected = read_documents(builds["unpacked"], "train")
    masks = [[*(int(label != -100) for label in labels[1:]), 0] for _, labels in expected]
    assert [(row["input_ids"], row["loss_mask"], row["seq_start_id"]) for row in rows] == [
        (ids, mask, [0]) for (ids, _), mask in zip(expected, masks, strict=True)
    ]
    # With train_on="all", the newline after the EOS token is trained, which Megatron-Bridge cannot express.
    ids, _ = expected[0]
    text = [{"input_ids": ids, "labels": ids}]
    write_build(text, tokenizer_dir("tiny_bpe"), tmp_path / "built", train_on="all")
    with pytest.raises(
        InputRefused, match=r"export_limitation.*1 document.*Fix: to export anyway, pass allow='untrained-after-eos'"
    ):
        export(tmp_path / "built", "megatron_bridge", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    # An export that was accepted and then interrupted is not reused for an export that does not accept the loss.
    command = [sys.executable, "-c", CRASH, str(tmp_path / "built"), "megatron_bridge", str(tmp_path / "refused")]
    environment = {**os.environ, "FTDATA_FAILPOINT": "link:1:kill", "ALLOW": "untrained-after-eos"}
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == -9
    assert list((tmp_path / ".refused.ftdata" / "shards").iterdir())
    with pytest.raises(InputRefused, match="export_limitation"):
        export(tmp_path / "built", "megatron_bridge", tmp_path / "refused")
    report = export(tmp_path / "built", "megatron_bridge", tmp_path / "refused", allow=["untrained-after-eos"])
    assert report.limitations == {"untrained-after-eos": 1}
    assert json.loads((tmp_path / "refused" / "manifest.json").read_text())["export"]["allow"] == [
        "untrained-after-eos"
    ]


@pytest.mark.parametrize("name", NEED_PACKAGES)
def test_missing_writer_package_is_named(builds, tmp_path, name):
    with pytest.raises(MissingDependency, match=f"pip install {NEED_PACKAGES[name]}"):
        export(builds["unpacked"], name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_format_is_described_and_states_its_trainer():
    for name in exporters.names():
        found = exporters.get(name)
        assert found.rows in ("packs", "documents"), name
        assert all((found.trainer, found.labels, found.boundaries, found.padding, found.source)), name


def test_plugins_can_add_formats(builds, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "_registered", {})
    trl = exporters.get("trl")
    exporters.register("plain")(
        ExportFormat("mine", "packs", "not shifted", "none", "none", "mine.py:1", ArrowFiles(), trl.convert)
    )
    report = export(builds["packed"], "plain", tmp_path / "out")
    assert report.trainer == "mine"
    assert report.files == ()


# --- folders, options and errors


def test_export_is_repeated_only_if_something_changed(builds, tmp_path):
    first = export(builds["packed"], "trl", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert export(str(builds["packed"]), "trl", str(tmp_path / "out")) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert verify(tmp_path / "out") == []
    (tmp_path / "out" / "train.py").write_text("changed")
    assert verify(tmp_path / "out") == ["train.py"]
    assert export(builds["packed"], "trl", tmp_path / "out") == first
    assert verify(tmp_path / "out") == []
    with pytest.raises(UsageError, match="different build, format or options.*overwrite=True"):
        export(builds["unpacked"], "trl", tmp_path / "out")
    report = export(builds["unpacked"], "axolotl", tmp_path / "out", overwrite=True)
    assert report.files == ("axolotl.yaml",)
    assert not (tmp_path / "out" / "train.py").exists()


def test_progress_counts_the_documents_of_all_parts(builds, tmp_path):
    updates = []
    report = export(builds["packed"], "trl", tmp_path / "out", progress=updates.append)
    totals = [sum(split[name] for split in report.splits.values()) for name in ("documents", "tokens")]
    assert [updates[-1].rows, updates[-1].tokens, updates[-1].share] == [*totals, 1.0]
    assert len(updates) > 1
    assert sorted(update.rows for update in updates) == [update.rows for update in updates]


def test_export_of_an_older_version_is_written_again(builds, tmp_path, monkeypatch):
    export(builds["packed"], "trl", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(cache, "package_hash", lambda: "another version")
    export(builds["packed"], "trl", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() != before


def test_reported_lengths_and_paths(builds, tmp_path):
    """The settings contain the length of rows or the option `max_length`, and a path with characters that YAML would interpret."""
    folder = tmp_path / "a: b #c"
    report = export(builds["packed"], "llamafactory", folder)
    settings = parse_yaml((folder / "llamafactory.yaml").read_text())
    assert settings["tokenized_path"] == str(folder)
    assert settings["cutoff_len"] == max(len(row["input_ids"]) for row in load_from_disk(folder)["train"])
    trained = sum(label != -100 for row in load_from_disk(folder)["train"] for label in row["labels"])
    assert report.splits["train"]["trained"] == trained
    export(builds["packed"], "axolotl", tmp_path / "x: y #z")
    settings = parse_yaml((tmp_path / "x: y #z" / "axolotl.yaml").read_text())
    assert settings["datasets"] == [{"path": f"{tmp_path}/x: y #z/train", "type": None}]
    assert settings["sequence_len"] == 512
    export(builds["unpacked"], "axolotl", tmp_path / "unpacked")
    settings = parse_yaml((tmp_path / "unpacked" / "axolotl.yaml").read_text())
    longest = max(len(ids) for split in ("train", "test") for ids, _ in read_documents(builds["unpacked"], split))
    assert settings["sequence_len"] == longest


def test_foreign_folders_are_not_replaced(builds, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not an export"):
            export(builds["packed"], "trl", tmp_path / "mine", overwrite=overwrite)
        with pytest.raises(UsageError, match="is not an export"):
            export(builds["packed"], "trl", builds["unpacked"], overwrite=overwrite)
    export(builds["packed"], "trl", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"not part of the export: notes\.txt"):
        export(builds["unpacked"], "trl", tmp_path / "out", overwrite=True)
    tokenizer = json.loads((builds["packed"] / "manifest.json").read_text())["options"]["tokenizer"]["name"]
    with pytest.raises(UsageError, match="is not a data set that ftdata built"):
        write_build(ROWS[:2], tokenizer, tmp_path / "out", overwrite=True)


def test_invalid_arguments_are_refused(builds, tmp_path):
    for arguments, message in (
        ((builds["packed"], "axolotll", tmp_path / "out"), "unknown_export_format.*did you mean 'axolotl'"),
        ((tmp_path, "trl", tmp_path / "out"), "not_a_build"),
        ((builds["packed"], "trl", " "), "output_dir is empty"),
    ):
        with pytest.raises((UsageError, InputRefused), match=message):
            export(*arguments)
    with pytest.raises(UsageError, match="unknown_limitation"):
        export(builds["packed"], "megatron_bridge", tmp_path / "out", allow="untrained-eos")
    export(builds["packed"], "trl", tmp_path / "out")
    with pytest.raises(InputRefused, match="not a build, but an export for TRL.*pass the build that was exported"):
        export(tmp_path / "out", "axolotl", tmp_path / "second")


def test_damaged_build_is_refused(builds, tmp_path):
    import shutil

    shutil.copytree(builds["packed"], tmp_path / "damaged")
    with (tmp_path / "damaged" / "train" / "data-00000.arrow").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(InputRefused, match="damaged_build"):
        export(tmp_path / "damaged", "trl", tmp_path / "out")


CRASH = """
import os, sys
from ftdata import export
export(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True, allow=os.environ.get("ALLOW", "").split())
"""


@pytest.mark.parametrize("name", ["trl", "mlx_lm"])
@pytest.mark.slow
def test_killed_export_leaves_the_old_or_the_new_export(builds, tmp_path, name):
    """An export is killed at each file operation. The next export completes it."""
    out = tmp_path / "out"
    export(builds["unpacked"], name, out)
    old = (out / "manifest.json").read_bytes()
    export(builds["packed"], name, tmp_path / "new")
    new = json.loads((tmp_path / "new" / "manifest.json").read_text())["report"]["splits"]
    killed = 0
    for number in range(1, 200, 3):
        environment = {**os.environ, "FTDATA_FAILPOINT": f"*:{number}:kill"}
        command = warm.python("-c", CRASH, builds["packed"], name, out, modules=(*warm.LIGHT, "datasets"))
        done = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert verify(out) == []
        manifest = (out / "manifest.json").read_bytes()
        is_new = json.loads(manifest)["report"]["splits"] == new
        assert is_new or manifest == old
        if done.returncode == 0:
            break
        killed += 1
        if is_new:
            export(builds["unpacked"], name, out, overwrite=True)
            old = (out / "manifest.json").read_bytes()
    assert killed > 3
    assert done.returncode == 0
    assert not list(tmp_path.glob(".out.ftdata"))


# --- columns


@st.composite
def packs(draw):
    """Packs with random lengths of documents and random numbers of documents."""
    documents = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5))
    lengths = [length for pack in documents for length in pack]
    count = sum(lengths)
    ids = np.arange(1, count + 1, dtype=np.int32)
    trained = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    bounds = np.append(0, np.cumsum([len(pack) for pack in documents]))
    return Packs(ids, np.where(trained, ids, -100).astype(np.int32), np.append(0, np.cumsum(lengths)), bounds)


@given(packs(), st.integers(0, 5))
def test_padding_documents(batch, extra):
    length = int(np.diff(batch.pack_bounds).max()) + extra
    padded = batch.add_padding_documents(length)
    assert np.diff(padded.pack_bounds).tolist() == [length] * len(batch)
    for number in range(len(batch)):
        first, last = batch.document_bounds[number : number + 2].tolist()
        padded_first, padded_last = padded.document_bounds[number : number + 2].tolist()
        sizes, padded_sizes = batch.lengths[first:last].tolist(), padded.lengths[padded_first:padded_last].tolist()
        missing = length - sum(sizes)
        assert padded_sizes == sizes + ([missing] if missing else [])
        start, end = batch.pack_bounds[number : number + 2].tolist()
        padded_start = number * length
        for values, padded_values, fill in ((batch.ids, padded.ids, 0), (batch.labels, padded.labels, -100)):
            expected = values[start:end].tolist() + [fill] * missing
            assert padded_values[padded_start : padded_start + length].tolist() == expected


@given(packs(), st.integers(1, 9))
def test_columns_of_packs(batch, multiple):
    documents = [batch.ids[start:end].tolist() for start, end in pairwise(batch.token_bounds.tolist())]
    assert batch.positions.tolist() == [n for ids in documents for n in range(len(ids))]
    shifted = batch.shift(batch.ids, -1).tolist()
    assert shifted == [value for ids in documents for value in [*ids[1:], -1]]
    assert len(batch.split_documents()) == len(documents)
    numbers = [n + 1 for start, end in pairwise(batch.document_bounds.tolist()) for n in range(end - start)]
    assert batch.document_numbers.tolist() == [n for n, ids in zip(numbers, documents, strict=True) for _ in ids]
    firsts = batch.without_first_labels()
    assert (firsts.labels[batch.token_bounds[:-1]] == -100).all()
    values, bounds = pad_packs(batch, multiple, batch.ids, 0)
    for (start, end), (first, last) in zip(
        pairwise(bounds.tolist()), pairwise(batch.pack_bounds.tolist()), strict=True
    ):
        ids = batch.ids[first:last].tolist()
        assert (end - start) % multiple == 0
        assert end - start - len(ids) < multiple
        assert values[start:end].tolist() == ids + [0] * (end - start - len(ids))
