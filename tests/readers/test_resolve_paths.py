"""Path resolution: folders, patterns and URLs resolve to each of their files once, or to an error."""

import json
import os
import threading

import fsspec
import pytest

from ftdata import read
from ftdata.build.dataset import write_build
from ftdata.errors import InputRefused, UsageError
from ftdata.readers import resolve_sources


def line(question):
    return json.dumps({"question": question, "answer": "a"}) + "\n"


def write(folder, files):
    for name, questions in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(map(line, questions)))
    return str(folder)


def by_split(data):
    found = {}
    for source in resolve_sources(data):
        found.setdefault(source.split, []).extend(row.data["question"] for row in source.rows())
    return found


def test_splits_of_a_folder_are_detected_from_names(tmp_path):
    folder = write(tmp_path, {
        "a.jsonl": "0", "train-1.jsonl": "1", "my_test.jsonl": "2", "dev/b.jsonl": "3", "test/train.jsonl": "4", "testament/c.jsonl": "5"
    })  # fmt: skip
    assert by_split(folder) == {None: ["0", "5"], "validation": ["3"], "test": ["2"], "train": ["4", "1"]}


def test_links_are_followed_once_and_dangling_links_are_refused(tmp_path):
    write(tmp_path / "real", {"b.jsonl": "1"})
    folder = write(tmp_path / "data", {"a.jsonl": "0", "_SUCCESS": "", "logs/.keep": ""})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    assert by_split(folder) == {None: ["0", "1"]}
    (tmp_path / "data" / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="broken symbolic link"):
        resolve_sources(folder)


@pytest.mark.parametrize("place", ["", " ", "x" * 300, "a\0b"])
def test_invalid_paths_are_refused(place):
    with pytest.raises(UsageError, match="file_not_found"):
        resolve_sources(place)


def test_saved_datasets_inside_a_folder_are_read(tmp_path):
    import datasets

    for name in ("one", "two"):
        datasets.Dataset.from_list([{"question": name, "answer": "a"}]).save_to_disk(tmp_path / name)
    assert by_split(str(tmp_path)) == {None: ["one", "two"]}
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../two/x.arrow"}]}')
    with pytest.raises(InputRefused, match=r"state.json: the file has no valid list '_data_files'"):
        resolve_sources(str(tmp_path))


def test_named_pipe_is_a_source(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    threading.Thread(target=lambda: (tmp_path / "pipe.jsonl").write_text(line("0")), daemon=True).start()
    assert by_split(str(tmp_path / "pipe.jsonl")) == {None: ["0"]}


def test_format_option_selects_the_reader(tmp_path):
    (tmp_path / "log.txt").write_text("question,answer\n0,a\n")
    with pytest.raises(InputRefused, match=r"ftdata has no reader for '.txt' files.*format="):
        resolve_sources(str(tmp_path / "log.txt"))
    assert by_split({"path": tmp_path / "log.txt", "format": "csv"}) == {None: ["0"]}
    with pytest.raises(UsageError, match="did you mean 'csv'"):
        resolve_sources({"path": tmp_path / "log.txt", "format": "cvs"})


def test_folders_and_patterns_of_remote_file_systems_are_resolved():
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/here/{name}.jsonl", line(name).encode())
    for place in ("memory://here", "memory://here/*.jsonl"):
        assert by_split(place) == {None: ["a", "b"]}
    with pytest.raises(UsageError, match="does not exist"):
        resolve_sources("memory://here/*.csv")


def test_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line("0") * 3)
    rows = read(str(path))
    next(rows)
    with path.open("a") as file:
        file.write(line("1"))
    with pytest.raises(InputRefused, match="file_changed"):
        list(rows)


def test_remote_folder_is_read_like_a_local_folder(tmp_path):
    import datasets

    folder = write(
        tmp_path / "x", {"train.jsonl": "1", "test.jsonl": "2", ".ipynb_checkpoints/a.jsonl": "3", "README.md": ""}
    )
    assert by_split(f"file://{folder}") == by_split(folder) == {"train": ["1"], "test": ["2"]}
    made = {name: datasets.Dataset.from_list([{"question": name, "answer": "a"}]) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    assert (
        by_split(f"file://{tmp_path / 'saved'}")
        == by_split(str(tmp_path / "saved"))
        == {"train": ["train"], "test": ["test"]}
    )


@pytest.mark.parametrize("split", ["../out", "/tmp/out", "..", "a/b", "a\nb", "a\0b", "", "x" * 200])
def test_split_names_cannot_leave_the_build(tmp_path, tokenizer_dir, split):
    import datasets

    data = datasets.DatasetDict({split: datasets.Dataset.from_list([{"question": "q", "answer": "a"}])})
    with pytest.raises(InputRefused, match="split_name"):
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "to" / "out")
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["to"])


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", ""])
def test_split_names_of_saved_datasets_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(InputRefused, match="damaged_file"):
        resolve_sources(tmp_path / "saved")


def test_invalid_offsets_are_detected_behind_invalid_text(tmp_path):
    """The first fault of a column must not hide a second one that would crash the process."""
    import numpy as np
    import pyarrow as pa

    ends, size = pa.py_buffer(np.array([0, 1], np.int32)), 0x1234
    broken = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xff")])
    column = pa.StructArray.from_arrays([broken, pa.array(["A" * size])], ["a", "b"])
    batch = pa.RecordBatch.from_arrays([column], ["question"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = bytearray(sink.getvalue().to_pybytes())
    at = data.rfind(b"\0\0\0\0" + size.to_bytes(4, "little")) + 4
    data[at : at + 4] = (0x70000000).to_bytes(4, "little")
    (tmp_path / "data.arrow").write_bytes(data)
    with pytest.raises(InputRefused, match="damaged_file"):
        list(read(tmp_path / "data.arrow"))


def test_recursive_patterns_find_each_file_once(tmp_path, monkeypatch):
    names = {
        "a.jsonl": "0",
        "x/b.jsonl": "1",
        "x/y/c.jsonl": "2",
        ".hidden/d.jsonl": "3",
        "x/.e.jsonl": "4",
        "x/f.txt": "",
    }
    folder = write(tmp_path / "d", names)
    for name in ("one", "two"):
        (tmp_path / "d" / "x" / name).symlink_to(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    for pattern in (f"{folder}/**/*.jsonl", "d/**/*.jsonl", "**/*.jsonl", "./d/**/*.jsonl", f"{folder}//**/*.jsonl"):
        assert by_split(pattern) == {None: ["0", "1", "2"]}, pattern
    assert by_split("d/x/**/c.*") == {None: ["2"]}
    assert by_split("**/y/*.jsonl") == {None: ["2"]}


def test_hostile_patterns_take_bounded_time():
    from ftdata.readers.file_names import matches_pattern

    assert not matches_pattern("a" * 5000, "*a" * 200 + "b")
    assert not matches_pattern("/".join("a" * 200), "/".join(["**", "a"] * 90) + "/b")
